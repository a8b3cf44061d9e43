"""``nemolet list``: what can be chosen."""

from __future__ import annotations

from dataclasses import dataclass

from nemolet.config import config_folder
from nemolet.errors import ConfigError, did_you_mean


@dataclass(frozen=True)
class Settings:
    """What to list.

    Args:
        group: only this group.
    """

    group: str | None = None


def groups() -> dict[str, list[str]]:
    """The options of every group; folders of Hydra's own groups have none."""
    folders = (path for path in config_folder().iterdir() if path.is_dir() and not path.name.startswith("_"))
    return {folder.name: sorted(path.stem for path in folder.glob("*.yaml")) for folder in sorted(folders)}


def run(settings: Settings) -> None:
    """Print the config groups and their options."""
    known = groups()
    if settings.group is not None and settings.group not in known:
        raise ConfigError(
            "there is no such group",
            where="group",
            expected=", ".join(known),
            found=settings.group,
            fix=did_you_mean(settings.group, known),
        )
    for name, options in known.items():
        if options and settings.group in (None, name):
            print(f"{name + '=':<12} {' '.join(options)}")
