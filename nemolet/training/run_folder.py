"""The folder of a run: whose it is, whether it may go on, and what it says when it is done."""

from __future__ import annotations

import fcntl
import json
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from nemolet.differences import differences
from nemolet.errors import TrainingError
from nemolet.parallel.checkpoint import remove_remains
from nemolet.training.checkpoint import LAST
from nemolet.training.settings import Training

_CHECKPOINTS, _IDENTITY, _DONE = "checkpoints", "identity.json", "done.json"


class RunFolder:
    """One experiment folder (final). A run is known by what its parts are made of, not by its name.

    Args:
        path: of the folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.checkpoints = self.path / _CHECKPOINTS

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other runs out; the system opens the lock again even if this process is killed.

        Raises:
            TrainingError: where another process trains in this folder.
        """
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        with (self.path / ".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise TrainingError(
                    "another run is at work in this folder",
                    where=str(self.path),
                    fix="wait until it ends, or choose another name=...",
                ) from error
            yield

    def claim(self, identity: Mapping[str, Any]) -> None:
        """Write down whose folder this is, or see that it belongs to the same run.

        Args:
            identity: plain data that may not change between two parts of a run.

        Raises:
            TrainingError: for the folder of another run, or one whose last checkpoint is gone.
        """
        remove_remains(self.checkpoints)
        whole = [path.name for path in sorted(self.checkpoints.glob("step_*"))]
        if whole and self.last is None:
            raise TrainingError(
                "nobody knows which checkpoint is the last",
                where=str(self.checkpoints / LAST),
                expected=f"a link to one of {', '.join(whole)}",
                found="a link that leads nowhere" if (self.checkpoints / LAST).is_symlink() else "no such link",
                fix=f"ln -sfn {whole[-1]} {self.checkpoints / LAST}, or remove the folder",
            )
        known = self.path / _IDENTITY
        if (self.last is not None or self.done is not None) and known.exists():
            changes = list(differences(json.loads(known.read_text()), _plain(identity)))
            if changes:
                raise TrainingError(
                    "the folder belongs to another run",
                    where=str(self.path),
                    expected="the settings it was started with",
                    found="\n".join(f"{each.path}: {each.one} -> {each.other}" for each in changes[:10]),
                    fix="choose another name=..., or remove the folder",
                )
        _replace(known, json.dumps(_plain(identity), indent=1))

    def describe(self, config: Mapping[str, Any]) -> None:
        """Write down what is trained now, for people to read: its config, and the state of the source."""
        _replace(self.path / "config.yaml", yaml.safe_dump(_plain(config), sort_keys=False))
        _replace(self.path / "git.txt", _git_state())

    @property
    def last(self) -> Path | None:
        """The checkpoint from which the run goes on."""
        link = self.checkpoints / LAST
        return link.resolve() if link.exists() else None

    def finish(self, steps: int, valid: Mapping[str, float], training: Training, *, early: bool) -> None:
        """Note that the run has come to its end, and under which settings.

        Args:
            steps: how many were made.
            valid: the numbers of the last validation.
            training: the settings.
            early: whether patience was at its end.
        """
        settings = {name: getattr(training, name) for name in ("max_steps", "patience", "archive")}
        _replace(self.path / _DONE, json.dumps({"steps": steps, "valid": dict(valid), "early": early, **settings}))

    @property
    def done(self) -> dict[str, Any] | None:
        """What :meth:`finish` noted."""
        note = self.path / _DONE
        return json.loads(note.read_text()) if note.exists() else None

    def goal(self, training: Training) -> int | None:
        """The step up to which a run has to be trained, which may have been reached; None where nothing is left to do.

        A run that has ended goes on where it is given more steps or more patience, and is archived anew where other
        weights are asked for.
        """
        done = self.done
        if done is None:
            return training.max_steps
        if done["early"]:
            more = training.patience is None or training.patience > done["patience"]
        else:
            more = training.max_steps > done["max_steps"]
        if more:
            return training.max_steps
        return None if training.archive == done["archive"] else int(done["steps"])


def _plain(value: Any) -> Any:
    """As JSON reads it back."""
    return json.loads(json.dumps(value, default=str))


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    partial.replace(path)


def _git_state() -> str:
    """Commit and changes of the source, where it is a checkout."""
    here = Path(__file__).parent
    try:
        runs = [
            subprocess.run(["git", *a], cwd=here, capture_output=True, text=True, timeout=10, check=True).stdout
            for a in (("rev-parse", "HEAD"), ("status", "--porcelain"))
        ]
    except (OSError, subprocess.SubprocessError):
        return "not a checkout\n"
    return "".join(runs)
