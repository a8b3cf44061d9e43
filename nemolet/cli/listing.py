"""``nemolet list``: what can be chosen."""

from __future__ import annotations

import importlib.util
from pathlib import Path


def run(*, group: str | None = None) -> None:
    """Print the config groups and their options.

    Args:
        group: only this one.
    """
    root = config_folder()
    for folder in sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("_")):
        if group in (None, folder.name):
            options = sorted(path.stem for path in folder.glob("*.yaml"))
            print(f"{folder.name + '=':<12} {' '.join(options)}")


def config_folder() -> Path:
    """Where the installed configs lie, or those of an uninstalled checkout."""
    spec = importlib.util.find_spec("nemolet.conf")
    if spec is not None and spec.origin:
        return Path(spec.origin).parent
    return Path(__file__).parents[2] / "conf"
