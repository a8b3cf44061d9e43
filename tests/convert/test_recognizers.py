"""Recognizers of a waveform from a folder: texts are those of their processor, and trained ones go back."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import nemolet as nl
from nemolet.cli import main
from nemolet.convert import read, write
from nemolet.errors import ConversionError, TokenizerError
from nemolet.speech.transcription import transcribe
from nemolet.tokenizers import CharTokenizer, LetterTokenizer

from .test_whisper import recordings
from .tiny_models import LARGE, WAVE, shaken

transformers = pytest.importorskip("transformers", reason="transformers is the reference")
soundfile = pytest.importorskip("soundfile")

LETTERS = ["<unk>", "a", "b", "c", "<s>", "<pad>", "|", "'", "d"]
NEVER = [0, 4]  # what no trained model writes


def processor_of(tmp_path, *, letters=LETTERS, mask=True, lower=False, normalize=True):
    path = tmp_path / "vocab.json"
    path.write_text(json.dumps({letter: index for index, letter in enumerate(letters)}))
    tokenizer = transformers.Wav2Vec2CTCTokenizer(str(path), do_lower_case=lower, eos_token="<s>")
    extractor = transformers.Wav2Vec2FeatureExtractor(return_attention_mask=mask, do_normalize=normalize)
    return transformers.Wav2Vec2Processor(feature_extractor=extractor, tokenizer=tokenizer)


def saved(tmp_path, *, options=None, **settings):
    """A folder, with what transformers makes of it."""
    processor = processor_of(tmp_path, **settings)
    torch.manual_seed(0)
    config = transformers.Wav2Vec2Config(
        **WAVE, **(options or {}), vocab_size=len(LETTERS), pad_token_id=LETTERS.index("<pad>")
    )
    model = shaken(transformers.Wav2Vec2ForCTC(config)).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(8)
        model.lm_head.bias[LETTERS.index("|")] += 6
        model.lm_head.bias[NEVER] = -1e4
    folder = tmp_path / "folder"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder, model, processor


@torch.no_grad()
def their_texts(model, processor, audio):
    """Without what they would write into padding."""
    heard = processor(audio, padding=True, sampling_rate=16000, return_tensors="pt")
    frames = model._get_feat_extract_output_lengths(torch.tensor([len(part) for part in audio]))
    rows = model(**heard).logits.argmax(-1)
    return processor.batch_decode([row[:length] for row, length in zip(rows, frames)])


@pytest.mark.parametrize(
    ("options", "settings"),
    [(LARGE, {}), (LARGE, {"normalize": False}), ({}, {"mask": False}), (LARGE, {"lower": True})],
)
def test_texts_are_those_of_their_processor(tmp_path, options, settings):
    if settings.get("lower"):
        settings = {**settings, "letters": [x if len(x) > 1 else x.upper() for x in LETTERS]}
    folder, model, processor = saved(tmp_path, options=options, **settings)
    audio = [part[:6000] * 0.2 + 0.1 for part in recordings()] + [recordings()[0][:3000]]
    if options:  # whose attention is masked, so that rows may stand together
        expected = their_texts(model, processor, audio)
    else:
        expected = [their_texts(model, processor, [part])[0] for part in audio]
    archive = nl.load(folder)
    found = transcribe(archive.model, archive.tokenizer, [torch.from_numpy(part) for part in audio], batch_size=3)
    assert [transcript.text for transcript in found] == expected
    assert len(set("".join(expected))) > 3 and any(" " in text for text in expected)


def test_the_files_beside_the_weights_come_back(tmp_path):
    folder, _, _ = saved(tmp_path)
    archive = nl.load(folder)
    assert archive.tokenizer.letters == [letter for letter in LETTERS if letter != "<pad>"]
    nl.save(tmp_path / "m.nemolet", model=archive.model, tokenizer=archive.tokenizer, extra=archive.extra)
    again = nl.load(tmp_path / "m.nemolet")
    assert again.tokenizer.fingerprint == archive.tokenizer.fingerprint
    out = write(tmp_path / "out", model=again.model, tokenizer=again.tokenizer, extra=again.extra)
    for name in ("vocab.json", "tokenizer_config.json", "processor_config.json", "config.json"):
        assert (out / name).read_bytes() == (folder / name).read_bytes()
    before, after = (load_file(path / "model.safetensors") for path in (folder, out))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_what_was_made_here_is_heard_there(tmp_path):
    """Without any file of theirs, with another rate and letters of ours: their blank is then the first label."""
    folder, _, _ = saved(tmp_path)
    config = read(folder).model.config()
    config["front_end"]["features"] = {**config["front_end"]["features"], "sample_rate": 8000, "normalized": False}
    config["vocab_size"] = 5
    torch.manual_seed(0)
    model = shaken(nl.config.build(config, where="model")).eval()
    with torch.no_grad():
        model.head.weight.mul_(8)
        model.head.bias[:] = torch.tensor([0.0, 0.0, 4.0, 6.0, 6.0, 0.0])
    letters = CharTokenizer(list("ab cd"))
    out = write(tmp_path / "out", model=model, tokenizer=letters)
    theirs = transformers.Wav2Vec2ForCTC.from_pretrained(out).eval()
    tokenizer = transformers.Wav2Vec2CTCTokenizer.from_pretrained(out)
    extractor = transformers.Wav2Vec2FeatureExtractor.from_pretrained(out)
    assert (theirs.config.pad_token_id, extractor.sampling_rate, extractor.do_normalize) == (0, 8000, False)
    audio = recordings()[1][:4000]
    with torch.no_grad():
        logits = theirs(**extractor(audio, sampling_rate=8000, return_tensors="pt")).logits
    [found] = transcribe(model, letters, [torch.from_numpy(audio)])
    assert [found.text] == tokenizer.batch_decode(logits.argmax(-1)) and len(set(found.text)) > 3
    again = nl.load(out)
    assert transcribe(again.model, again.tokenizer, [torch.from_numpy(audio)])[0].text == found.text


@pytest.mark.parametrize(
    ("letters", "pad"), [("xyz uvwt", 5), ("xyz u", 5), ("xyz", 0)], ids=["as-many", "fewer", "without-place-for-it"]
)
def test_another_vocabulary_takes_the_place_of_theirs(tmp_path, letters, pad):
    """With the files of the old one: neither its letters nor its blank stay where they are not those of the new."""
    folder, _, _ = saved(tmp_path)
    archive, tokenizer = nl.load(folder), CharTokenizer(list(letters))
    extra = {**archive.extra, "added_tokens.json": b'{"q": 9}', "special_tokens_map.json": b'{"pad_token": "[PAD]"}'}
    config = {**archive.model.config(), "vocab_size": len(letters)}
    torch.manual_seed(1)
    model = shaken(nl.config.build(config, where="model")).eval()
    out = write(tmp_path / "out", model=model, tokenizer=tokenizer, extra=extra)
    assert json.loads((out / "config.json").read_text())["pad_token_id"] == pad
    again = nl.load(out)
    assert again.tokenizer.letters == [letter.replace(" ", "|") for letter in letters]
    audio = torch.from_numpy(recordings()[0])
    [expected], [found] = transcribe(model, tokenizer, [audio]), transcribe(again.model, again.tokenizer, [audio])
    assert found.text == expected.text and found.text
    theirs = transformers.Wav2Vec2CTCTokenizer.from_pretrained(out)
    assert theirs.pad_token_id == pad and theirs.decode(range(pad + 1, 1 + len(letters))) == letters[pad:].strip()


def test_special_letters_keep_their_names(tmp_path):
    folder, _, _ = saved(tmp_path)
    tokenizer = LetterTokenizer(["[BOS]", "a", "[UNK]", "b", "|"], special=["[BOS]", "[UNK]"])
    out = write(tmp_path / "out", model=nl.load(folder).model, tokenizer=tokenizer)
    again = nl.load(out).tokenizer
    assert again.fingerprint == tokenizer.fingerprint
    assert json.loads((out / "tokenizer_config.json").read_text())["unk_token"] == "[UNK]"


def test_a_folder_is_finetuned_transcribes_and_goes_back(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder, _, _ = saved(tmp_path)
    lines = []
    for index, (samples, text) in enumerate(zip(recordings() * 3, ["ab", "c d"] * 3)):
        soundfile.write(tmp_path / f"{index}.wav", samples[:8000], 16000)
        lines.append({"audio_filepath": f"{index}.wav", "duration": min(len(samples), 8000) / 16000, "text": text})
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, lines)))
    run = [f"archive={folder}", "data=audio", "data.path=m.jsonl", "data.valid_path=m.jsonl", "loss=ctc"]
    steps = ["trainer.max_steps=12", "schedule.warmup_steps=2", "optim.lr=0.003", "trainer.accelerator=cpu"]
    assert main(["finetune", *run, *steps, "folder=run", "freeze=[encoder.stem.*]"]) == 0, capsys.readouterr().err
    capsys.readouterr()
    assert main(["transcribe", "archive=run/model.nemolet", "audio=0.wav", "format=json"]) == 0
    words = json.loads(capsys.readouterr().out)
    assert main(["convert", "from=run/model.nemolet", "to=out"]) == 0
    trained = transformers.Wav2Vec2ForCTC.from_pretrained("out").eval()
    processor = transformers.Wav2Vec2Processor.from_pretrained("out")
    audio, _ = soundfile.read("0.wav", dtype="float32")
    assert [words["text"]] == their_texts(trained, processor, [np.asarray(audio)])
    before, after = (read(name).model.state_dict() for name in (folder, "out"))
    same = {name for name, tensor in before.items() if torch.equal(tensor, after[name])}
    assert {name for name in before if name.startswith("encoder.stem.")} <= same < before.keys()


def test_what_does_not_fit_is_named(tmp_path):
    folder, _, _ = saved(tmp_path)
    letters = LetterTokenizer(["|", "A"])
    with pytest.raises(TokenizerError, match="not in the model's vocabulary") as caught:
        letters.encode("A a")
    assert "character 2" in str(caught.value) and letters.decode(letters.encode("A A")) == "A A"
    for letters, text, place in ((["A"], "A A", 1), (["A", "S"], "ßé", 1)):  # as the text has it, not the vocabulary
        with pytest.raises(TokenizerError, match=f"character {place}:[\\s\\S]*found +{text[place]!r}"):
            LetterTokenizer(letters, small=True).encode(text)
    assert LetterTokenizer(["S", "|"], small=True).encode("ß s") == [0, 0, 1, 0]
    with pytest.raises(TokenizerError, match="no alphabet"):
        LetterTokenizer(["a", "a"])
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "pad_token_id": 0}))
    with pytest.raises(ConversionError, match="no vocabulary of the recognizer") as caught:
        read(folder)
    assert "0 for <pad>" in str(caught.value)
    (tmp_path / "b").mkdir()
    model = nl.convert.read(saved(tmp_path / "b")[0]).model
    with pytest.raises(ConversionError, match="no counterpart"):
        write(tmp_path / "c", model=model, tokenizer=CharTokenizer(list("ab|c d"), byte_fallback=True))
    with pytest.raises(ConversionError, match="no counterpart"):  # the | would come back as a space
        write(tmp_path / "c", model=model, tokenizer=CharTokenizer(list("ab|")))
    extra = read(tmp_path / "b" / "folder").extra
    with pytest.raises(ConversionError, match=r"pad_token_id: the blank has no place[\s\S]*0 to 3"):
        write(tmp_path / "c", model=model, tokenizer=CharTokenizer(list("abc")), extra=extra)
    with pytest.raises(ConversionError, match="does not fit the model"):
        write(tmp_path / "c", model=model, tokenizer=CharTokenizer(list("abcdefghi")), extra=extra)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("options", [{}, LARGE])
def test_the_encoder_of_pretraining_is_read_without_its_quantizer(tmp_path, options):
    torch.manual_seed(0)
    sizes = {"num_codevectors_per_group": 8, "codevector_dim": 12, "proj_codevector_dim": 10}
    theirs = shaken(transformers.Wav2Vec2ForPreTraining(transformers.Wav2Vec2Config(**WAVE, **options, **sizes))).eval()
    theirs.save_pretrained(tmp_path / "folder")
    assert any(name.startswith("quantizer.") for name in load_file(tmp_path / "folder" / "model.safetensors"))
    archive, audio = nl.load(tmp_path / "folder"), torch.randn(2, 900)
    with torch.no_grad():
        expected = theirs.wav2vec2(audio).last_hidden_state
        torch.testing.assert_close(archive.model(audio[..., None]).hidden, expected, rtol=0, atol=1e-5)
        out = write(tmp_path / "out", model=archive.model, extra=archive.extra)
        assert json.loads((out / "config.json").read_text())["architectures"] == ["Wav2Vec2Model"]
        again = transformers.AutoModel.from_pretrained(out).eval()
        assert torch.equal(again(audio).last_hidden_state, expected)
    with pytest.raises(ConversionError, match="not known"):
        write(tmp_path / "other", model=archive.model, architecture="Wav2Vec2ForPreTraining")


@pytest.mark.parametrize("blank", ["<pad>", -1, [0], 0.5, {}])
def test_a_blank_that_is_no_label_is_named(blank, tmp_path):
    folder, _, _ = saved(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "pad_token_id": blank}))
    with pytest.raises(ConversionError, match="pad_token_id: the blank is none of the labels"):
        nl.load(folder)
