"""What belongs to Hydra: sweeps, printing a config, help, shell completion."""

from __future__ import annotations

import logging
import sys
from typing import Any

from nemolet.errors import ConfigError, NemoletError

_UNCHECKED = {"--shell-completion", "-sc", "--hydra-help"}  # their words are no overrides of a config
_QUIET = ["hydra.output_subdir=null", "hydra/job_logging=disabled"]  # a run has a folder and a log of its own


def run(verb: str, flags: list[str], overrides: list[str]) -> int:
    """Hand a command with flags to Hydra, which by then has nothing left to complain about.

    Every job of a sweep is validated before the first starts.

    Raises:
        ConfigError: listing every problem.
    """
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import DictConfig, OmegaConf

    from nemolet.cli import call, composed, report
    from nemolet.config import config_folder

    status: list[int] = []

    def job(config: DictConfig) -> None:
        _speak_again()
        task = OmegaConf.to_container(HydraConfig.get().overrides.task)
        assert isinstance(task, list)
        try:
            status.append(call(verb, _named(composed(verb, [str(override) for override in task]))))
        except NemoletError as error:  # the other jobs of a sweep go on
            status.append(report(error, 2 if isinstance(error, ConfigError) else 1))

    arguments = [*_settings(verb, flags), *_checked(verb, flags, overrides), *flags]
    before, sys.argv = sys.argv, [f"nemolet {verb}", *arguments]
    try:
        hydra.main(config_path=str(config_folder()), config_name=verb, version_base="1.3")(job)()
    except SystemExit as stop:  # Hydra has said why
        return stop.code if isinstance(stop.code, int) else 1
    finally:
        sys.argv = before
        _speak_again()
    return max(status, default=0)


def _speak_again() -> None:
    """Hydra silences every logger there is; ours tells of data that is left out."""
    logging.getLogger("nemolet").disabled = False


def _settings(verb: str, flags: list[str]) -> list[str]:
    from nemolet.cli import SWEEP, VERBS

    if _UNCHECKED.intersection(flags):
        return []
    if SWEEP.intersection(flags):
        return [*_QUIET, "hydra.sweep.dir=runs", "hydra.sweep.subdir=."]
    title = f"hydra.help.header='nemolet {verb}: {VERBS[verb]}'"
    return [*_QUIET, "hydra.run.dir=.", "hydra/hydra_logging=disabled", title]


def _checked(verb: str, flags: list[str], overrides: list[str]) -> list[str]:
    """Overrides as Hydra takes them, after all that can be said about them was said."""
    from nemolet.cli import SWEEP
    from nemolet.cli.verb_help import unknown
    from nemolet.config import compose, hydra_overrides, import_user_modules, refuse

    if _UNCHECKED.intersection(flags):
        return overrides
    sweep = bool(SWEEP.intersection(flags))
    usable, problems = hydra_overrides(overrides, sweep=sweep)
    refuse(problems, f"nemolet {verb}")
    if sweep:
        _validate_all(verb, overrides)
        return usable
    config, problems = compose(verb, overrides)
    import_user_modules(config.get("imports"))
    refuse([*problems, *unknown(verb, config)], f"nemolet {verb}")
    return usable


def _validate_all(verb: str, overrides: list[str]) -> None:
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    from nemolet.cli import composed

    try:
        parsed = OverridesParser.create().parse_overrides([o for o in overrides if not o.startswith("hydra")])
        jobs = [job for batch in BasicSweeper.split_arguments(parsed, None) for job in batch]
    except HydraException as error:
        raise ConfigError(
            "the sweep cannot be read", where=f"nemolet {verb}", found=" ".join(str(error).split())
        ) from error
    for number, job in enumerate(jobs):
        try:
            composed(verb, list(job))
        except ConfigError as error:
            raise ConfigError(
                f"job {number} of {len(jobs)} is refused; none was started", where=" ".join(job), found=str(error)
            ) from error


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
