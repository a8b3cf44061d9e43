"""nemolet: typed neural modules of speech and language.

Public names are resolved when they are first used, so that ``import nemolet`` loads no torch and the
command line answers at once.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "nemolet.types": (
        "AudioBN AudioLengthsB Axis Count CountScalar EmbeddingBD Hidden HiddenBTD HiddenRestD HiddenRestI"
        " HiddenRestO Labels LabelsB LabelsBT Lengths LengthsB LogProbsBTV Logits LogitsBTSV LogitsBTV LogitsBV"
        " Loss LossScalar Mask MaskBS MaskBT MemoryBSD NeuralType PositionsBT SegmentsBT Spectrogram"
        " SpectrogramBTC TokenIds TokenIdsBS TokenIdsBT Void"
    ),
    "nemolet.comparison": "Outcome compare",
    "nemolet.symbols": "Input Symbol",
    "nemolet.module": "NeuralModule checked parameter_axes",
    "nemolet.graph": "Graph compose",
    "nemolet.config": "build register",
    "nemolet.archive": "load save",
    "nemolet.parallel": "Mesh MeshSizes Parallel Rules make_mesh parallelize",
    "nemolet.errors": "NemoletError",
}
_WHERE = {name: home for home, names in _HOME.items() for name in names.split()}
_PACKAGES = (
    "nn",
    "tokenizers",
    "convert",
    "data",
    "language",
    "speech",
    "parallel",
    "training",
    "errors",
    "types",
    "config",
    "archive",
    "draw",
    "graph",
    "metrics",
)


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        value = getattr(importlib.import_module(_WHERE[name]), name)
    elif name in _PACKAGES:
        value = importlib.import_module(f"nemolet.{name}")
    else:
        from nemolet.errors import nearest

        close = nearest(name, [*_WHERE, *_PACKAGES])
        raise AttributeError(f"nemolet has no {name!r}" + (f"; did you mean {close!r}?" if close else ""))
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*_WHERE, *_PACKAGES, "__version__"])


if TYPE_CHECKING:
    from nemolet import (
        archive,
        config,
        convert,
        data,
        draw,
        errors,
        graph,
        language,
        metrics,
        nn,
        speech,
        tokenizers,
        training,
        types,
    )
    from nemolet.archive import load, save
    from nemolet.comparison import Outcome, compare
    from nemolet.config import build, register
    from nemolet.errors import NemoletError
    from nemolet.graph import Graph, compose
    from nemolet.module import NeuralModule, checked, parameter_axes
    from nemolet.parallel.apply import parallelize
    from nemolet.parallel.mesh import Mesh, MeshSizes, make_mesh
    from nemolet.parallel.rules import Rules
    from nemolet.parallel.settings import Parallel
    from nemolet.symbols import Input, Symbol
    from nemolet.types import *  # noqa: F403
