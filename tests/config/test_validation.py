"""Every type accepts what it should and refuses the rest; rules hold; all problems are found at once."""

from __future__ import annotations

import pytest

from nemolet.config import Problem, check_block, check_tree, refuse, schema_of
from nemolet.config.schema import REQUIRED, Anything, Block, Choice, Either, Many, Plain, Schema, Table, Target
from nemolet.config.validation import check_value
from nemolet.errors import ConfigError
from nemolet.rules import evaluate, read_rule

LINEAR = {"_target_": "nemolet.nn.Linear", "in_axis": "D", "out_axis": "F", "in_size": 2, "out_size": 3}
OPTIM = Block("nemolet.training.optim", "Optim")
INT, FLOAT, STR, BOOL, NONE = (Plain(name) for name in ("int", "float", "str", "bool", "None"))


@pytest.mark.parametrize(
    "kind, good, bad",
    [
        (INT, [0, -3, 10**12], [1.0, True, "1", None, [1], {"a": 1}]),
        (FLOAT, [0, 1.5, -2, 1e-9], [False, "1.5", None, [1.5], {}]),
        (STR, ["", "a", "1"], [1, 2.0, True, None, ["a"], {}]),
        (BOOL, [True, False], [0, 1, "true", None, []]),
        (NONE, [None], [0, "", False, [], "null"]),
        (Anything(), [None, 0, "a", [1, {"a": 2}]], []),
        (Choice(("a", "b", 3)), ["a", 3], ["c", 3.0, "3", True, None]),
        (Either((INT, NONE)), [1, None], ["1", 1.5, [], {}]),
        (Either((STR, Many((STR,)))), ["a", ["a", "b"], []], [1, [1], {"a": 1}]),
        (Many((INT,)), [[], [1, 2], (3,)], [1, "12", [1, "2"], {"a": 1}, None]),
        (Many((FLOAT, FLOAT), fixed=True), [[0.9, 1], (0, 0)], [[0.9], [1, 2, 3], ["a", 1], 0.9]),
        (Table(FLOAT), [{}, {"a": 1, "b": 2.5}], [{"a": "x"}, [1], 1, None]),
        (OPTIM, [{}, {"lr": 0.1}], [{"lrr": 1}, {"lr": "x"}, [], None, 3]),
        (
            Target("Linear"),
            [LINEAR, {"_ref_": "a"}],
            [{}, {"in_size": 2}, "nemolet.nn.Linear", None, {**LINEAR, "x": 1}],
        ),
    ],
)
def test_each_type_of_value(kind, good, bad):
    for value in good:
        assert check_value(kind, value, "here") == [], value
    for value in bad:
        problems = check_value(kind, value, "here")
        assert problems, value
        assert all(problem.path.startswith("here") for problem in problems)


def test_a_problem_lies_at_its_exact_place():
    assert [p.path for p in check_value(Many((INT,)), [1, "a", 2, "b"], "x")] == ["x[1]", "x[3]"]
    assert [p.path for p in check_value(Table(INT), {"a": "no"}, "x")] == ["x.a"]
    deep = {"_target_": "nemolet.graph.compose", "modules": {"a": LINEAR, "b": {**LINEAR, "in_size": "two"}}}
    assert [p.path for p in check_tree(deep, "model")] == ["model.modules.b.in_size"]


@pytest.mark.parametrize("value", ["???", {"a": "???"}, ["???"]])
def test_a_value_left_open_is_missing(value):
    assert [p.what for p in check_tree(value, "x")] == ["a value is missing"]


def test_missing_unknown_and_wrong_settings_are_found_together():
    schema = schema_of("nemolet.language", "CausalLM")
    problems = check_block(
        schema, {"layers": "two", "widht": 8, "heads": 2, 3: 4}, "model", supplied=("model.vocab_size",)
    )
    by_path = {problem.path: problem for problem in problems}
    assert set(by_path) == {"model.layers", "model.widht", "model.width", "model.3"}
    assert by_path["model.widht"].fix == "did you mean model.width?"
    assert by_path["model.width"].what == "a value is missing"


def test_what_the_program_supplies_may_be_null_or_absent_but_not_wrong():
    schema = schema_of("nemolet.language", "CausalLM")
    sizes = {"layers": 1, "width": 8, "heads": 2}
    supplied = ("model.vocab_size",)
    assert check_block(schema, sizes, "model", supplied) == []
    assert check_block(schema, {**sizes, "vocab_size": None}, "model", supplied) == []
    assert check_block(schema, {**sizes, "vocab_size": "many"}, "model", supplied)
    assert check_block(schema, {**sizes, "vocab_size": None}, "model")


@pytest.mark.parametrize(
    "kind, value, words",
    [
        (INT, "12", "without quotes"),
        (FLOAT, "1e-3", "without quotes"),
        (INT, 3.0, "x=3"),
        (STR, 5, "x=\"'5'\""),
        (Choice(("cosine", "linear")), "cosin", "did you mean x=cosine?"),
    ],
)
def test_a_near_miss_comes_with_its_remedy(kind, value, words):
    (problem,) = check_value(kind, value, "x")
    assert words in problem.fix


# ---------------------------------------------------------------- rules


@pytest.mark.parametrize(
    "rule, holds",
    [
        ("a < b", True),
        ("a + b * 2 == 10", True),
        ("-a == 0 - 2", True),
        ("b // a == 2 and b % a == 0", True),
        ("a > b or name == 'x'", True),
        ("a != 2", False),
        ("b / a >= 2", True),
        ("inner.c <= 5", True),
        ("pair[0] < pair[1]", True),
        ("missing is not None", False),
        ("a is not None", True),
        ("a - b > 0", False),
    ],
)
def test_rules_compare_and_calculate(rule, holds):
    known = {"a": 2, "b": 4, "name": "x", "inner": {"c": 5}, "pair": [0.9, 0.95]}
    assert evaluate(read_rule(rule), known) is holds


@pytest.mark.parametrize(
    "rule",
    [
        "open('/tmp/x')",
        "(lambda: 1)()",
        "[a for a in b]",
        "a < b < c",
        "a if b else c",
        "a is b",
        "a in b",
        "a ** b",
        "a().b",
        "len(a, b)",
        "f'{a}'",
    ],
)
def test_rules_do_nothing_else(rule):
    with pytest.raises(ConfigError, match="only compare and calculate"):
        read_rule(rule)


def test_a_rule_is_quiet_about_what_is_not_set_or_wrong_by_itself():
    schema = Schema(
        "S", {"a": (INT, None), "b": (INT, 3)}, rules=(("a < b", "a is small"), ("b % c == 0", "b is even"))
    )
    assert check_block(schema, {}) == []
    assert [p.what for p in check_block(schema, {"a": "x"})] == ["wrong type of value"]
    assert [p.what for p in check_block(schema, {"a": 5})] == ["a is small"]


def test_a_broken_rule_shows_the_settings_it_speaks_of():
    schema = Schema("S", {"a": (INT, REQUIRED), "b": (INT, 0)}, rules=(("a % b == 0", "b divides a"),))
    (problem,) = check_block(schema, {"a": 4}, "model")
    assert str(problem) == "model: b divides a (found model.a=4, model.b=0)"


def test_defaults_take_part_in_rules():
    schema = schema_of("nemolet.training.schedule", "Schedule")
    assert check_block(schema, {"min_ratio": 2.0}, "schedule")[0].path == "schedule"


# ---------------------------------------------------------------- one error for all


def test_one_problem_is_an_error_with_its_four_answers():
    with pytest.raises(ConfigError) as error:
        refuse([Problem("a.b", "wrong", "right", "left", "turn")], "nemolet train")
    assert (error.value.where, error.value.expected, error.value.found, error.value.fix) == (
        "a.b",
        "right",
        "left",
        "turn",
    )


def test_several_problems_are_one_list_without_repetition():
    problem = Problem("a", "wrong")
    with pytest.raises(ConfigError, match="2 problems") as error:
        refuse([problem, problem, Problem("b", "odd", fix="mend it")], "nemolet train")
    assert str(error.value).count("a: wrong") == 1
    assert "b: odd; mend it" in str(error.value)


def test_no_problem_is_no_error():
    refuse([], "here")
