"""``nemolet list``: what can be chosen."""

from __future__ import annotations

from dataclasses import dataclass

from nemolet.config import config_folder


@dataclass(frozen=True)
class Settings:
    """What to list.

    Args:
        group: only this group.
    """

    group: str | None = None


def run(settings: Settings) -> None:
    """Print the config groups and their options."""
    for folder in sorted(path for path in config_folder().iterdir() if path.is_dir() and not path.name.startswith("_")):
        if settings.group in (None, folder.name):
            options = sorted(path.stem for path in folder.glob("*.yaml"))
            print(f"{folder.name + '=':<12} {' '.join(options)}")
