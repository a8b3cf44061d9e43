"""Who imports whom, and what an import costs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_the_import_contract_is_kept():
    tool = Path(sys.executable).with_name("lint-imports")
    if not tool.is_file():
        pytest.skip("import-linter is not installed beside this Python")
    done = subprocess.run([tool, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


@pytest.mark.parametrize(
    "code, absent",
    [
        ("import nemolet", "torch numpy hydra yaml pytorch_lightning"),
        ("import nemolet.config", "torch numpy hydra omegaconf"),
        ("import nemolet.cli", "torch numpy hydra"),
        ("import nemolet.nn, nemolet.data, nemolet.training, nemolet.language", "torch numpy pytorch_lightning"),
        ("import nemolet.language as l; l.CausalLM", "pytorch_lightning hydra omegaconf transformers matplotlib"),
        (
            "import nemolet as nl; nl.load, nl.Graph, nl.data.Corpus, nl.nn.Decoder",
            "pytorch_lightning hydra omegaconf transformers tokenizers matplotlib",
        ),
        ("from nemolet.training.settings import Training", "torch pytorch_lightning"),
        ("from nemolet.parallel.settings import Parallel", "torch pytorch_lightning"),
        ("import nemolet as nl; nl.parallelize, nl.make_mesh", "pytorch_lightning hydra omegaconf transformers"),
    ],
)
def test_an_import_brings_nothing_heavy_with_it(code, absent):
    probe = f"import sys\n{code}\nprint(*sorted(set({absent.split()!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == ""
