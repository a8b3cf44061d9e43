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


def run(settings: Settings) -> None:
    """Print the config groups and their options."""
    folders = (path for path in config_folder().iterdir() if path.is_dir() and not path.name.startswith("_"))
    groups = {folder.name: sorted(path.stem for path in folder.glob("*.yaml")) for folder in sorted(folders)}
    if settings.group is not None and settings.group not in groups:
        raise ConfigError(
            "there is no such group",
            where="group",
            expected=", ".join(groups),
            found=settings.group,
            fix=did_you_mean(settings.group, groups),
        )
    for name, options in groups.items():
        if not options:  # a folder of Hydra's own groups
            continue
        if settings.group in (None, name):
            print(f"{name + '=':<12} {' '.join(options)}")
