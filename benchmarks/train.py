"""Training throughput side by side: nemolet through its own command, a bare loop, and transformers.

All contenders are processes on one thread each. They take turns: one runs while the others are stopped, round
after round, so that a busy machine slows all of them alike. A window is what lies between two records of a
process; the table shows medians over windows and ratios of them.

    python benchmarks/train.py                        # every size, precision and compile setting (about an hour)
    python benchmarks/train.py --sizes small --precisions float32 --compile off
"""

from __future__ import annotations

import argparse
import csv
import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SIZES = {
    # nanoGPT's CPU recipe, and a Llama of about 50 million parameters.
    "small": {"batch": 12, "length": 64, "vocab": 65, "steps_per_window": 20},
    "50m": {"batch": 1, "length": 512, "vocab": 32000, "steps_per_window": 2},
}
SMALL = {
    "layers": 4,
    "width": 128,
    "heads": 4,
    "context": 64,
    "norm": "layer",
    "activation": "gelu",  # of the recipe; the GPT-2 class of transformers computes the tanh form
    "gated": False,
    "position": "learned",
    "bias": False,
}
LLAMA = {"layers": 12, "width": 512, "heads": 8, "kv_heads": 8, "ffn_width": 1408, "context": 512, "tied": False}
CONTENDERS = ("nemolet", "bare", "hf-loop", "hf-trainer")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=SIZES)
    parser.add_argument("--precisions", nargs="+", default=["float32", "bf16"], choices=["float32", "bf16"])
    parser.add_argument("--compile", nargs="+", default=["off", "on"], choices=["off", "on"])
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=CONTENDERS)
    parser.add_argument("--windows", type=int, default=7)
    parser.add_argument(
        "--nemolet",
        default=str(Path(sys.executable).parent / "nemolet"),
        help="the command that is measured; for memory, one of an installation without extras",
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--record", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(
            arguments.worker,
            arguments.sizes[0],
            arguments.precisions[0],
            arguments.compile[0] == "on",
            arguments.record,
        )
        return
    for size in arguments.sizes:
        for precision in arguments.precisions:
            for compiled in arguments.compile:
                compare(size, precision, compiled, arguments)


def compare(size: str, precision: str, compiled: str, arguments: argparse.Namespace) -> None:
    """Run all contenders in turns and print their table."""
    contenders, windows = arguments.contenders, arguments.windows
    with tempfile.TemporaryDirectory() as folder:
        running = {
            name: Contender(name, size, precision, compiled, Path(folder) / name, arguments.nemolet)
            for name in contenders
        }
        try:
            for _ in range(windows):
                for contender in running.values():
                    contender.turn()
        finally:
            for contender in running.values():
                contender.end()
        print(
            f"\n{size}, {precision}, compile {compiled}: medians of {windows} windows, "
            "tokens per CPU-second and per second, peak MB"
        )
        base = {name: running[name].medians() for name in contenders}
        for name, (cpu, wall, memory) in base.items():
            ratios = "".join(f"  {cpu / base[o][0]:5.2f} x {o}" for o in contenders if o != name and name == "nemolet")
            print(f"  {name:<11} {cpu:9,.0f} {wall:9,.0f} {memory:8,.0f}{ratios}", flush=True)


class Contender:
    """One process that trains for ever and writes a record per window."""

    def __init__(self, name: str, size: str, precision: str, compiled: str, folder: Path, nemolet: str) -> None:
        folder.mkdir()
        self.name, self.record = name, folder / "metrics.csv"
        self.rates: list[tuple[float, float]] = []
        self.memory = 0.0
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        if name == "nemolet":
            command = [nemolet, *nemolet_overrides(size, precision, compiled, folder)]
        else:
            command = [
                sys.executable,
                __file__,
                "--worker",
                name,
                "--record",
                str(self.record),
                "--sizes",
                size,
                "--precisions",
                precision,
                "--compile",
                compiled,
            ]
        self.log = (folder / "log.txt").open("w")
        self.process = subprocess.Popen(command, env=environment, stdout=self.log, stderr=self.log, cwd=folder)
        self._wait(2)  # imports, compilation and the first steps are not measured
        self.process.send_signal(signal.SIGSTOP)

    def rows(self) -> list[dict[str, str]]:
        if not self.record.exists():
            return []
        with self.record.open(newline="") as file:
            return [r for r in csv.DictReader(file) if r.get("memory_mb")]

    def _wait(self, count: int) -> list[dict[str, str]]:
        while len(rows := self.rows()) < count:
            if self.process.poll() is not None:
                raise SystemExit(f"{self.name} ended: {Path(self.log.name).read_text()[-2000:]}")
            time.sleep(0.05)
        return rows

    def turn(self) -> None:
        """Let it run for a window that lies wholly within its turn."""
        before = len(self.rows())
        self.process.send_signal(signal.SIGCONT)
        rows = self._wait(before + 2)
        self.process.send_signal(signal.SIGSTOP)
        one, two = rows[before], rows[before + 1]
        tokens, cpu, wall = (float(two[k]) - float(one[k]) for k in ("tokens", "cpu_seconds", "wall_seconds"))
        self.rates.append((tokens / cpu, tokens / wall))
        self.memory = max(self.memory, float(two["memory_mb"]))

    def medians(self) -> tuple[float, float, float]:
        cpu, wall = zip(*self.rates)
        return statistics.median(cpu), statistics.median(wall), self.memory

    def end(self) -> None:
        self.process.send_signal(signal.SIGCONT)
        self.process.kill()
        self.process.wait()
        self.log.close()


def nemolet_overrides(size: str, precision: str, compiled: str, folder: Path) -> list[str]:
    """What a user would type; logging, checkpoints and progress are on."""
    text = folder / "text.txt"
    text.write_text("".join(chr(97 + i * i % 26) + (" " if i % 7 == 0 else "") for i in range(200_000)))
    settings, values = SIZES[size], SMALL if size == "small" else LLAMA
    model = [f"++model.{k}={str(v).lower() if isinstance(v, bool) else v}" for k, v in values.items()]
    return [
        "train",
        f"model={'gpt_tiny' if size == 'small' else 'llama_50m'}",
        *model,
        f"model.vocab_size={settings['vocab'] if size == '50m' else 'null'}",
        f"tokenizer={'char' if size == 'small' else 'byte'}",
        f"data.path={text}",
        f"data.cache={folder / 'cache'}",
        f"data.batch_size={settings['batch']}",
        f"data.sequence_length={settings['length']}",
        "data.order=random",
        f"trainer.precision={'bf16-mixed' if precision == 'bf16' else '32'}",
        f"trainer.compile={str(compiled == 'on').lower()}",
        "trainer.max_steps=1000000",
        "trainer.valid_every=1000000",
        f"trainer.log_every={settings['steps_per_window']}",
        "trainer.checkpoint_every=1000",
        "trainer.accelerator=cpu",
        f"folder={folder}",
        "sample.max_new_tokens=0",
    ]


# --------------------------------------------------------------------------------------------------
# The other contenders, each in its own process
# --------------------------------------------------------------------------------------------------


def work(name: str, size: str, precision: str, compiled: bool, path: str) -> None:
    """Train for ever; write a record after each window."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    settings = SIZES[size]
    record = Record(Path(path), settings["batch"] * settings["length"], settings["steps_per_window"])
    if name == "hf-trainer":
        hf_trainer(size, precision, compiled, record)
        return
    model, loss_of = nemolet_model(size) if name == "bare" else hf_model(size)
    if compiled:
        model.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    text = torch.randint(settings["vocab"], (200_000,))
    while True:
        starts = torch.randint(len(text) - settings["length"] - 1, (settings["batch"],)).tolist()
        window = torch.stack([text[s : s + settings["length"] + 1] for s in starts])
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = loss_of(model, window)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        record.step()


class Record:
    """Tokens and clocks after every window."""

    def __init__(self, path: Path, tokens_per_step: int, steps: int) -> None:
        self.path, self.tokens_per_step, self.steps, self.count = path, tokens_per_step, steps, 0
        path.write_text("tokens,cpu_seconds,wall_seconds,memory_mb\n")

    def step(self) -> None:
        self.count += 1
        if self.count % self.steps == 0:
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            with self.path.open("a") as file:
                file.write(
                    f"{self.count * self.tokens_per_step},{time.process_time()},{time.perf_counter()},{memory}\n"
                )


def nemolet_model(size: str):
    import nemolet as nl
    from nemolet.training import training_graph

    values = SMALL if size == "small" else LLAMA
    model = nl.language.CausalLM(vocab_size=SIZES[size]["vocab"], **values)

    def loss_of(graph, window):
        total, count = graph(tokens=window[:, :-1], labels=window[:, 1:])
        return total / count

    return training_graph(model, nl.language.CrossEntropy()), loss_of


def hf_model(size: str):
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    if size == "small":
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=65,
                n_positions=64,
                n_embd=128,
                n_layer=4,
                n_head=4,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                attn_implementation="sdpa",
            )
        )
    else:
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=32000,
                hidden_size=512,
                num_hidden_layers=12,
                num_attention_heads=8,
                num_key_value_heads=8,
                intermediate_size=1408,
                max_position_embeddings=512,
                attn_implementation="sdpa",
                use_cache=False,
            )
        )
    model.train()

    def loss_of(model, window):
        # labels are shifted inside; one position more is read so that as many are predicted
        return model(input_ids=window[:, :-1], labels=window[:, :-1], use_cache=False).loss

    return model, loss_of


def hf_trainer(size: str, precision: str, compiled: bool, record: Record) -> None:
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    settings = SIZES[size]
    model, _ = hf_model(size)
    text = torch.randint(settings["vocab"], (200_000,))

    class Crops(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 10_000_000

        def __getitem__(self, index: int):
            start = (index * 7919) % (len(text) - settings["length"])
            window = text[start : start + settings["length"]]
            return {"input_ids": window, "labels": window}

    class Watch(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            record.step()

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=settings["batch"],
            max_steps=10**6,
            learning_rate=1e-3,
            use_cpu=True,
            bf16=precision == "bf16",
            torch_compile=compiled,
            logging_steps=settings["steps_per_window"],
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            weight_decay=0.1,
            max_grad_norm=1.0,
        )
        Trainer(model, arguments, train_dataset=Crops(), callbacks=[Watch()]).train()


if __name__ == "__main__":
    main()
