"""Continue a prompt with an archive: ``python examples/generate.py runs/demo/model.nemolet "import "``."""

import sys

import nemolet as nl


def main(path: str, prompt: str) -> None:
    """Write the continuation piece by piece, as it is made."""
    archive = nl.load(path)
    if archive.tokenizer is None:
        raise SystemExit(f"{path} has no tokenizer")
    sampling = nl.language.Sampling(temperature=0.8, top_p=0.95)
    print(prompt, end="", flush=True)
    pieces = nl.language.stream(archive.model, archive.tokenizer, [prompt], max_new_tokens=100, sampling=sampling)
    for _, piece in pieces:
        print(piece, end="", flush=True)
    print()


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    main(*sys.argv[1:])
