"""Who computes what when in a pipeline: pure functions of a few numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from nemolet.errors import ParallelError, nearest


class Action(NamedTuple):
    """Forward or backward of one micro-batch through one stage."""

    forward: bool
    stage: int
    micro: int

    def __str__(self) -> str:
        return f"{self.stage}{'F' if self.forward else 'B'}{self.micro}"


def gpipe(rank: int, ranks: int, each: int, micros: int) -> list[Action]:
    """All forwards, then all backwards (Huang et al., 2019)."""
    stages = [local * ranks + rank for local in range(each)]
    forwards = [Action(True, stage, micro) for stage in stages for micro in range(micros)]
    return forwards + [Action(False, stage, micro) for stage in reversed(stages) for micro in range(micros)]


def one_forward_one_backward(rank: int, ranks: int, each: int, micros: int) -> list[Action]:
    """A backward after each forward as soon as there is one, so that few micro-batches are alive (PipeDream, 2019)."""
    ahead = min(micros, ranks - 1 - rank)
    actions = [Action(True, rank, micro) for micro in range(ahead)]
    for micro in range(micros - ahead):
        actions += [Action(True, rank, ahead + micro), Action(False, rank, micro)]
    return actions + [Action(False, rank, micro) for micro in range(micros - ahead, micros)]


def interleaved(rank: int, ranks: int, each: int, micros: int) -> list[Action]:
    """The same with several stages on each rank, which makes the bubble shorter (Narayanan et al., 2021).

    Micro-batches are gone through in equal rounds, as many as there can be: a number without divisors makes one round,
    which keeps more of them alive.
    """
    rounds = max(d for d in range(1, max(1, micros // ranks) + 1) if micros % d == 0)
    group, total = micros // rounds, each * micros
    ahead = min(total, (each - 1) * group + 2 * (ranks - 1 - rank))

    def action(forward: bool, step: int) -> Action:
        turn, place = divmod(step, group * each)
        local, micro = divmod(place, group)
        local = local if forward else each - 1 - local
        return Action(forward, local * ranks + rank, turn * group + micro)

    actions = [action(True, step) for step in range(ahead)]
    for step in range(total - ahead):
        actions += [action(True, ahead + step), action(False, step)]
    return actions + [action(False, step) for step in range(total - ahead, total)]


Schedule = Callable[[int, int, int, int], list[Action]]
SCHEDULES: dict[str, Schedule] = {"gpipe": gpipe, "1f1b": one_forward_one_backward, "interleaved": interleaved}


def schedule_of(name: str, each: int) -> Schedule:
    """A schedule by name.

    Args:
        name: ``"gpipe"``, ``"1f1b"`` or ``"interleaved"``.
        each: stages on each rank.

    Raises:
        ParallelError: for an unknown name, or several stages on a rank where the schedule knows one.
    """
    if name not in SCHEDULES:
        close = nearest(name, SCHEDULES)
        raise ParallelError(
            "there is no such schedule",
            where="parallel.schedule",
            expected=", ".join(SCHEDULES),
            found=name,
            fix=f"did you mean {close!r}?" if close else "1f1b is usual",
        )
    if name == "1f1b" and each > 1:
        raise ParallelError(
            "this schedule has one stage on each rank",
            where="parallel.layers",
            expected="as many numbers as parallel.pp",
            found=f"{each} stages on each rank",
            fix="set parallel.schedule=interleaved",
        )
    return SCHEDULES[name]
