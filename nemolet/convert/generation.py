"""``generation_config.json`` and our rules of generation: a table, both ways."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from nemolet.convert.fields import Config, Part
from nemolet.errors import ConversionError, GenerationError
from nemolet.generation_rules import Beam, GenerationRules
from nemolet.sampling import Sampling

KEY = "generation_config"  # of the file's content, beside that of config.json
# Theirs -> ours, and the value that says nothing.
_FIELDS: dict[str, tuple[str, Any]] = {
    "decoder_start_token_id": ("start", None),
    "eos_token_id": ("stop", ()),
    "forced_bos_token_id": ("first", None),
    "forced_eos_token_id": ("last", None),
    "suppress_tokens": ("never", ()),
    "begin_suppress_tokens": ("not_first", ()),
    "bad_words_ids": ("forbidden", ()),
    "no_repeat_ngram_size": ("no_repeat", 0),
    "repetition_penalty": ("repetition_penalty", 1.0),
    "min_length": ("min_length", 0),
    "max_length": ("max_length", None),
    "min_new_tokens": ("min_new", 0),
    "max_new_tokens": ("max_new", None),
    "renormalize_logits": ("renormalize", False),
    "stop_strings": ("stop_texts", ()),
}
_SAMPLING: dict[str, Any] = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": 0.0}  # what transformers means
_BEAM = {"num_beams": "size", "length_penalty": "length_penalty", "early_stopping": "ends"}
_ENDS: dict[Any, str] = {True: "first", False: "likely", None: "likely", "never": "never"}
# What changes a text and is not done here, with the values that say nothing; the last ones count in sampling only.
_UNMET: dict[str, tuple[Any, ...]] = {
    "encoder_repetition_penalty": (None, 1.0),
    "encoder_no_repeat_ngram_size": (None, 0),
    "exponential_decay_length_penalty": (None,),
    "sequence_bias": (None,),
    "guidance_scale": (None, 1.0),
    "penalty_alpha": (None, 0.0),
    "dola_layers": (None,),
    "num_beam_groups": (None, 1),
    "diversity_penalty": (None, 0.0),
    "constraints": (None,),
    "force_words_ids": (None,),
    "watermarking_config": (None,),
    "token_healing": (None, False),
    "max_time": (None,),
}
_UNMET_SAMPLING: dict[str, tuple[Any, ...]] = {
    "typical_p": (None, 1.0),
    "top_h": (None,),
    "epsilon_cutoff": (None, 0.0),
    "eta_cutoff": (None, 0.0),
}


@dataclass(frozen=True)
class Generation(Part):
    """How a model writes: the argument ``generation`` of our models.

    Args:
        reads: whether the decoder reads an encoder, so that it has a first token of its own, and beams.
    """

    reads: bool

    def read(self, theirs: Mapping[str, Any], ours: Config) -> None:
        known = theirs.get(KEY)
        said = {key: value for key, value in (theirs if known is None else known).items() if value is not None}
        values: dict[str, Any] = {own: said.get(key, usual) for key, (own, usual) in _FIELDS.items()}
        for own in ("stop", "never", "not_first"):
            values[own] = _many(values[own])
        if values["last"] is not None:
            values["last"] = min(_many(values["last"]), default=None)  # the likeliest of equals is the first
        values["stop_texts"] = _many(values["stop_texts"])
        if not self.reads:
            values["start"] = None
        elif values["start"] is None:
            values["start"] = theirs.get("decoder_start_token_id", said.get("bos_token_id"))
        try:
            values["sampling"] = _sampling(said, greedy=not self.reads and _says_no_sampling(known))
            values["beam"] = _beam(said) if self.reads else None
            rules = GenerationRules(**values, unmet=_unmet(said, causal=not self.reads))
        except (GenerationError, TypeError, ValueError, KeyError) as error:
            raise ConversionError(
                "these settings of generation are impossible",
                where="generation_config.json",
                found=" ".join(str(error).split())[:300],
                fix="take generation_config.json from where the weights come from",
            ) from error
        if rules != GenerationRules():
            ours["generation"] = asdict(rules)

    def write(self, ours: Mapping[str, Any], theirs: Config) -> None:
        rules = {**asdict(GenerationRules()), **(ours.get("generation") or {})}
        known = dict(theirs.pop(KEY, None) or {})
        written = {key: _list(rules[own]) for key, (own, usual) in _FIELDS.items() if _list(rules[own]) != _list(usual)}
        sampling = rules["sampling"]
        if sampling and Sampling(**sampling).greedy:
            written["do_sample"] = False
        elif sampling:
            written |= {"do_sample": True, **{key: sampling[key] for key in _SAMPLING}}
        if rules["beam"] and self.reads:
            back = {name: value for value, name in _ENDS.items() if value is not None}
            written |= {key: rules["beam"][own] for key, own in _BEAM.items()}
            written["early_stopping"] = back[rules["beam"]["ends"]]
            if rules["beam"]["max_length"] is not None:
                written["max_new_tokens"] = rules["beam"]["max_length"]
        ruled = {*_FIELDS, *_SAMPLING, *_BEAM, "do_sample"}
        if self.reads:
            theirs["decoder_start_token_id"] = rules["start"]
        if written or known:
            unsaid = {} if sampling or self.reads else {"do_sample": None}  # without the key it would be greedy
            theirs[KEY] = {**{key: value for key, value in known.items() if key not in ruled}, **unsaid, **written}


def _many(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def _list(value: Any) -> Any:
    return [_list(item) for item in value] if isinstance(value, (list, tuple)) else value


def _says_no_sampling(known: Mapping[str, Any] | None) -> bool:
    """Whether there is a file, and it does not ask for sampling: then transformers takes the likeliest token."""
    return known is not None and known.get("do_sample", False) is False


def _sampling(said: Mapping[str, Any], *, greedy: bool) -> Sampling | None:
    if not said.get("do_sample"):
        return Sampling(temperature=0.0) if greedy else None
    return Sampling(**{key: said.get(key, usual) for key, usual in _SAMPLING.items()})


def _beam(said: Mapping[str, Any]) -> Beam:
    values = {own: said[key] for key, own in _BEAM.items() if key in said}
    return Beam(**{"size": 1, **values, "ends": _ENDS[values.get("ends")]})


def _unmet(said: Mapping[str, Any], *, causal: bool) -> tuple[str, ...]:
    asked = {**_UNMET, **(_UNMET_SAMPLING if said.get("do_sample") else {})}
    if causal:
        asked["num_beams"] = (None, 1)
    elif said.get("do_sample"):
        asked["do_sample"] = (None, False)
    return tuple(f"{key}={said[key]}" for key, silent in asked.items() if key in said and said[key] not in silent)
