"""Speed of architectures side by side: nemolet, transformers, and the matrix products alone.

Forward passes are those of inference, with weights laid out for the CPU (``packed``). Training is a whole step.
Decoding writes 64 tokens after 16, greedily. Both contenders live in one process with one thread and take turns, so
that a busy machine slows them alike. Figures are medians of tokens per CPU-second, ratios those of the turns.
Memory that is freed stays with the process, as in nemolet's training: what the system takes to fetch it again depends
on which layer happens to free it last.
"products" runs nothing but the matrix products of the linear layers and the head, as torch does them by itself;
"bound" is how much faster than transformers an implementation would be that did nothing else.

    python benchmarks/models.py                                   # everything (about an hour)
    python benchmarks/models.py --models llama --sizes 8x64 --precisions float32 --compile off --turns 3
"""

from __future__ import annotations

import argparse
import gc
import itertools
import os
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.nn.functional as F

import nemolet as nl
from nemolet.language.decoding import Decoding
from nemolet.nn import packed
from nemolet.training.memory import keep_freed_memory

Step = Callable[[], object]
LLAMA = {"layers": 12, "width": 512, "heads": 8, "ffn_width": 1408, "tied": False}  # 50 million parameters
BERT = {"layers": 12, "width": 768, "heads": 12}
VOCAB = {"llama": 32000, "bert": 30522}
CONTEXT = 512
PROMPT, NEW = 16, 64  # tokens, of decoding


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(VOCAB), choices=list(VOCAB))
    parser.add_argument("--sizes", nargs="+", default=["1x64", "8x64", "1x512"], help="texts x tokens")
    parser.add_argument("--precisions", nargs="+", default=["float32", "bf16"], choices=["float32", "bf16"])
    parser.add_argument("--compile", nargs="+", default=["off", "on"], choices=["off", "on"])
    works = ["forward", "training", "decoding"]
    parser.add_argument("--work", nargs="+", default=works, choices=works)
    parser.add_argument("--turns", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    print(f"tokens per CPU-second, medians of {arguments.turns} turns, one thread, torch {torch.__version__}")
    columns = ("nemolet", "transformers", "ratio", "products", "bound")
    print(f"{'model':<7}{'work':<10}{'size':>7} {'precision':<10}{'compile':<8}" + "".join(f"{c:>14}" for c in columns))
    for model, work, precision, compiled in itertools.product(
        arguments.models, arguments.work, arguments.precisions, arguments.compile
    ):
        if work != "decoding":
            for size in arguments.sizes:
                compare(model, work, size, precision, compiled == "on", arguments.turns)
        elif model == "llama" and compiled == "off":  # the other one writes nothing
            for size in (f"1x{NEW}", f"8x{NEW}"):
                compare(model, work, size, precision, False, arguments.turns)


def compare(name: str, work: str, size: str, precision: str, compiled: bool, turns: int) -> None:
    """Let the contenders take turns and print their line."""
    torch.manual_seed(0)
    batch, length = map(int, size.split("x"))
    tokens = torch.randint(VOCAB[name], (batch, PROMPT if work == "decoding" else length))
    ours, ours_loss = OURS[name]()
    theirs, theirs_loss = THEIRS[name]()
    steps = {
        "nemolet": step_of(ours, ours_loss, tokens, work, precision, compiled),
        "transformers": step_of(theirs, theirs_loss, tokens, work, precision, compiled),
        "products": products(ours, batch if work == "decoding" else batch * length, work, precision),
    }
    with packed(ours) if work == "forward" else nullcontext():
        rates: dict[str, list[float]] = {key: [] for key in steps}
        for turn in range(-2, turns):  # at first memory is allocated, and what is compiled is compiled
            for key, step in steps.items():
                before = time.process_time()
                step()
                if turn >= 0:
                    rates[key].append(batch * length / (time.process_time() - before))
    ratio = statistics.median(own / other for own, other in zip(rates["nemolet"], rates["transformers"]))
    own, other, bound = (statistics.median(rates[key]) for key in steps)
    print(
        f"{name:<7}{work:<10}{size:>7} {precision:<10}{'on' if compiled else 'off':<8}"
        f"{own:>14,.0f}{other:>14,.0f}{ratio:>14.2f}{bound:>14,.0f}{bound / other:>14.2f}",
        flush=True,
    )
    del steps, ours, theirs
    gc.collect()
    torch.compiler.reset()


def step_of(
    model: torch.nn.Module, loss_of: Callable, tokens: torch.Tensor, work: str, precision: str, compiled: bool
) -> Step:
    """One forward or a text in the weights' own precision; or one whole step of training, under autocast."""
    if work != "training":
        model = model.eval().to(torch.bfloat16 if precision == "bf16" else torch.float32)
    else:
        model = model.train()
    if compiled:
        model.compile()
    if work == "decoding":
        return lambda: written(model, tokens)
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


def written(model: torch.nn.Module, tokens: torch.Tensor) -> object:
    """Sixty-four tokens after each row, greedily, each contender by its own loop."""
    if not isinstance(model, WithLoss):
        no_end = {"eos_token_id": None, "pad_token_id": 0}
        return model.generate(tokens, do_sample=False, max_new_tokens=NEW, min_new_tokens=NEW, use_cache=True, **no_end)
    with packed(model):
        greedy = nl.language.Sampling(temperature=0)
        decoding = Decoding(model.model, tokens.tolist(), sampling=greedy, seed=0, max_new_tokens=NEW)
        for _ in range(NEW):
            decoding.step()
    return decoding.rows


def products(model: torch.nn.Module, rows: int, work: str, precision: str) -> Step:
    """The matrix products of a model: one for each weight, two more in training, and as often as tokens are decoded."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    layers = [m for m in model.modules() if isinstance(m, (nl.nn.Linear, nl.nn.Head))]
    weights = [layer.weight.detach().to(dtype) for layer in layers]
    inputs = {size: torch.randn(rows, size, dtype=dtype) for weight in weights for size in weight.shape}

    @torch.inference_mode()
    def run() -> None:
        for weight in weights * (NEW if work == "decoding" else 1):
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


def our_llama() -> tuple[torch.nn.Module, Callable]:
    return ours_with_loss(nl.language.CausalLM(vocab_size=VOCAB["llama"], context=CONTEXT, **LLAMA))


def our_bert() -> tuple[torch.nn.Module, Callable]:
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
    keep = {"use_cache": False} if model.config.model_type == "llama" else {}
    out = model(input_ids=tokens, labels=labels, **keep)
    return out.logits if labels is None else out.loss


def their_llama() -> tuple[torch.nn.Module, Callable]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB["llama"],
        hidden_size=LLAMA["width"],
        num_hidden_layers=LLAMA["layers"],
        num_attention_heads=LLAMA["heads"],
        intermediate_size=LLAMA["ffn_width"],
        max_position_embeddings=CONTEXT,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config), their_step


def their_bert() -> tuple[torch.nn.Module, Callable]:
    from transformers import BertConfig, BertForMaskedLM

    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForMaskedLM(BertConfig(**no_dropout, attn_implementation="sdpa")), their_step


OURS = {"llama": our_llama, "bert": our_bert}
THEIRS = {"llama": their_llama, "bert": their_bert}


if __name__ == "__main__":
    main()
