"""What most often goes wrong with recognizers: labels that do not fit, and nothing but blanks."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nemolet.data.audio_corpus import PreparedAudio
from nemolet.data.inspection import Usable
from nemolet.errors import DataError
from nemolet.metrics import Share
from nemolet.module import NeuralModule
from nemolet.speech.losses import label_lengths
from nemolet.types import LengthsB, LogitsBTV

if TYPE_CHECKING:
    from nemolet.speech.models import Recognizer

COLLAPSED = 0.995  # share of blanks from which on nothing is written


class BlankShare(NeuralModule):
    """How many frames are blank; a metric of CTC that says whether anything is written (final).

    Shape: logits_BTV, lengths_B -> scalar, scalar.

    Example:
        >>> share = BlankShare()(torch.eye(3)[None], torch.tensor([3]))
        >>> share.part.item(), share.whole.item()
        (1, 3)
    """

    def forward(self, logits: LogitsBTV, lengths: LengthsB) -> Share:
        valid_BT = torch.arange(logits.shape[1], device=lengths.device) < lengths[:, None]
        blank_BT = logits.argmax(-1) == logits.shape[-1] - 1
        return Share((blank_BT & valid_BT).sum(), valid_BT.sum())


def frames_needed(labels: list[int]) -> int:
    """Frames that CTC needs: one for each label, and a blank between two that are equal.

    Example:
        >>> frames_needed([3, 3, 4])
        4
    """
    return len(labels) + sum(one == other for one, other in itertools.pairwise(labels))


def frames_given(model: Recognizer, samples: int) -> int:
    """Frames of scores that so many samples become."""
    return model.encoder.frames(model.front_end.features.framing.count(samples))


def refuse_misfits(model: Recognizer, data: Any) -> None:
    """Refuse data with utterances that have more labels than frames: CTC has no alignment for them.

    Utterances that are joined anew in every epoch are refused if any way to join them may have too many.

    Args:
        model: writes by CTC.
        data: prepared recordings with texts; others are not looked at.

    Raises:
        DataError: naming each utterance with its place in the manifest.
    """
    if not isinstance(data, PreparedAudio) or data.tokenizer is None:
        return
    frame = model.samples_per_frame / model.sample_rate
    if data.corpus.join is not None:
        misfits = [*_joined_misfits(data.train, data, frame), *_joined_misfits(data.valid, data, frame)]
    else:
        misfits = []
        for each in (*data.train, *data.valid):
            needed = frames_needed(data.tokenizer.encode(each.utterance.text or ""))
            given = frames_given(model, round(each.seconds * model.sample_rate))
            if needed > given:
                misfits.append(f"{each.utterance.where}: {needed} labels in {given} frames ({each.seconds:.2f} s)")
    if misfits:
        raise DataError(
            f"{len(misfits)} utterances have more labels than the encoder gives frames",
            where="data.path",
            found="\n".join([*misfits[:20], *(["..."] if len(misfits) > 20 else [])]),
            expected=f"at least one frame of {frame:.3f} s for each label",
            fix="set model.encoder.factor lower, use longer tokens (tokenizer=sentencepiece), "
            "leave the utterances out, or train a transducer",
        )


def _joined_misfits(usable: Sequence[Usable], data: PreparedAudio, frame: float) -> list[str]:
    """The utterances of the worst way to join some of one speaker, where their labels do not fit."""
    assert data.tokenizer is not None and data.corpus.join is not None
    encode, most = data.tokenizer.encode, data.corpus.join[1]
    alone = {text: frames_needed(encode(text)) for text in {each.utterance.text or "" for each in usable}}
    # What stands between two texts: a space, or the blank between equal labels; less what a pause gives.
    labels = max((frames_needed(encode(f"{text} {text}")) - 2 * alone[text] for text in alone), default=0)
    between = labels - data.corpus.pause[0] / frame
    speakers: dict[str, list[tuple[float, Usable]]] = {}
    for each in usable:
        lacking = alone[each.utterance.text or ""] - each.seconds / frame
        speakers.setdefault(each.utterance.speaker or "", []).append((lacking, each))
    misfits = []
    for parts in speakers.values():
        worst = sorted(parts, key=lambda part: -part[0])[:most]
        sums = itertools.accumulate(lacking + between for lacking, _ in worst)
        if max(sums) - between > 0:
            misfits += [
                f"{each.utterance.where}: {alone[each.utterance.text or '']} labels in {each.seconds / frame:.1f} "
                f"frames ({each.seconds:.2f} s), joined with others of few frames"
                for _, each in worst
            ]
    return misfits


def probable_cause(batch: Mapping[str, Tensor], *, frames_B: Tensor, step: int, gradient_norm: float | None) -> str:
    """Why a model may write nothing but blanks, the likeliest reason first.

    Args:
        batch: audio (or a spectrogram) and labels of a training step.
        frames_B: frames of scores of each row.
        step: optimizer steps so far.
        gradient_norm: of the last step, before clipping; None where unknown.
    """
    heard = batch["audio"] if "audio" in batch else batch["spectrogram"]
    targets_B = label_lengths(batch["labels"])
    ratio = float((targets_B / frames_B.clamp(min=1)).mean())
    if not float(heard.abs().max()) > 1e-4:
        return "the audio is silent; look at the files, and at their channels"
    if int(targets_B.sum()) == 0:
        return "the labels are empty; look at text_key and the tokenizer"
    if ratio > 0.7:
        return (
            f"there are {ratio:.2f} labels for each frame, so there is hardly room for them; set encoder.factor lower, "
            "or use longer tokens"
        )
    if gradient_norm is not None and gradient_norm < 1e-3:
        return f"the gradient is almost zero ({gradient_norm:.1e}); raise optim.lr, or shorten schedule.warmup_steps"
    if step < 500:
        return f"CTC begins so, and {step} steps are few; wait, and look whether the loss still falls"
    return (
        "the learning rate is too high for this model (halve optim.lr, lengthen the warm-up), or texts and "
        "recordings do not belong together; `nemolet overfit` shows whether one batch can be learned"
    )
