"""From file to folder and back, a tensor at a time: the model itself is never in memory."""

from __future__ import annotations

from pathlib import Path

from nemolet.archive import contents, save_tensors
from nemolet.convert.folder import open_folder
from nemolet.convert.mapping import ours_from, own_tensors
from nemolet.convert.reading import plan_for, vocabulary
from nemolet.convert.tokenizer_files import read_tokenizer
from nemolet.convert.writing import SHARD, write_folder
from nemolet.errors import ConversionError
from nemolet.tensor_files import Spec


def convert(
    source: str | Path,
    target: str | Path,
    *,
    architecture: str | None = None,
    tokenizer: bool = True,
    pickles: bool = False,
    shard_bytes: int = SHARD,
) -> Path:
    """Turn a Hugging Face folder into a ``.nemolet`` file, or the other way round.

    All numbers stay as they are, bit by bit. At most the tensors of one rule are in memory, and never a file.

    Args:
        source: a folder, ``hf://owner/name``, or a ``.nemolet`` file.
        target: of the other kind; what ends in ``.nemolet`` is a file.
        architecture: of the folder that is written; None for the one that fits.
        tokenizer: whether the tokenizer comes along.
        pickles: whether weights of ``torch.save`` may be read where there are no others.
        shard_bytes: largest file of weights that is written.

    Raises:
        ConversionError: naming everything that does not fit.
        ArchiveError: for a file that is refused.
    """
    from_file, to_file = _is_archive(source), _is_archive(target)
    if from_file == to_file:
        kind = ".nemolet files" if to_file else "folders"
        raise ConversionError(
            "there is nothing to convert",
            where=f"{source} -> {target}",
            expected="a folder and a file that ends in .nemolet",
            found=f"two {kind}",
            fix="copy it, or name the other kind as the target",
        )
    if to_file:
        return _to_file(source, Path(target), tokenizer=tokenizer, pickles=pickles)
    found = contents(source)
    return write_folder(
        Path(target),
        config=found.config,
        source=found.weights,
        dtypes={name: spec.dtype for name, spec in found.weights.specs.items()},
        tokenizer=found.tokenizer if tokenizer else None,
        architecture=architecture,
        extra=found.extra,
        shard_bytes=shard_bytes,
    )


def _is_archive(path: str | Path) -> bool:
    return str(path).endswith(".nemolet") and not Path(path).is_dir()


def _to_file(source: str | Path, target: Path, *, tokenizer: bool, pickles: bool) -> Path:
    folder = open_folder(source, pickles=pickles)
    plan = plan_for(folder)
    own = own_tensors(plan.model)
    pairs = [(name, folder.weights.specs[entry.theirs[0]].dtype) for entry in plan.entries for name in entry.ours]
    specs = {name: Spec(dtype, tuple(own[name].shape)) for name, dtype in pairs}
    return save_tensors(
        target,
        config=plan.model.config(),
        specs=specs,
        tensors=ours_from(plan.entries, folder.weights),
        tokenizer=read_tokenizer(folder, vocab_size=vocabulary(plan.config)) if tokenizer else None,
        card=f"Converted from a Hugging Face folder of {plan.architecture.name}.\n",
        extra=folder.carried,
    )
