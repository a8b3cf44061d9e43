"""A graph drawn with its plan: what each module is cut along, and which axes of a wire lie on the mesh."""

from __future__ import annotations

import re
from dataclasses import replace
from math import prod

from nemolet.draw import Arrow, Box, Picture
from nemolet.graph import Graph
from nemolet.parallel.layout import Boundary, ModulePlan
from nemolet.parallel.patterns import Pattern
from nemolet.parallel.plan import ParameterPlan, Plan
from nemolet.parallel.table import kind_of, placement

_CUT = (Pattern.COLUMN, Pattern.HEAD, Pattern.BETWEEN)  # what leaves them is cut along the last axis


def sharded_picture(graph: Graph, plan: Plan, name: str = "") -> Picture:
    """The picture of a graph as one rank sees it.

    A box says how its module is cut and how many parameters a rank has; ``F=64/2`` on a wire is an axis of 64 of
    which a rank has one of 2 parts.

    Args:
        graph: the planned graph, or one inside it.
        plan: of the whole.
        name: of this graph in the whole, such as ``"model.graph"``.

    Example:
        >>> import nemolet as nl
        >>> from nemolet.parallel.mesh import MeshSizes
        >>> from nemolet.parallel.plan import plan
        >>> parts = {"up": nl.nn.Linear("D", "F", 8, 16), "down": nl.nn.Linear("F", "D", 16, 8)}
        >>> mlp = nl.compose(parts)
        >>> [arrow.type for arrow in sharded_picture(mlp, plan(mlp, sizes=MeshSizes(tp=2))).arrows]
        ['... D=8 Hidden', '... F=16/2 Hidden', '... D=8 Hidden']
    """
    plain = graph.picture()
    prefix = f"{name}." if name else ""
    titles = {box.key: f"{prefix}{box.title}" for box in plain.boxes}
    boxes = tuple(_box(box, titles[box.key], plan) for box in plain.boxes)
    arrows = tuple(_arrow(arrow, titles[arrow.source], plan) for arrow in plain.arrows)
    return Picture(f"{plain.title} on {plan.sizes}", boxes, arrows, plain.parameters)


def _box(box: Box, name: str, plan: Plan) -> Box:
    inside = {
        known: parameter
        for known, parameter in plan.parameters.items()
        if any(each.startswith(f"{name}.") for each in (known, *parameter.tied))
    }
    module = plan.modules.get(name, ModulePlan())
    words = [box.kind]
    if module.pattern is not None or module.apart:
        words.append(kind_of(module))
    words += _cuts(list(inside.values()))
    numbers = sum(parameter.local_size for parameter in inside.values())
    return (
        box
        if box.kind in ("input", "output")
        else replace(box, kind=", ".join(words), detail=f"{numbers:,}" * bool(numbers))
    )


def _cuts(parameters: list[ParameterPlan]) -> list[str]:
    """What is cut along which mesh axis, the letters of all parameters together."""
    found: dict[str, list[str]] = {}
    for parameter in parameters:
        for cut in placement(parameter).split(", "):
            axis, _, letter = cut.partition(": ")
            if letter and letter not in found.setdefault(axis, []):
                found[axis].append(letter)
    return [f"{axis}: {' '.join(letters)}" for axis, letters in found.items()]


def _arrow(arrow: Arrow, source: str, plan: Plan) -> Arrow:
    axes, _, element = arrow.type.rpartition(" ")
    parts: dict[str, int] = {
        letter: prod(plan.sizes.of(axis) for axis in over if axis != "tp")
        for letter, over in plan.rules.activations.items()
        if letter in ("B", "T")
    }
    words = axes.split()
    module = plan.modules.get(source, ModulePlan())
    if words and module.pattern in _CUT and module.leave is Boundary.KEEP:
        parts[re.sub(r"=.*", "", words[-1])] = plan.sizes.tp
    cut = [f"{word}/{n}" if (n := parts.get(word.partition("=")[0], 1)) > 1 else word for word in words]
    return replace(arrow, type=" ".join([*cut, element]))
