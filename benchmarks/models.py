"""Forward and training speed of architectures side by side: nemolet, transformers, and the matrix products alone.

Both contenders live in one process with one thread and take turns, so that a busy machine slows them alike. Figures
are medians of tokens per CPU-second. "gemm" runs nothing but the matrix products of the linear layers and the head,
which no implementation in the same precision can beat: what is left below it is everything else.

    python benchmarks/models.py                                   # everything (about half an hour)
    python benchmarks/models.py --models llama --lengths 64 --precisions float32 --compile off --turns 3
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.nn.functional as F

import nemolet as nl

Step = Callable[[], object]
TOKENS = 512  # in one step: long sequences come alone, short ones in a batch
LLAMA = {"layers": 12, "width": 512, "heads": 8, "ffn_width": 1408, "tied": False}  # 50 million parameters
BERT = {"layers": 12, "width": 768, "heads": 12}
VOCAB = {"llama": 32000, "bert": 30522}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(VOCAB), choices=list(VOCAB))
    parser.add_argument("--lengths", nargs="+", type=int, default=[64, 512])
    parser.add_argument("--precisions", nargs="+", default=["float32", "bf16"], choices=["float32", "bf16"])
    parser.add_argument("--compile", nargs="+", default=["off", "on"], choices=["off", "on"])
    parser.add_argument("--work", nargs="+", default=["forward", "training"], choices=["forward", "training"])
    parser.add_argument("--turns", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"tokens per CPU-second, medians of {arguments.turns} turns, one thread, torch {torch.__version__}")
    columns = ("nemolet", "transformers", "ratio", "gemm", "share of gemm")
    print(
        f"{'model':<7}{'work':<10}{'length':>7} {'precision':<9} {'compile':<8}" + "".join(f"{c:>14}" for c in columns)
    )
    for model in arguments.models:
        for work in arguments.work:
            for length in arguments.lengths:
                for precision in arguments.precisions:
                    for compiled in arguments.compile:
                        compare(model, work, length, precision, compiled == "on", arguments.turns)


def compare(name: str, work: str, length: int, precision: str, compiled: bool, turns: int) -> None:
    """Let the contenders take turns and print their line."""
    torch.manual_seed(0)
    tokens = torch.randint(VOCAB[name], (TOKENS // length, length))
    ours, ours_loss = OURS[name](length)
    theirs, theirs_loss = THEIRS[name](length)
    steps = {
        "nemolet": step_of(ours, ours_loss, tokens, work, precision, compiled),
        "transformers": step_of(theirs, theirs_loss, tokens, work, precision, compiled),
        "gemm": products(ours, work, precision),
    }
    for step in steps.values():  # memory is allocated, and what is compiled is compiled
        step()
        step()
    rates: dict[str, list[float]] = {key: [] for key in steps}
    for _ in range(turns):
        for key, step in steps.items():
            before = time.process_time()
            step()
            rates[key].append(TOKENS / (time.process_time() - before))
    own, other, gemm = (statistics.median(rates[key]) for key in steps)
    print(
        f"{name:<7}{work:<10}{length:>7} {precision:<9} {'on' if compiled else 'off':<8}"
        f"{own:>14,.0f}{other:>14,.0f}{own / other:>14.2f}{gemm:>14,.0f}{own / gemm:>14.2f}",
        flush=True,
    )
    del steps, ours, theirs
    gc.collect()
    torch.compiler.reset()


def step_of(
    model: torch.nn.Module, loss_of: Callable, tokens: torch.Tensor, work: str, precision: str, compiled: bool
) -> Step:
    """One forward in evaluation, in the weights' own precision; or one whole step of training, under autocast."""
    if work == "forward":
        model = model.eval().to(torch.bfloat16 if precision == "bf16" else torch.float32)
    else:
        model = model.train()
    if compiled:
        model.compile()
    if work == "forward":

        def forward() -> object:
            with torch.inference_mode():
                return loss_of(model, tokens, None)

        return forward
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def train() -> object:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = loss_of(model, tokens, tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    return train


def products(model: torch.nn.Module, work: str, precision: str) -> Step:
    """The matrix products of a model: one for each weight, and two more in training."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    layers = [m for m in model.modules() if isinstance(m, (nl.nn.Linear, nl.nn.Head))]
    weights = [layer.weight.detach().to(dtype) for layer in layers]
    inputs = {size: torch.randn(TOKENS, size, dtype=dtype) for weight in weights for size in weight.shape}

    @torch.inference_mode()
    def run() -> None:
        for weight in weights:
            hidden, grad = inputs[weight.shape[1]], inputs[weight.shape[0]]
            F.linear(hidden, weight)
            if work == "training":
                grad @ weight
                grad.T @ hidden

    return run


# --------------------------------------------------------------------------------------------------
# The contenders: a model, and what it does with tokens and labels (None: logits only)
# --------------------------------------------------------------------------------------------------


class WithLoss(torch.nn.Module):
    """A model and its loss as one module, so that compiling takes both."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model, self.loss = model, nl.language.CrossEntropy()

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        logits = self.model(tokens)
        if labels is None:
            return logits
        loss, count = self.loss(logits, labels)
        return loss / count


def ours_with_loss(model: torch.nn.Module) -> tuple[torch.nn.Module, Callable]:
    return WithLoss(model), lambda whole, tokens, labels: whole(tokens, labels)


def our_llama(length: int) -> tuple[torch.nn.Module, Callable]:
    return ours_with_loss(nl.language.CausalLM(vocab_size=VOCAB["llama"], context=length, **LLAMA))


def our_bert(length: int) -> tuple[torch.nn.Module, Callable]:
    stack = nl.nn.Encoder(
        **BERT,
        norm="layer",
        norm_eps=1e-12,
        activation="gelu",
        gated=False,
        position="learned",
        max_length=512,
        bias=True,
        residual=nl.nn.ResidualOptions(order="post", input_norm=True),
    )
    encoder = nl.language.TextEncoder(vocab_size=VOCAB["bert"], stack=stack, token_types=2)
    return ours_with_loss(nl.language.MaskedLM(encoder=encoder))


def their_step(model: torch.nn.Module, tokens: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
    out = model(input_ids=tokens, labels=labels)
    return out.logits if labels is None else out.loss


def their_llama(length: int) -> tuple[torch.nn.Module, Callable]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB["llama"],
        hidden_size=LLAMA["width"],
        num_hidden_layers=LLAMA["layers"],
        num_attention_heads=LLAMA["heads"],
        intermediate_size=LLAMA["ffn_width"],
        max_position_embeddings=length,
        attn_implementation="sdpa",
        use_cache=False,
    )
    return LlamaForCausalLM(config), their_step


def their_bert(length: int) -> tuple[torch.nn.Module, Callable]:
    from transformers import BertConfig, BertForMaskedLM

    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForMaskedLM(BertConfig(**no_dropout, attn_implementation="sdpa")), their_step


OURS = {"llama": our_llama, "bert": our_bert}
THEIRS = {"llama": their_llama, "bert": their_bert}


if __name__ == "__main__":
    main()
