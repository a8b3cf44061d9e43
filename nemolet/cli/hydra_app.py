"""What belongs to Hydra: sweeps, printing a config, help, shell completion."""

from __future__ import annotations

import sys
from typing import Any

from nemolet.errors import ConfigError

_SWEEP = ("--multirun", "-m")


def run(verb: str, arguments: list[str]) -> int:
    """Hand a command with flags to Hydra; every job of a sweep is validated before the first starts."""
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import DictConfig, OmegaConf

    from nemolet.cli import call, composed
    from nemolet.config import config_folder

    if any(flag in arguments for flag in _SWEEP):
        _validate_all(verb, [a for a in arguments if not a.startswith("-")])
    status: list[int] = []

    def job(config: DictConfig) -> None:
        overrides = OmegaConf.to_container(HydraConfig.get().overrides.task)
        assert isinstance(overrides, list)
        status.append(call(verb, _named(composed(verb, [str(o) for o in overrides]))))

    before, sys.argv = sys.argv, [f"nemolet {verb}", *_folders(arguments)]
    try:
        hydra.main(config_path=str(config_folder()), config_name=verb, version_base="1.3")(job)()
    finally:
        sys.argv = before
    return max(status, default=0)


def _folders(arguments: list[str]) -> list[str]:
    """Runs keep their files in their own folders; Hydra's own stay out of the way."""
    if not any(flag in arguments for flag in _SWEEP):
        return ["hydra.output_subdir=null", "hydra.run.dir=.", "hydra/job_logging=disabled", "hydra/hydra_logging=disabled", *arguments]
    return ["hydra.output_subdir=null", "hydra.sweep.dir=.", "hydra.sweep.subdir=.", "hydra/job_logging=disabled", *arguments]


def _validate_all(verb: str, overrides: list[str]) -> None:
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    from nemolet.cli import composed

    try:
        parsed = OverridesParser.create().parse_overrides([o for o in overrides if not o.startswith("hydra")])
        jobs = [job for batch in BasicSweeper.split_arguments(parsed, None) for job in batch]
    except HydraException as error:
        raise ConfigError("the sweep cannot be read", where=f"nemolet {verb}", found=" ".join(str(error).split())) from error
    for number, job in enumerate(jobs):
        try:
            composed(verb, list(job))
        except ConfigError as error:
            raise ConfigError(f"job {number} of {len(jobs)} is refused; none was started", where=" ".join(job), found=str(error)) from error


def _named(config: dict[str, Any]) -> dict[str, Any]:
    """Give each job of a sweep a folder of its own."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    hydra_config = HydraConfig.get()
    if hydra_config.mode == RunMode.MULTIRUN:
        for key in ("name", "folder"):
            if config.get(key):
                config[key] = f"{config[key]}/{hydra_config.job.num}"
    return config
