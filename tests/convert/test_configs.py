"""What a ``config.json`` says, and what it means where a key is left out: the same as to transformers."""

from __future__ import annotations

import random
from typing import Any

import pytest
import transformers

from nemolet.convert import Architecture, known_architectures
from nemolet.convert.fields import read_config
from nemolet.convert.settled import settled
from nemolet.differences import differences
from nemolet.errors import ConversionError

from .tiny_models import MODELS

BY_CLASS: dict[str, str] = {}  # one model of each class, for all that is the same for them
for model_name, (model_class, _, _) in MODELS.items():
    BY_CLASS.setdefault(model_class, model_name)


class Noting(dict[str, Any]):
    """Notes the keys that are asked for."""

    def __init__(self, content: dict[str, Any]) -> None:
        super().__init__(content)
        self.asked: set[str] = set()

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)


def complete(config_class: Any, content: dict[str, Any]) -> dict[str, Any] | None:
    """A config as transformers completes it; None for one that it refuses."""
    try:
        return config_class.from_dict(dict(content)).to_dict()
    except Exception:  # noqa: BLE001 - of many kinds, since a null can meet any line of theirs
        return None


def meaning(architecture: Architecture, content: dict[str, Any]) -> Any:
    """What a config says of a model; how it writes is said by its own file."""
    return settled(architecture.read_config(content), ignore=("generation",))


# Keys that repeat what others say.
REPEATING = {"layer_types", "rope_parameters", "dense_act_fn", "is_gated_act", "scale_decoder_outputs"}


def case(name: str) -> tuple[Architecture, Any, dict[str, Any], list[str]]:
    """An architecture, the config class of transformers, a whole config, and the keys that are read of it."""
    model_class, config_class, arguments = MODELS[name]
    architecture, theirs = known_architectures()[model_class], getattr(transformers, config_class)
    content, asked = theirs(**arguments).to_dict(), set()
    for hidden in (set(), REPEATING):
        noting = Noting({key: v for key, v in {**architecture.defaults, **content}.items() if key not in hidden})
        read_config(architecture.parts, noting, architecture.target)
        asked |= noting.asked
    return architecture, theirs, content, sorted(asked & content.keys())


@pytest.mark.parametrize("name", BY_CLASS.values())
def test_a_key_that_is_left_out_means_what_transformers_takes_it_for(name):
    """Each key alone, together with those that say the same, and many at random."""
    architecture, theirs, content, asked = case(name)
    chosen = random.Random(0)
    several = [set(chosen.sample(asked, chosen.randrange(1, len(asked)))) for _ in range(12)]
    for left_out in (*({key} for key in asked), *({key} | REPEATING for key in asked), *several, set(content)):
        left = {key: value for key, value in content.items() if key not in left_out or key == "id2label"}
        known = complete(theirs, left)
        if known is not None:  # sizes that fit each other
            found = list(differences(meaning(architecture, left), meaning(architecture, known)))
            assert not found, (left_out, found)


@pytest.mark.parametrize("name", BY_CLASS.values())
def test_a_null_means_what_transformers_takes_it_for(name):
    """As far as both take it for something."""
    architecture, theirs, content, asked = case(name)
    for key in asked:
        nulled = {**content, key: None}
        known = complete(theirs, nulled)
        if known is None or key == "id2label":
            continue
        try:
            meant, found = meaning(architecture, known), meaning(architecture, nulled)
        except ConversionError:
            continue
        assert not list(differences(found, meant)), key


OLD = [  # as transformers 4 and 3 wrote them
    ("phi3", {"rope_parameters": None, "partial_rotary_factor": 0.5, "rope_theta": 20000.0}),
    ("phi3", {"rope_parameters": {"rope_theta": 5000.0}, "partial_rotary_factor": 0.25}),
    ("llama2", {"rope_parameters": None, "rope_theta": 5000.0, "rope_scaling": {"type": "linear", "factor": 2.0}}),
    ("llama2", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}, "rope_theta": 500.0}),
    ("llama2", {"rope_scaling": {"rope_type": "llama3", "factor": 4, "low_freq_factor": 1, "high_freq_factor": 4}}),
    ("llama2", {"rope_parameters": None, "rope_theta": 5000.0, "partial_rotary_factor": 0.5}),
    ("gemma3", {"rope_parameters": None, "rope_theta": 5e5, "rope_local_base_freq": 2e4, "layer_types": None}),
    ("gemma3", {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "sliding_window_pattern": 2}),
    ("gemma3", {"layer_types": None, "sliding_window_pattern": 2}),
    ("modernbert", {"rope_parameters": None, "global_rope_theta": 5e4, "local_rope_theta": 2e4}),
    ("modernbert", {"layer_types": None, "global_attn_every_n_layers": 2, "local_attention": 7}),
    ("qwen2", {"layer_types": None, "use_sliding_window": False, "sliding_window": 5, "max_window_layers": 1}),
    ("qwen2", {"layer_types": None, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}),
    ("qwen3-moe", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}),
    ("qwen2", {"head_dim": 12}),
    ("phi3", {"head_dim": 12}),
    ("t5", {"feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu", "is_gated_act": True}),
    ("t5", {"feed_forward_proj": "gated-silu", "dense_act_fn": "silu", "is_gated_act": True}),
    ("t5", {"num_decoder_layers": None}),
]


@pytest.mark.parametrize(("name", "changes"), OLD)
def test_an_old_config_means_what_transformers_takes_it_for(name, changes):
    architecture, theirs, content, _ = case(name)
    old = {**content, **changes}
    known = complete(theirs, old)
    assert known is not None
    assert not list(differences(meaning(architecture, old), meaning(architecture, known)))


@pytest.mark.parametrize("changes", [{}, {"sliding_window": 6}])
def test_a_local_layer_needs_a_window(changes):
    architecture, _, content, _ = case("qwen2")
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    with pytest.raises(ConversionError, match="layer_types"):
        architecture.read_config({**content, "layer_types": kinds, **changes})
    with pytest.raises(ConversionError, match="layer_types"):
        architecture.read_config({**content, "layer_types": kinds[:2], "use_sliding_window": True, "sliding_window": 6})
