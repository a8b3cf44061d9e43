"""Whisper from a folder: features, greedy tokens and texts are those of transformers."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import nemolet as nl
from nemolet.cli import main
from nemolet.convert import write
from nemolet.errors import GenerationError
from nemolet.language import GenerationRules
from nemolet.speech import PromptTokens, WhisperMel, Writer
from nemolet.speech.whisper_times import Times

from .tiny_models import WHISPER, shaken

transformers = pytest.importorskip("transformers", reason="transformers is the reference")
tokenizers = pytest.importorskip("tokenizers", reason="the folder needs a tokenizer")
soundfile = pytest.importorskip("soundfile")

LETTERS = [chr(97 + i % 26) + ("" if i < 26 else str(i // 26)) for i in range(80)]
MARKS = ["<pad>", "<|startoftranscript|>", "<|endoftext|>", "<|en|>", "<|de|>"]
MARKS += ["<|transcribe|>", "<|translate|>"]
FRAMES = 200  # of a part: two seconds
RULES = {
    "is_multilingual": True,
    "lang_to_id": {"<|en|>": 3, "<|de|>": 4},
    "task_to_id": {"transcribe": 5, "translate": 6},
    "no_timestamps_token_id": 95,  # what comes after it are times
    "suppress_tokens": [0, 1, 3, 4, 5, 6, *range(87, 96)],
    "begin_suppress_tokens": [2, 20],
    "max_length": 40,
    "decoder_start_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "return_timestamps": False,
}


TIMES = range(96, 197)  # of two seconds, in steps of 0.02


def recordings():
    generator = np.random.default_rng(0)
    found = []
    for size in (28800, 9000):
        tone = np.sin(np.cumsum(generator.uniform(0.05, 1.5, 12).repeat(2400)))[:size]
        found.append((0.3 * tone + 0.01 * generator.standard_normal(size)).astype(np.float32))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("whisper")
    torch.manual_seed(0)
    config = transformers.WhisperConfig(**{**WHISPER, "max_source_positions": FRAMES // 2})
    model = shaken(transformers.WhisperForConditionalGeneration(config))
    model.generation_config = transformers.GenerationConfig(**RULES)
    model.save_pretrained(path)
    vocabulary = {text: i for i, text in enumerate([*MARKS, *LETTERS])} | {"<|notimestamps|>": 95}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.add_special_tokens([*MARKS, "<|notimestamps|>"])
    words.save(str(path / "tokenizer.json"))
    return path


@pytest.mark.parametrize(("bins", "seconds"), [(80, 30), (128, 30), (10, 2)])
def test_features_are_theirs(bins, seconds):
    extractor = transformers.WhisperFeatureExtractor(feature_size=bins, chunk_length=seconds)
    audio = recordings()
    expected = torch.from_numpy(np.stack([extractor(part, sampling_rate=16000).input_features[0] for part in audio]))
    features = WhisperMel(frames=100 * seconds, bins=bins)
    found = torch.cat([features(torch.from_numpy(part)[None]) for part in audio])
    torch.testing.assert_close(found, expected.transpose(1, 2), rtol=0, atol=2e-5)
    assert expected.std() > 0.1


@pytest.mark.parametrize(("language", "task"), [("en", "transcribe"), ("de", "translate"), (None, "transcribe")])
@torch.no_grad()
def test_tokens_are_those_of_generate(folder, language, task):
    theirs = transformers.WhisperForConditionalGeneration.from_pretrained(folder).eval()
    extractor = transformers.WhisperFeatureExtractor(feature_size=10, chunk_length=2)
    audio = recordings()
    features = torch.cat([extractor(part, sampling_rate=16000, return_tensors="pt").input_features for part in audio])
    options = {} if language is None else {"language": language}
    found = theirs.generate(features, task=task, num_beams=1, do_sample=False, max_new_tokens=20, **options)
    archive = nl.load(folder)
    rules = replace(archive.model.generation, max_new=20)
    writer = Writer(archive.model, archive.tokenizer, language=language, task=task, rules=rules)
    written = [found.tokens for found in writer.write([torch.from_numpy(part) for part in audio])]
    expected = [[t for t in row if t not in (0, 2)] for row in found.tolist()]
    expected = [row[4:] if row[:1] == [1] else row for row in expected]  # some versions tell the prompt as well
    assert written == expected
    assert len(set(written[0])) > 1 and written[0] != written[1]


@torch.no_grad()
def test_as_many_tokens_are_written_as_theirs(folder):
    """Their ``max_length`` counts tokens after the prompt, as long as the model has room."""
    theirs = transformers.WhisperForConditionalGeneration.from_pretrained(folder).eval()
    theirs.generation_config.suppress_tokens = [*RULES["suppress_tokens"], 2]  # it never ends by itself
    theirs.generation_config.begin_suppress_tokens = None
    archive = nl.load(folder)
    extractor = transformers.WhisperFeatureExtractor(feature_size=10, chunk_length=2)
    features = extractor(recordings()[0], sampling_rate=16000, return_tensors="pt").input_features
    rules = archive.model.generation
    for longest in (9, 64):
        theirs.generation_config.max_length = longest
        found = theirs.generate(features, language="en", task="transcribe", num_beams=1, do_sample=False)[0].tolist()
        own = replace(rules, max_length=longest, never=(*rules.never, 2), not_first=())
        writer = Writer(archive.model, archive.tokenizer, language="en", rules=own)
        [written] = writer.write([torch.from_numpy(recordings()[0])])
        assert written.tokens == (found[4:] if found[0] == 1 else found)


@torch.no_grad()
def test_it_obeys_the_rules_of_every_writer(folder):
    theirs = transformers.WhisperForConditionalGeneration.from_pretrained(folder).eval()
    archive = nl.load(folder)
    extractor = transformers.WhisperFeatureExtractor(feature_size=10, chunk_length=2)
    features = extractor(recordings()[0], sampling_rate=16000, return_tensors="pt").input_features
    asked = {"language": "en", "task": "transcribe", "num_beams": 1, "do_sample": False, "max_new_tokens": 20}
    plain = Writer(archive.model, archive.tokenizer, language="en")
    before = plain.write([torch.from_numpy(recordings()[0])])[0].tokens[:20]
    for theirs_say, ours_say in (
        ({"repetition_penalty": 3.0}, {"repetition_penalty": 3.0}),
        ({"no_repeat_ngram_size": 2}, {"no_repeat": 2}),
        ({"bad_words_ids": [[before[1]], [before[0], 21]]}, {"forbidden": ((before[1],), (before[0], 21))}),
    ):
        found = theirs.generate(features, **asked, **theirs_say)[0].tolist()
        rules = replace(archive.model.generation, max_new=20, **ours_say)
        [written] = Writer(archive.model, archive.tokenizer, language="en", rules=rules).write(
            [torch.from_numpy(recordings()[0])]
        )
        expected = [token for token in (found[4:] if found[0] == 1 else found) if token not in (0, 2)]
        assert written.tokens == expected and written.tokens != before


def test_what_it_can_be_told_is_kept_and_written_back(timed, tmp_path):
    told = PromptTokens({"en": 3, "de": 4}, {"transcribe": 5, "translate": 6}, no_times=95, latest=20)
    archive = nl.load(timed)
    again = nl.load(nl.save(tmp_path / "w.nemolet", model=archive.model))
    assert archive.model.prompt == again.model.prompt == told
    assert archive.model.generation == again.model.generation
    same = write(tmp_path / "same", model=archive.model, tokenizer=archive.tokenizer, extra=archive.extra)
    name = "generation_config.json"
    assert (same / name).read_bytes() == (timed / name).read_bytes()
    bare = nl.load(write(tmp_path / "bare", model=again.model))  # from the arguments of the model alone
    assert bare.model.prompt == told and bare.model.generation == archive.model.generation


@pytest.fixture(scope="module")
def timed(tmp_path_factory):
    """A model that writes times among its texts."""
    path = tmp_path_factory.mktemp("timed")
    torch.manual_seed(0)
    config = transformers.WhisperConfig(**{**WHISPER, "max_source_positions": FRAMES // 2, "vocab_size": TIMES.stop})
    model = shaken(transformers.WhisperForConditionalGeneration(config))
    with torch.no_grad():
        model.model.decoder.embed_tokens.weight[: TIMES.start] *= 3
    model.generation_config = transformers.GenerationConfig(**RULES, max_initial_timestamp_index=20)
    model.save_pretrained(path)
    vocabulary = {text: i for i, text in enumerate([*MARKS, *LETTERS])} | {"<|notimestamps|>": 95}
    vocabulary |= {f"<|{0.02 * step:.2f}|>": TIMES.start + step for step in range(len(TIMES))}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.add_special_tokens([*MARKS, "<|notimestamps|>"])
    words.save(str(path / "tokenizer.json"))
    return path


@pytest.mark.parametrize("latest", [None, 20])
def test_times_stand_where_theirs_may(latest):
    rules = transformers.GenerationConfig(**RULES, max_initial_timestamp_index=latest)
    theirs = transformers.WhisperTimeStampLogitsProcessor(rules, begin_index=1)
    times = Times(first=96, plain=95, end=2, latest=latest)
    torch.manual_seed(0)
    rows = [[], [96], [99, 8], [99, 8, 120], [99, 8, 120, 120], [99, 8, 120, 120, 9], [99, 99], [8], [196, 8, 196]]
    for tokens in rows:
        logits = torch.randn(40, TIMES.stop) * torch.linspace(1, 6, 40)[:, None]
        logits[:20, :96] += 4
        expected = theirs(torch.tensor([[1, *tokens]] * 40), logits.clone())
        times.bound(logits, [tokens] * 40)
        assert torch.equal(logits, expected)


def test_no_segment_ends_after_the_recording():
    times = Times(first=10, plain=9, end=8)
    for tokens in ([10, 1, 25], [10, 1, 25, 25, 2, 27], [10, 1, 25, 25, 2], [10, 1, 12, 13, 2, 14], [1]):
        found, stop = times.segments(tokens, 3)
        end = 2 if tokens[2:3] == [12] else 3
        assert found == [(0, end, [1], 0)] and stop is None, tokens
    assert times.segments([10, 1, 12, 12, 2, 15, 15, 3], 3) == ([(0, 2, [1], 0), (2, 3, [2], 3)], None)
    assert times.segments([10, 1, 12, 12, 2], 3) == ([(0, 2, [1], 0)], 2)


@pytest.mark.parametrize("language", ["de", None])
@torch.no_grad()
def test_segments_of_long_audio_are_those_of_generate(timed, language):
    """Theirs reads zeros behind a recording where ours reads silence, so silence is part of it, and is not compared."""
    theirs = transformers.WhisperForConditionalGeneration.from_pretrained(timed).eval()
    extractor = transformers.WhisperFeatureExtractor(feature_size=10, chunk_length=2)
    audio = np.concatenate([*recordings(), *(part[::-1] for part in recordings()), np.zeros(32000, np.float32)])
    features = extractor(audio, sampling_rate=16000, truncation=False, padding="longest", return_tensors="pt")
    options = {} if language is None else {"language": language}
    found = theirs.generate(
        features.input_features, task="transcribe", return_timestamps=True, return_segments=True, **options
    )
    expected = [
        (round(float(s["start"]), 2), round(float(s["end"]), 2), [t for t in s["tokens"].tolist() if t < 95])
        for s in found["segments"][0]
    ]
    archive = nl.load(timed)
    writer = Writer(archive.model, archive.tokenizer, language=language)
    short = torch.from_numpy(recordings()[1])
    alone, [_, long] = (
        writer.transcribe([torch.from_numpy(audio)])[0],
        writer.transcribe([short, torch.from_numpy(audio)]),
    )
    own = [(round(s.start, 2), round(s.end, 2), s.text) for s in alone.segments]
    inside = [s for s in expected if s[1] <= len(audio) / 16000 - 2 and archive.tokenizer.decode(s[2])]
    assert own[: len(inside)] == [(start, end, archive.tokenizer.decode(tokens)) for start, end, tokens in inside]
    assert len(inside) > 3 and len({end for _, end, _ in inside}) > 3
    assert alone.text.startswith(" ".join(text for *_, text in own[: len(inside)]))
    assert [s.text for s in long.segments] == [s.text for s in alone.segments]


def test_a_folder_transcribes_audio(timed, tmp_path, capsys):
    audio = recordings()
    for name, samples in zip("ab", audio):
        soundfile.write(tmp_path / f"{name}.wav", samples, 16000)
    soundfile.write(tmp_path / "long.wav", np.concatenate((np.pad(audio[0], (0, 3200)), audio[1])), 16000)
    archive = tmp_path / "w.nemolet"
    assert main(["convert", f"from={timed}", f"to={archive}"]) == 0
    capsys.readouterr()
    found = []
    for source in (timed, archive):
        assert main(["transcribe", f"archive={source}", f"audio={tmp_path}/*.wav", "language=en", "format=json"]) == 0
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line]
        found.append([(line["text"], line["segments"]) for line in lines])
        assert [line["duration"] for line in lines] == [1.8, 0.5625, 2.5625]
    assert found[0] == found[1] and all(text and segments for text, segments in found[0])
    assert main(["transcribe", f"archive={timed}", f"audio={tmp_path}/long.wav", "language=en", "format=srt"]) == 0
    lines = capsys.readouterr().out.split("\n")
    segments = found[0][2][1]
    assert lines[2] == segments[0]["text"] and lines[1].startswith(f"00:00:{int(segments[0]['start']):02}")
    assert len([line for line in lines if "-->" in line]) == len(segments)


def test_what_whisper_cannot_do_is_refused(folder, tmp_path, capsys):
    soundfile.write(tmp_path / "a.wav", recordings()[0], 16000)
    for setting in ("beam=4", "stream=0.5", "language=xx"):
        assert main(["transcribe", f"archive={folder}", f"audio={tmp_path}/a.wav", setting]) == 2
        assert setting.partition("=")[0] in capsys.readouterr().err
    archive = nl.load(folder)
    writer = Writer(archive.model, archive.tokenizer)
    with pytest.raises(GenerationError, match="writes no times"):
        writer.transcribe([torch.zeros(32001)])
    with pytest.raises(GenerationError, match="begins and ends"):
        Writer(archive.model, archive.tokenizer, rules=GenerationRules())
