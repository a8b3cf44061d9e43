"""A plan as text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from nemolet.parallel.layout import Boundary, ModulePlan
from nemolet.parallel.patterns import Pattern
from nemolet.parallel.plan import ParameterPlan, Plan
from nemolet.parallel.planner import StageMemory

_REASONS = {
    Pattern.WHOLE: "every rank of tp holds all of it",
    Pattern.COLUMN: "its outputs are cut, so a rank has some of them",
    Pattern.ROW: "its inputs are cut, so ranks have parts of a sum",
    Pattern.LOOKUP: "a rank looks up the rows it has, and the sum is complete",
    Pattern.HEAD: "a rank scores its part of the vocabulary",
    Pattern.BETWEEN: "acts on activations that are cut",
    Pattern.EXPERTS: "experts lie on several ranks",
}


def text_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns of text; numbers to the right.

    Example:
        >>> print(text_table(("name", "size"), [("weight", "12"), ("bias", "4")]))
        name    size
        ------  ----
        weight    12
        bias       4
    """
    body = [tuple(row) for row in rows]
    widths = [max(len(row[i]) for row in (tuple(heads), *body)) for i in range(len(heads))]
    right = [bool(body) and all(re.fullmatch(r"[\d,.]*", row[i]) for row in body) for i in range(len(heads))]

    def line(row: Sequence[str]) -> str:
        cells = (cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(row, widths, right))
        return "  ".join(cells).rstrip()

    return "\n".join([line(heads), line(["-" * width for width in widths]), *map(line, body)])


def plan_table(plan: Plan) -> str:
    """Each parameter with its axes, what cuts it, and the part of a rank; equal layers in one line."""
    rows = []
    for name, same in _alike(plan.parameters, plan.stacks).items():
        first = plan.parameters[same[0]]
        copies = f" x {len(same)}" if len(same) > 1 else ""
        rows.append((name + copies, first.axes, placement(first), _shape(first.local_shape), f"{first.local_size:,}"))
    total = sum(p.local_size for p in plan.parameters.values())
    table = text_table(("parameter", "axes", "cut", "part of a rank", "numbers"), rows)
    return f"{plan.sizes}\n{table}\n{total:,} numbers on a rank at most, before the layers are spread over stages"


def explanation(plan: Plan) -> str:
    """Parameters, and what happens at the boundaries of modules, each with its reason."""
    rows = []
    for name, same in _alike(plan.modules, plan.stacks).items():
        module = plan.modules[same[0]]
        copies = f" x {len(same)}" if len(same) > 1 else ""
        rows.append((name + copies, kind_of(module), _boundary(module.enter), _boundary(module.leave), reason(module)))
    boundaries = text_table(("module", "cut as", "enters", "leaves", "why"), rows) if rows else "no module is cut"
    units = ", ".join(f"{name or 'the rest'}" for name in _alike(dict.fromkeys(plan.units, None), plan.stacks))
    return f"{plan_table(plan)}\n\n{boundaries}\n\nparameters are gathered in units: {units}"


def placement(parameter: ParameterPlan) -> str:
    """What cuts a parameter, in words.

    Example:
        >>> placement(ParameterPlan("w", "F D", (8, 4), {"tp": 0, "fsdp": 1}, (4, 2)))
        'tp: F, fsdp: D'
    """
    dims = re.findall(r"\([^)]*\)|\S+", parameter.axes)

    def letter(dim: int) -> str:
        if parameter.axes == "not declared":
            return f"dim {dim}"
        return re.sub(r"=\d+", "", dims[dim].lstrip("(").split()[0].rstrip(")"))

    return ", ".join(f"{axis}: {letter(dim)}" for axis, dim in parameter.shards.items()) or "copies"


def kind_of(module: ModulePlan) -> str:
    """The pattern of a module in a word."""
    if module.apart:
        return "loss"
    if module.pattern is None:
        return "-"
    return "column (shared heads)" if module.few_heads else module.pattern.value


def reason(module: ModulePlan) -> str:
    """Why a module is treated so."""
    if module.apart:
        return "adds up over the ranks that hold the vocabulary"
    if module.few_heads:
        return "fewer key/value heads than ranks: all hold it, each computes its queries"
    if module.pattern is None:
        return "what enters serves all its projections" if module.enter in _SERVES else "the end of a stack"
    text = _REASONS[module.pattern]
    return f"{text}; gradients of {', '.join(module.summed)} are summed" if module.summed else text


_SERVES = (Boundary.COPY, Boundary.GATHER)


def _boundary(boundary: Boundary) -> str:
    return "-" if boundary is Boundary.KEEP else boundary.value


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _alike(names: Mapping[str, object], stacks: tuple[tuple[str, ...], ...]) -> dict[str, list[str]]:
    """Names of the same place in the blocks of a stack together, if what they name is equal."""
    found: dict[str, list[str]] = {}
    values: dict[str, object] = {}
    blocks = {block for stack in stacks for block in stack}
    for name, value in names.items():
        words = name.split(".")
        outer = next((i for i in range(1, len(words) + 1) if ".".join(words[:i]) in blocks), None)
        key = name if outer is None else ".".join([*words[: outer - 1], "*", *words[outer:]])
        bare = _bare(value)
        while key in values and values[key] != bare:
            key += "'"
        values[key] = bare
        found.setdefault(key, []).append(name)
    return {key if len(same) > 1 else same[0]: same for key, same in found.items()}


def _bare(value: object) -> object:
    if isinstance(value, ParameterPlan):
        return (value.axes, value.shape, dict(value.shards), value.local_shape, value.summed)
    return value


def memory_table(stages: Sequence[StageMemory], world: int) -> str:
    """Bytes on each rank, by pipeline stage."""
    name, unit = ("GiB", 2**30) if max(memory.peak for memory in stages) >= 2**30 else ("MiB", 2**20)

    def row(stage: int, memory: StageMemory) -> tuple[str, ...]:
        parts = (
            memory.parameters,
            memory.gradients,
            memory.optimizer,
            memory.gathered,
            memory.activations,
            memory.peak,
        )
        sizes = [f"{part / unit:,.2f}" for part in parts]
        return (str(stage), str(memory.layers), f"{memory.numbers:,}", *sizes)

    heads = ("stage", "layers", "numbers", "weights", "gradients", "optimizer", "gathered", "activations", "peak")
    table = text_table(heads, [row(stage, memory) for stage, memory in enumerate(stages)])
    return f"{world} ranks; numbers on a rank, and {name} on a rank\n{table}"
