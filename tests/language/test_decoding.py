"""Decoding against a loop over argmax, scripted models, and itself: alone or in a batch, cached or not."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import nn

import nemolet as nl
from nemolet.errors import GenerationError
from nemolet.generation_rules import GenerationRules
from nemolet.language.decoding import Completion, Decoding, generate, stream
from nemolet.language.models import CausalLM
from nemolet.module import NeuralModule
from nemolet.sampling import Sampling
from nemolet.tokenizers import ByteTokenizer, CharTokenizer
from nemolet.tokenizers.base import TableTokenizer
from nemolet.types import LogitsBTV, MaskBT, PositionsBT, TokenIdsBT

GREEDY = Sampling(temperature=0.0)
LETTERS = CharTokenizer(list("abcdefghijklmnopqrstuvwxyz ,."))
KINDS = {
    "llama": {"kv_heads": 2},
    "gpt2": {"norm": "layer", "activation": "gelu_tanh", "gated": False, "position": "learned", "bias": True},
    "window": {"window": 5, "qk_norm": True},
}


def make(kind: str = "llama", vocab_size: int = LETTERS.vocab_size, context: int = 64) -> CausalLM:
    """A random model that is sure of itself, in float64, so that no tie hangs on rounding."""
    torch.manual_seed(0)
    model = CausalLM(vocab_size=vocab_size, layers=2, width=16, heads=4, context=context, **KINDS[kind]).double()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.normal_(std=0.4)
    return model


class Uncached(NeuralModule):
    """The same model without the option to cache."""

    def __init__(self, model: CausalLM) -> None:
        super().__init__()
        self.model, self.context, self.vocab_size = model, model.context, model.vocab_size

    def forward(
        self, tokens: TokenIdsBT, positions: PositionsBT | None = None, mask: MaskBT | None = None
    ) -> LogitsBTV:
        return self.model(tokens, positions=positions, mask=mask)


class Scripted(NeuralModule):
    """Continues any prompt with a script of tokens."""

    def __init__(self, script: Sequence[int], vocab_size: int, prompt_length: int = 1) -> None:
        super().__init__()
        self.script, self.vocab_size, self.prompt_length = list(script), vocab_size, prompt_length
        self.anchor = nn.Parameter(torch.zeros(()))

    def forward(self, tokens: TokenIdsBT) -> LogitsBTV:
        length = tokens.shape[1]
        logits = torch.zeros(*tokens.shape, self.vocab_size)
        logits[:, -1, self.script[(length - self.prompt_length) % len(self.script)]] = 1.0
        return logits


class Fixed(NeuralModule):
    """One distribution for every next token."""

    def __init__(self, logits_V: torch.Tensor) -> None:
        super().__init__()
        self.logits_V, self.vocab_size = nn.Parameter(logits_V), len(logits_V)

    def forward(self, tokens: TokenIdsBT) -> LogitsBTV:
        return self.logits_V.expand(*tokens.shape, -1)


class Syllables(TableTokenizer):
    """Tokens of several characters, so that a stop sequence can begin inside one and end inside another."""

    kind = "syllables"

    def __init__(self, table: Sequence[str]) -> None:
        self.table = [entry.encode() for entry in table]
        self.vocab_size, self.special_tokens = len(self.table), {}

    def files(self) -> dict[str, bytes]:
        return {}

    @classmethod
    def from_files(cls, files: Mapping[str, bytes], **settings: Any) -> "Syllables":
        raise NotImplementedError

    def _encode(self, text: str) -> list[int]:
        return [0]


def texts(model: NeuralModule, prompts: Sequence[str], **options: Any) -> list[str]:
    return [completion.text for completion in generate(model, LETTERS, prompts, **options)]


def argmax_loop(model: CausalLM, prompt: str, count: int) -> str:
    ids = LETTERS.encode(prompt)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return LETTERS.decode(ids)[len(prompt) :]


# ----------------------------------------------------------------------------- one truth in many ways

PROMPTS = ["the quick brown fox", "a", "lazy dogs, sleeping", "jumps"]


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_with_and_without_a_cache_is_the_argmax_loop(kind):
    model = make(kind)
    expected = [argmax_loop(model, prompt, 20) for prompt in PROMPTS]
    assert len({text[-5:] for text in expected}) > 1, "a poor test: the prompt does not matter"
    for prompt, text in zip(PROMPTS, expected):
        assert texts(model, [prompt], max_new_tokens=20, sampling=GREEDY) == [text]
        assert texts(Uncached(model), [prompt], max_new_tokens=20, sampling=GREEDY) == [text]
    assert texts(model, PROMPTS, max_new_tokens=20, sampling=GREEDY) == expected
    assert texts(Uncached(model), PROMPTS, max_new_tokens=20, sampling=GREEDY) == expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(), Sampling(temperature=0.7, top_k=9, top_p=0.9)], ids=str)
@pytest.mark.parametrize("context", [64, 16], ids=["fits", "overflows"])
def test_a_row_says_the_same_alone_and_in_a_batch(kind, sampling, context):
    model = make(kind, context=context)
    options = {"max_new_tokens": 40, "sampling": sampling, "truncate": True}
    alone = [texts(model, [prompt], seed=7 + row, **options)[0] for row, prompt in enumerate(PROMPTS)]
    assert texts(model, PROMPTS, seed=7, **options) == alone
    assert texts(Uncached(model), PROMPTS, seed=7, **options) == alone


def test_rows_that_stop_early_do_not_disturb_the_others():
    model = make()
    options = {
        "max_new_tokens": 30,
        "stop": ["e", "q"],
        "sampling": Sampling(temperature=1.5),
        "rules": GenerationRules(repetition_penalty=2.0),
    }
    alone = [texts(model, [prompt], seed=row, **options)[0] for row, prompt in enumerate(PROMPTS)]
    assert len({len(text) for text in alone}) > 1
    assert texts(model, PROMPTS, **options) == alone


def test_the_model_reads_each_token_once():
    model, lengths = make(), []
    model.register_forward_pre_hook(lambda _, args, kwargs: lengths.append(kwargs["tokens"].shape[1]), with_kwargs=True)
    texts(model, ["the quick", "fox"], max_new_tokens=5)
    assert lengths == [9, 1, 1, 1, 1]


# ------------------------------------------------------------------------------------- the context


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prompt", ["abc", "the quick brown fox jumps over"])
def test_a_full_context_keeps_going(kind, prompt):
    (completion,) = generate(make(kind, context=8), LETTERS, [prompt], max_new_tokens=50, truncate=True)
    assert len(completion.tokens) == 50 and completion.finish == "length"


def test_no_more_than_the_context_is_read_and_rarely_anew():
    model, lengths = make(context=16), []
    model.register_forward_pre_hook(lambda _, args, kwargs: lengths.append(kwargs["tokens"].shape[1]), with_kwargs=True)
    texts(model, ["abcdefghij"], max_new_tokens=40)
    # Full at 16 tokens; then the oldest quarter goes, 13 are read anew, and three more fit.
    assert lengths == [10] + [1] * 6 + ([13] + [1] * 3) * 8 + [13]


def test_a_context_of_one_token_works():
    assert len(texts(make(context=1), ["abc"], max_new_tokens=5, truncate=True)[0]) == 5


# -------------------------------------------------------------------------------- text from tokens


def pieces_of(
    text: str, stop: Sequence[str] = (), tokenizer: Any = LETTERS, extra: int = 0
) -> tuple[list[str], Completion]:
    script = tokenizer.encode(text)
    completions: list[Completion] = []
    pieces = [
        piece
        for _, piece in stream(
            Scripted(script, tokenizer.vocab_size),
            tokenizer,
            ["a" if tokenizer.opener is None else ""],  # one token in any case
            max_new_tokens=len(script) + extra,
            sampling=GREEDY,
            stop=stop,
            completions=completions,
        )
    ]
    return pieces, completions[0]


def test_pieces_come_at_once_and_make_up_the_text():
    pieces, completion = pieces_of("a quick fox.")
    assert pieces == list("a quick fox.")
    assert completion == Completion("a quick fox.", LETTERS.encode("a quick fox."), "length")


def test_no_piece_is_half_a_character():
    text = "né € 😀!"
    pieces, completion = pieces_of(text, tokenizer=ByteTokenizer())
    assert pieces == list(text) and completion.text == text


def test_a_character_left_unfinished_is_replaced_once():
    tokenizer = ByteTokenizer()
    script = tokenizer.encode("a😀")[:-1]
    (completion,) = generate(Scripted(script, 257), tokenizer, [""], max_new_tokens=len(script), sampling=GREEDY)
    assert completion.text == "a\ufffd"


@pytest.mark.parametrize("seed", range(5))
def test_random_bytes_stream_as_they_decode(seed):
    tokenizer, model = ByteTokenizer(), make(vocab_size=257)
    completions: list[Completion] = []
    rows: dict[int, list[str]] = {0: [], 1: []}
    for row, piece in stream(
        model,
        tokenizer,
        ["hé", "x"],
        max_new_tokens=40,
        seed=seed,
        sampling=Sampling(temperature=2.0),
        completions=completions,
    ):
        assert piece
        rows[row].append(piece)
    for row, completion in enumerate(completions):
        assert "".join(rows[row]) == completion.text == tokenizer.decode(completion.tokens)


# ---------------------------------------------------------------------------------------- stopping


def test_a_stop_sequence_is_never_shown():
    pieces, completion = pieces_of("hello, end of it", stop=["end"])
    assert pieces == ["h", "el", "l", "o", ",", " "]  # an "e" waits for what follows it
    assert completion.finish == "stop" and completion.text == "hello, "


def test_what_only_looked_like_a_stop_sequence_is_shown_after_all():
    pieces, completion = pieces_of("an enemy", stop=["end"])
    assert "".join(pieces) == completion.text == "an enemy"
    # Each "e" waits, since it might begin the stop sequence.
    assert pieces == ["a", "n", " ", "en", "em", "y"]
    assert pieces_of("the en", stop=["end"])[1] == Completion("the en", LETTERS.encode("the en"), "length")


def test_a_stop_sequence_may_begin_and_end_inside_tokens():
    tokenizer = Syllables(["ab", "cE", "ND", "Dx", "N", "E"])
    for script, expected, finish in [
        ([0, 1, 2, 0], "abc", "stop"),  # ab cE|ND ab
        ([0, 1, 4, 3, 0], "abc", "stop"),  # ab cE|N|Dx: the x after the stop is gone, too
        ([0, 1, 4, 0, 1], "abcENabcE", "length"),
        ([1, 1, 4, 3], "cEc", "stop"),
        ([5, 1, 5, 2], "EcE", "stop"),
    ]:
        completions: list[Completion] = []
        pieces = [
            piece
            for _, piece in stream(
                Scripted(script, 6),
                tokenizer,
                ["?"],
                max_new_tokens=len(script),
                sampling=GREEDY,
                stop=["END"],
                completions=completions,
            )
        ]
        assert "".join(pieces) == completions[0].text == expected
        assert completions[0].finish == finish


def cut(text: str, stop: Sequence[str]) -> str:
    """The definition: at the first moment that any stop sequence is complete, cut before the earliest."""
    for end in range(1, len(text) + 1):
        found = [text[:end].find(s) for s in stop if s in text[:end]]
        if found:
            return text[: min(found)]
    return text


@pytest.mark.parametrize("seed", range(30))
def test_random_stop_sequences_cut_where_they_should(seed):
    generator = torch.Generator().manual_seed(seed)

    def word(length: int) -> str:
        return "".join("abc"[i] for i in torch.randint(0, 3, (length,), generator=generator).tolist())

    text, stop = word(40), [word(2 + seed % 4), word(4), word(5)]
    pieces, completion = pieces_of(text, stop=stop)
    assert "".join(pieces) == completion.text == cut(text, stop)
    assert completion.finish == ("stop" if any(s in text for s in stop) else "length")


def test_the_end_of_text_token_ends_it_and_is_not_shown():
    tokenizer = ByteTokenizer()
    script = [*tokenizer.encode("abé")[:-1], tokenizer.eos_id, *tokenizer.encode("no more")]
    (completion,) = generate(Scripted(script, 257), tokenizer, [""], max_new_tokens=20, sampling=GREEDY)
    assert completion == Completion("ab\ufffd", script[:3], "stop")


def test_a_held_beginning_of_a_stop_sequence_is_shown_at_the_end_of_text():
    tokenizer = ByteTokenizer()
    script = [*tokenizer.encode("the en"), tokenizer.eos_id]
    (completion,) = generate(Scripted(script, 257), tokenizer, [""], max_new_tokens=20, sampling=GREEDY, stop=["end"])
    assert completion.text == "the en" and completion.finish == "stop"


# ----------------------------------------------------------------------------------------- prompts


def test_an_empty_prompt_starts_a_new_document():
    model = make(vocab_size=257)
    (completion,) = generate(model, ByteTokenizer(), [""], max_new_tokens=4, sampling=GREEDY)
    decoding = Decoding(model, [[256]], sampling=GREEDY, seed=0, max_new_tokens=4)
    assert completion.tokens == [decoding.step()[0] for _ in completion.tokens]
    begun = generate(model, ByteTokenizer(), ["ab"], max_new_tokens=4, sampling=GREEDY)[0]
    decoding = Decoding(model, [[256, 97, 98]], sampling=GREEDY, seed=0, max_new_tokens=4)
    assert begun.tokens == [decoding.step()[0] for _ in begun.tokens]
    lines = CharTokenizer(["\n", "a"])  # no end-of-text token: a document starts at a new line
    model = make(vocab_size=2)
    assert generate(model, lines, [""], max_new_tokens=4)[0] == generate(model, lines, ["\n"], max_new_tokens=4)[0]


def test_no_prompts_give_no_completions():
    assert generate(make(), LETTERS, []) == []


def test_a_single_text_is_a_prompt():
    model = make()
    assert model.generate(LETTERS, "fox", max_new_tokens=6) == model.generate(LETTERS, ["fox"], max_new_tokens=6)
    pieces = list(model.stream(LETTERS, "fox", max_new_tokens=6))
    assert "".join(pieces) == model.generate(LETTERS, "fox", max_new_tokens=6)[0].text


@pytest.mark.parametrize(
    "request_",
    [
        {"max_new_tokens": 0},
        {"temperature": -0.1},
        {"top_k": -1},
        {"top_p": 0.0},
        {"min_p": 1.5},
        {"repetition_penalty": 0.0},
        {"stop": ["end", ""]},
    ],
    ids=str,
)
def test_impossible_requests_are_refused(request_):
    with pytest.raises(GenerationError) as caught:
        make().generate(LETTERS, "fox", **request_)
    assert caught.value.where and caught.value.expected


def test_what_has_no_tokenizer_writes_nothing(tmp_path):
    archive = nl.load(nl.save(tmp_path / "m.nemolet", model=make()))
    with pytest.raises(GenerationError, match="no tokenizer to write with") as caught:
        archive.model.generate(archive.tokenizer, "fox")
    assert "tokenizer.json" in caught.value.fix


def test_a_token_outside_the_vocabulary_is_refused():
    with pytest.raises(GenerationError, match="outside the vocabulary") as caught:
        make(vocab_size=10).generate(LETTERS, ["abc", "xyz"])
    assert caught.value.where == "prompt 1" and caught.value.fix
    for rows in ([[1, -1]], [[1], []]):
        with pytest.raises(GenerationError):
            Decoding(make(), rows, sampling=GREEDY, seed=0, max_new_tokens=1)


def test_unequal_prompts_need_a_model_that_knows_padding():
    with pytest.raises(GenerationError, match="padding") as caught:
        generate(Scripted([0], LETTERS.vocab_size), LETTERS, ["a", "abc"], sampling=GREEDY)
    assert caught.value.fix


# ------------------------------------------------------------------------------------------ chance


def test_the_seed_decides():
    model = make()
    first = model.generate(LETTERS, ["fox", "fox"], max_new_tokens=30, seed=3)
    assert model.generate(LETTERS, ["fox", "fox"], max_new_tokens=30, seed=3) == first
    assert first[0] != first[1], "two rows with one prompt draw different texts"
    assert model.generate(LETTERS, "fox", max_new_tokens=30, seed=4)[0] == first[1]
    state = torch.get_rng_state()
    model.generate(LETTERS, "fox", max_new_tokens=3)
    assert torch.equal(torch.get_rng_state(), state), "the global generator is left alone"


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(temperature=0.5), Sampling(top_k=3), Sampling(top_p=0.7)], ids=str
)
def test_tokens_come_as_often_as_they_should(sampling):
    logits_V, rows = torch.tensor([2.0, 1.0, 0.0, 0.5, -1.0]), 3000
    decoding = Decoding(Fixed(logits_V), [[0]] * rows, sampling=sampling, seed=0, max_new_tokens=1)
    counts = Counter(decoding.step().values())
    probs_V = (logits_V / sampling.temperature).softmax(-1)
    kept = range(5)
    if sampling.top_k:
        kept = probs_V.topk(sampling.top_k).indices.tolist()
    elif sampling.top_p < 1:
        kept = [0, 1]  # 0.59 + 0.22 is the first sum above 0.7
    mass = sum(probs_V[token].item() for token in kept)
    expected = {token: rows * probs_V[token].item() / mass for token in kept}
    assert set(counts) <= set(kept)
    chi_squared = sum((counts[token] - n) ** 2 / n for token, n in expected.items())
    assert chi_squared < 18.5  # 0.1 % of honest draws exceed it with four degrees of freedom


# --------------------------------------------------------------------------------- the model's mode


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(training):
    model = make().train(training)
    model.graph.embed.train(not training)  # as for a part that is frozen
    before = [module.training for module in model.modules()]
    during: list[bool] = []
    model.register_forward_pre_hook(lambda module, _: during.append(any(m.training for m in module.modules())))
    model.generate(LETTERS, "fox", max_new_tokens=2)
    unfinished = model.stream(LETTERS, "fox", max_new_tokens=5)
    next(unfinished)
    unfinished.close()
    assert not any(during)
    assert [module.training for module in model.modules()] == before
    assert all(parameter.grad is None and not parameter.is_inference() for parameter in model.parameters())


def test_generation_under_autocast_and_in_half_precision():
    model = make().float()
    with torch.autocast("cpu", torch.bfloat16):
        assert len(texts(model, PROMPTS, max_new_tokens=5)) == 4
    assert len(texts(model.bfloat16(), PROMPTS, max_new_tokens=5)) == 4


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_only_tokens_of_the_tokenizer_are_chosen(temperature):
    model = make(vocab_size=500)
    sampling = Sampling(temperature=temperature)
    (done,) = generate(model, LETTERS, ["abc"], max_new_tokens=30, sampling=sampling)
    assert len(done.tokens) == 30
    assert max(done.tokens) < LETTERS.vocab_size


def test_an_empty_prompt_begins_somewhere():
    (done,) = generate(make(), LETTERS, [""], max_new_tokens=3, sampling=GREEDY)
    assert len(done.text) == 3


def test_a_seed_beyond_what_a_generator_takes_is_refused():
    with pytest.raises(GenerationError, match="seed"):
        generate(make(), LETTERS, ["a"], seed=10**20)


def test_a_prompt_longer_than_the_context_is_refused_or_its_end_is_read():
    model, long = make(context=8), "abcdefghijkl"
    fits = long[-7:]  # and the opener, if there is one
    with pytest.raises(GenerationError, match="longer than the model can read") as caught:
        generate(model, LETTERS, ["ab", long], max_new_tokens=3)
    assert (caught.value.where, caught.value.expected) == ("prompt 1", "at most 8 tokens")
    assert "truncate=true" in caught.value.fix
    with pytest.raises(GenerationError, match="longer than the model can read"):
        list(model.stream(LETTERS, long))
    assert len(model.generate(LETTERS, long, max_new_tokens=3, truncate=True)[0].tokens) == 3
    assert len(generate(model, LETTERS, [fits], max_new_tokens=9)[0].tokens) == 9


def test_a_prompt_may_hold_tokens_that_are_never_chosen():
    """A model may have more rows than its tokenizer has tokens."""
    scores_BV = GenerationRules(repetition_penalty=2.0).bound(torch.ones(1, 3), [([1, 7], 2, 9)])
    assert scores_BV.tolist() == [[1.0, 0.5, 1.0]]
