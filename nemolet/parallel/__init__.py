"""A model over many devices: meshes, rules, plans derived from declared axes, and their application."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_EXPORTS = {
    "Mesh": "nemolet.parallel.mesh",
    "MeshSizes": "nemolet.parallel.mesh",
    "make_mesh": "nemolet.parallel.mesh",
    "Rules": "nemolet.parallel.rules",
    "Parallel": "nemolet.parallel.settings",
    "Pipeline": "nemolet.parallel.pipeline",
    "CollectiveLog": "nemolet.parallel.collectives",
    "Plan": "nemolet.parallel.plan",
    "parallelize": "nemolet.parallel.apply",
}


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"nemolet.parallel has no {name!r}; it has {', '.join(_EXPORTS)}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


if TYPE_CHECKING:
    from nemolet.parallel.apply import parallelize
    from nemolet.parallel.collectives import CollectiveLog
    from nemolet.parallel.mesh import Mesh, MeshSizes, make_mesh
    from nemolet.parallel.pipeline import Pipeline
    from nemolet.parallel.plan import Plan
    from nemolet.parallel.rules import Rules
    from nemolet.parallel.settings import Parallel
