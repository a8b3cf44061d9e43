"""LoRA beside peft on the same model: seconds of a step and memory, one process and one thread each.

    python benchmarks/lora.py                  # a Llama of 50 million parameters
    python benchmarks/lora.py --layers 4 --steps 3

Each side trains in a process of its own: the same sizes, layers, rank and batch; forward, backward and AdamW. The sides
take turns. Seconds are those of the CPU, the best of all steps; memory is the largest resident set beyond that before
the model was made, the smallest of all turns.
Our queries, keys and values are one layer with one addition, theirs are three, so ours trains somewhat fewer numbers.
"""

from __future__ import annotations

import sys

sys.path.pop(0)  # this folder: its tokenize.py would stand before the standard library's

import argparse
import json
import resource
import subprocess
import time
from typing import Any

import torch

SIZES = {"vocab_size": 32000, "width": 512, "heads": 8, "ffn_width": 1376}


def ours(layers: int, length: int, rank: int) -> tuple[torch.nn.Module, Any]:
    """Ours: one fused projection of queries, keys and values."""
    import nemolet as nl
    from nemolet.nn.adapters import Adapter, adapt

    model = nl.language.CausalLM(layers=layers, context=length, tied=False, **SIZES)
    adapt(model, Adapter(rank=rank, alpha=2 * rank, targets=("qkv", r"attention\.out", "gate", "up", "down")))
    loss = nl.language.CrossEntropy()

    def step(tokens: torch.Tensor) -> torch.Tensor:
        total, count = loss(model(tokens), tokens.roll(-1, 1))
        return total / count

    return model.train(), step


def theirs(layers: int, length: int, rank: int) -> tuple[torch.nn.Module, Any]:
    """transformers with peft: additions for each of the seven projections."""
    import peft
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=SIZES["vocab_size"],
        hidden_size=SIZES["width"],
        num_hidden_layers=layers,
        num_attention_heads=SIZES["heads"],
        intermediate_size=SIZES["ffn_width"],
        max_position_embeddings=length,
        attn_implementation="sdpa",
        use_cache=False,
    )
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    chosen = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names)
    model = peft.get_peft_model(LlamaForCausalLM(config), chosen).train()
    return model, lambda tokens: model(input_ids=tokens, labels=tokens).loss


def work(side: str, layers: int, batch: int, length: int, rank: int, steps: int) -> dict[str, float]:
    """Train a few steps; runs in a process of its own."""
    torch.set_num_threads(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model, step = {"nemolet": ours, "peft": theirs}[side](layers, length, rank)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    tokens = torch.randint(SIZES["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(0))
    seconds = []
    for _ in range(steps + 1):
        start = time.process_time()
        step(tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.process_time() - start)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"seconds": min(seconds[1:]), "mb": grown / 1024, "trained": sum(p.numel() for p in trained)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, usual in {"layers": 10, "batch": 2, "length": 512, "rank": 8, "steps": 4}.items():
        parser.add_argument(f"--{name}", type=int, default=usual)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--worker", choices=["nemolet", "peft"], help=argparse.SUPPRESS)
    options = vars(parser.parse_args())
    side, turns = options.pop("worker"), options.pop("turns")
    if side is not None:
        print(json.dumps(work(side, **options)))
        return
    found: dict[str, dict[str, float]] = {}
    for _ in range(turns):
        for side in ("nemolet", "peft"):
            command = [sys.executable, __file__, "--worker", side, *(f"--{k}={v}" for k, v in options.items())]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            now = json.loads(done.stdout.splitlines()[-1])
            found[side] = {name: min(value, found.get(side, now)[name]) for name, value in now.items()}
    for side, best in found.items():
        tokens = options["batch"] * options["length"] / best["seconds"]
        print(f"{side:8} {best['trained']:>10,} trained  {tokens:8.1f} tokens/CPU-s  {best['mb']:8.0f} MB")
    speed = found["peft"]["seconds"] / found["nemolet"]["seconds"]
    print(f"ratio    {speed:.2f} times as fast, {found['nemolet']['mb'] / found['peft']['mb']:.2f} of the memory")


if __name__ == "__main__":
    main()
