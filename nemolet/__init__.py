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
        "Axis AudioBN ClassesB Count CountScalar HiddenBD HiddenBTD HiddenRestD HiddenRestI HiddenRestO"
        " Hidden LabelsB LabelsBT LabelsBS LabelsBU LabelsBV Labels LengthsB Lengths LogProbsBTV LogitsBP LogitsBT"
        " LogitsBTV LogitsBUV LogitsBV LogitsPV Logits Loss LossScalar MaskBS MaskBT Mask MemoryBSD"
        " NeuralType Outcome PlacesB PositionsBT ScoresB SegmentsBT SpectrogramBTC Spectrogram TokenIdsBT TokenIds"
        " TokenIdsBS Void WordsBU"
    ),
    "nemolet.symbols": "Input Symbol",
    "nemolet.module": "NeuralModule checked parameter_axes",
    "nemolet.graph": "Graph compose",
    "nemolet.config": "build register",
    "nemolet.archive": "load save",
    "nemolet.errors": "NemoletError",
}
_WHERE = {name: home for home, names in _HOME.items() for name in names.split()}
_PACKAGES = (
    "nn",
    "tokenizers",
    "data",
    "language",
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
    from nemolet import archive, config, data, draw, errors, graph, language, metrics, nn, tokenizers, training, types
    from nemolet.archive import load, save
    from nemolet.config import build, register
    from nemolet.errors import NemoletError
    from nemolet.graph import Graph, compose
    from nemolet.module import NeuralModule, checked, parameter_axes
    from nemolet.symbols import Input, Symbol
    from nemolet.types import *  # noqa: F403
