"""``nemolet plan``."""

from __future__ import annotations

import re

import pytest

from nemolet.cli import main

TINY = ["plan", "model=llama_tiny", "tokenizer=byte", "data.sequence_length=16", "data.batch_size=2"]


def test_a_plan_is_printed_with_its_bytes(capsys):
    assert main([*TINY, "parallel=tp_fsdp", "parallel.tp=2", "world=8"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("dp_shard 4 x tp 2\n")
    assert re.search(r"attention\.qkv\.weight x 4 +\(G=2 5 K=32\) D=192 +tp: G, fsdp: D +160 x 48 +7,680", printed)
    assert "8 ranks; numbers on a rank, and MiB on a rank" in printed and "gather T" not in printed


def test_reasons_are_printed_on_demand(capsys):
    assert main([*TINY, "parallel=tp", "parallel.tp=2", "--explain"]) == 0
    printed = capsys.readouterr().out
    assert "gather T" in printed and "its inputs are cut, so ranks have parts of a sum" in printed


@pytest.mark.parametrize("name", ["one", "ddp", "zero1", "fsdp", "hsdp", "pp", "cp"])
def test_every_layout_can_be_planned(capsys, name):
    assert main([*TINY, f"parallel={name}"]) == 0
    assert "ranks; numbers on a rank" in capsys.readouterr().out


def test_a_model_is_drawn_as_a_rank_sees_it(capsys, tmp_path):
    assert main([*TINY, "parallel=tp", "parallel.tp=2", f"out={tmp_path / 'plan.md'}"]) == 0
    drawn = (tmp_path / "plan.md").read_text()
    assert "embed<br/>Embedding, lookup, tp: V" in drawn and "tp: G H F" in drawn
    assert main([*TINY, f"out={tmp_path / 'plan.png'}"]) == 2
    assert "ends in .svg or .md" in capsys.readouterr().err


def test_llama_70b_on_512_ranks_is_planned_here(capsys):
    overrides = ["model=llama3_70b", "parallel=3d", "parallel.dp_shard=16", "data.sequence_length=8192"]
    assert main(["plan", "tokenizer=byte", "data.batch_size=1", *overrides]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("pp 4 x dp_shard 16 x tp 8\n") and "512 ranks" in printed
    stages = re.findall(r"^ +\d +\d+ +([\d,]+) ", printed, re.MULTILINE)
    numbers = sum(int(stage.replace(",", "")) for stage in stages)
    # Norms are on all 8 ranks of tp, everything else is cut into 128 parts.
    norms = 161 * 8192
    assert len(stages) == 4 and numbers * 128 == 70_553_706_496 + 7 * norms


def test_a_dry_run_of_training_prints_the_plan_and_makes_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sizes = ["model=llama3_70b", "tokenizer=byte", "parallel=3d", "parallel.tp=8", "parallel.pp=4"]
    overrides = [*sizes, "parallel.dp_shard=16", f"data.path={tmp_path / 'nothing_here.txt'}"]
    assert main(["plan", *overrides]) == 0
    planned = capsys.readouterr().out
    assert main(["train", *overrides, "--dry-run"]) == 0
    assert capsys.readouterr().out == planned
    assert not list(tmp_path.iterdir())
    assert main(["overfit", *TINY[1:], "--dry-run"]) == 2
    assert "no dry run of overfit" in capsys.readouterr().err
    assert main(["train", "--dry-runs"]) == 2
    assert "did you mean --dry-run?" in capsys.readouterr().err


@pytest.mark.parametrize(
    "overrides, status, words",
    [
        (["parallel=tp", "parallel.tp=4"], 1, ["G=2", "kv_heads=replicate"]),
        (["parallel=tp_fsdp", "parallel.tp=3", "world=8"], 1, ["multiply to 8 ranks"]),
        (["parallel=fsdp", "parallel.rules={parameters:{Q:tp}}"], 1, ["unknown axis letter", "Q"]),
        (["parallel=fsdq"], 2, ["fsdp"]),
        (["parallel.tq=2"], 2, ["tp"]),
    ],
)
def test_mistakes_are_answered(capsys, overrides, status, words):
    assert main([*TINY, *overrides]) == status
    printed = capsys.readouterr().err
    for word in words:
        assert word in printed
