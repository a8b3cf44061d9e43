"""Hugging Face folders both ways: two tables per architecture, everything else derived."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_EXPORTS = {
    "Architecture": "nemolet.convert.architecture",
    "known_architectures": "nemolet.convert.architecture",
    "convert": "nemolet.convert.files",
    "export_adapter": "nemolet.convert.adapters",
    "import_adapter": "nemolet.convert.adapters",
    "read": "nemolet.convert.reading",
    "write": "nemolet.convert.writing",
}


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"nemolet.convert has no {name!r}; it has {', '.join(_EXPORTS)}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


if TYPE_CHECKING:
    from nemolet.convert.adapters import export_adapter, import_adapter
    from nemolet.convert.architecture import Architecture, known_architectures
    from nemolet.convert.files import convert
    from nemolet.convert.reading import read
    from nemolet.convert.writing import write
