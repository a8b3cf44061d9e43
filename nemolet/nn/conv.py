"""Convolutions over time that declare the axes of their weights."""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemolet.errors import ShapeError
from nemolet.module import NeuralModule
from nemolet.types import Axis, Hidden, NeuralType

HiddenBTI = Annotated[Tensor, NeuralType("B T I", Hidden())]
PastBUI = Annotated[Tensor, NeuralType("B U I", Hidden())]
HiddenBSO = Annotated[Tensor, NeuralType("B S O", Hidden())]
PlaneBITX = Annotated[Tensor, NeuralType("B I T Any", Hidden())]
PlaneBOSX = Annotated[Tensor, NeuralType("B O S Any", Hidden())]


class Conv1d(NeuralModule):
    """A convolution over time (final).

    Zeros stand before and after, so that T becomes T / stride, rounded up.

    Args:
        in_axis: letter of the input axis.
        out_axis: letter of the output axis.
        in_size: its size.
        out_size: its size.
        kernel: frames that an output sees.
        stride: frames from one output to the next.
        dilation: frames between two that an output sees.
        depthwise: each channel has a filter of its own; sizes are equal then.
        causal: an output sees no later frame.
        bias: whether a vector is added.
        padded: whether zeros are added; without them only whole kernels count.

    Shape: ``B T I -> B S O``; weight ``O I kernel``, or ``O 1 kernel`` where depthwise; bias ``O``.

    Example:
        >>> Conv1d("D", "D", 4, 8, kernel=3, stride=2)(torch.zeros(1, 5, 4)).shape
        torch.Size([1, 3, 8])
    """

    def __init__(
        self,
        in_axis: str,
        out_axis: str,
        in_size: int,
        out_size: int,
        *,
        kernel: int,
        stride: int = 1,
        dilation: int = 1,
        depthwise: bool = False,
        causal: bool = False,
        bias: bool = True,
        padded: bool = True,
    ) -> None:
        super().__init__(I=Axis(in_axis, in_size), O=Axis(out_axis, out_size))
        _check_kernel(kernel, stride, in_size, out_size, depthwise, causal or not padded)
        self.stride, self.dilation, self.groups = stride, dilation, in_size if depthwise else 1
        reach = dilation * (kernel - 1) if padded else 0
        self.padding = (reach, 0) if causal else (reach // 2, reach - reach // 2)
        fan_in = kernel * (1 if depthwise else in_size)
        self.weight = nn.Parameter(torch.empty(out_size, fan_in // kernel, kernel).normal_(std=fan_in**-0.5))
        self.bias = nn.Parameter(torch.zeros(out_size)) if bias else None
        inputs = "1" if depthwise else f"{in_axis}={in_size}"
        self.declare_axes(weight=f"{out_axis}={out_size} {inputs} {kernel}", bias=f"{out_axis}={out_size}")

    def forward(self, hidden: HiddenBTI, past: PastBUI | None = None) -> HiddenBSO:
        before, after = self.padding
        if past is not None:  # the frames before these, where a stream goes on
            hidden, before = torch.cat((past, hidden), 1), 0
        channels_BIT = F.pad(hidden.transpose(1, 2), (before, after))
        mixed = F.conv1d(channels_BIT, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)
        return mixed.transpose(1, 2)


class Conv2d(NeuralModule):
    """A square convolution over time and features (final).

    Args:
        in_axis: letter of the input channels.
        out_axis: letter of the output channels.
        in_size: their number.
        out_size: their number.
        kernel: along both axes.
        stride: along both axes, or along time and along features.
        depthwise: each channel has a filter of its own.
        causal: an output sees no later frame.

    Shape: ``B I T X -> B O S X'``; weight ``O I kernel kernel``.

    Example:
        >>> Conv2d("C", "C", 1, 4, kernel=3, stride=2)(torch.zeros(1, 1, 5, 8)).shape
        torch.Size([1, 4, 3, 4])
    """

    def __init__(
        self,
        in_axis: str,
        out_axis: str,
        in_size: int,
        out_size: int,
        *,
        kernel: int,
        stride: int | tuple[int, int] = 1,
        depthwise: bool = False,
        causal: bool = False,
    ) -> None:
        super().__init__(I=Axis(in_axis, in_size), O=Axis(out_axis, out_size))
        self.stride = (stride, stride) if isinstance(stride, int) else tuple(stride)
        _check_kernel(kernel, min(self.stride), in_size, out_size, depthwise, causal)
        self.groups = in_size if depthwise else 1
        reach = kernel - 1
        sides = (reach // 2, reach - reach // 2)
        self.padding = (*sides, *((reach, 0) if causal else sides))
        inputs = 1 if depthwise else in_size
        std = (inputs * kernel * kernel) ** -0.5
        self.weight = nn.Parameter(torch.empty(out_size, inputs, kernel, kernel).normal_(std=std))
        self.bias = nn.Parameter(torch.zeros(out_size))
        channels = "1" if inputs == 1 else f"{in_axis}={in_size}"
        self.declare_axes(weight=f"{out_axis}={out_size} {channels} {kernel} {kernel}", bias=f"{out_axis}={out_size}")

    def forward(self, plane: PlaneBITX) -> PlaneBOSX:
        padded = F.pad(plane, self.padding)
        return F.conv2d(padded, self.weight, self.bias, self.stride, groups=self.groups)


def _check_kernel(kernel: int, stride: int, in_size: int, out_size: int, depthwise: bool, causal: bool) -> None:
    if kernel < 1 or stride < 1 or (kernel % 2 == 0 and not causal):
        raise ShapeError(
            "the kernel is impossible",
            where="kernel, stride",
            expected="an odd kernel (or a causal one), and a stride of at least 1",
            found=f"kernel={kernel}, stride={stride}",
            fix=f"set kernel={max(1, kernel + 1 - kernel % 2)}",
        )
    if depthwise and in_size != out_size:
        raise ShapeError(
            "a depthwise convolution keeps its channels",
            where="out_size",
            expected=in_size,
            found=out_size,
            fix="follow it by a Linear layer",
        )
