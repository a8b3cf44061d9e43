"""Small trainable additions to the linear layers of a model that is not trained itself: LoRA, DoRA, QLoRA."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemolet.errors import ConfigError
from nemolet.module import NeuralModule
from nemolet.nn.linear import Linear
from nemolet.nn.quantized import check_nf4, nf4, numbers
from nemolet.rules import Checked
from nemolet.types import HiddenRestI, HiddenRestO, format_dims


@dataclass(frozen=True)
class Adapter(Checked):
    """Which layers get an addition, and how large it is.

    Args:
        rank: of the addition.
        alpha: the addition is multiplied by ``alpha / rank``.
        dropout: of what enters the addition, in training.
        targets: patterns of layer names, the whole name or its end; every linear layer that matches one is adapted.
        dora: whether the lengths of rows are learned apart from their directions (Liu et al., 2024).
        quantize: ``"nf4"`` holds the weights of adapted layers in four bits each (QLoRA: Dettmers et al., 2023; extra
            ``quantize``); None as they are.

    Example:
        >>> Adapter(rank=4, alpha=8).scale
        2.0
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = (".*",)
    dora: bool = False
    quantize: Literal["nf4"] | None = None

    CONFIG_RULES = (
        ("rank >= 1", "the rank is at least 1"),
        ("dropout >= 0 and dropout < 1", "dropout is a probability below 1"),
    )

    @property
    def scale(self) -> float:
        """Factor of the addition."""
        return self.alpha / self.rank


class AdaptedLinear(NeuralModule):
    """A linear layer with a trainable addition of low rank (Hu et al., 2021; final).

    At first the addition is zero. Merged, it is part of the weight and costs no time, but the memory of the weight once
    more: it is kept, so that unmerging gives back every bit. The weight may be held in four bits (:meth:`quantize`); it
    is dequantized where it is multiplied with.

    Its parameters lie beside those of the layer, under the names that they had there, so that it is cut over ranks as
    the layer would be.

    Args:
        base: the layer, which gives its parameters away; they are frozen.
        rank: of the addition.
        scale: its factor.
        dropout: of what enters it, in training.
        dora: whether the lengths of rows are learned apart from their directions.

    Shape: ``... I -> ... O``; weight ``O I``, bias ``O``, down ``rank I``, up ``O rank``, lengths ``O``.

    Example:
        >>> layer = AdaptedLinear(Linear("D", "F", 4, 6), rank=2)
        >>> hidden = torch.ones(4)
        >>> bool((layer(hidden) == layer.plain()(hidden)).all())
        True
    """

    def __init__(
        self, base: Linear, *, rank: int, scale: float = 1.0, dropout: float = 0.0, dora: bool = False
    ) -> None:
        super().__init__(**base.bindings)
        self.rank, self.scale, self.dropout = rank, scale, dropout
        self.added = True  # whether the addition counts, see ``without_additions``
        self.unmerged: Tensor | None = None  # the weight, while another one with the addition stands in its place
        self.training = base.training
        base.requires_grad_(False)
        weight = self.weight = base.weight
        self.bias = base.bias
        self._base = (base,)  # in a tuple it is no part of this module
        base.weight = base.bias = None  # type: ignore[assignment]
        rows, columns = weight.shape
        down = torch.empty(rank, columns, dtype=weight.dtype, device=weight.device)
        self.down = nn.Parameter(down.normal_(std=columns**-0.5))
        self.up = nn.Parameter(torch.zeros(rows, rank, dtype=weight.dtype, device=weight.device))
        self.lengths = nn.Parameter(weight.detach().norm(dim=1)) if dora else None
        self.sum_parts: Callable[[Tensor], Tensor] = _whole  # where ranks hold parts of each row
        self.known_by: Tensor | None = None
        out_dim, in_dim = (format_dims((dim,)) for dim in base.parameter_dims["weight"])
        self.declare_axes(
            weight=f"{out_dim} {in_dim}",
            bias=out_dim,
            down=f"{rank} {in_dim}",
            up=f"{out_dim} {rank}",
            lengths=out_dim,
        )

    @property
    def merged(self) -> bool:
        """Whether the addition is a part of the weight."""
        return self.unmerged is not None

    def forward(self, hidden: HiddenRestI) -> HiddenRestO:
        if self.merged or not self.added:
            weight = self.weight if self.added or self.unmerged is None else self.unmerged
            return F.linear(hidden, weight, self.bias)
        entering = F.dropout(hidden, self.dropout, self.training) if self.dropout else hidden
        addition = F.linear(F.linear(entering, self.down), self.up) * self.scale
        if self.lengths is None:
            return F.linear(hidden, self.weight, self.bias) + addition
        own = F.linear(hidden, self.weight) + addition
        turned = own * (self.lengths / self.row_lengths())
        return turned if self.bias is None else turned + self.bias

    def plain(self) -> Linear:
        """The layer without its addition, which shares the parameters."""
        (base,) = self._base
        base.weight, base.bias = self.weight, self.bias
        return base

    def quantize(self) -> None:
        """Hold the weight in four bits a number from now on, with what it was known by (see ``fingerprint``).

        Raises:
            ShapeError: for a weight that is not made of whole blocks.
            MissingPackageError: without torchao.
        """
        weight = self.weight.detach()
        self.known_by = weight.flatten()[:64].clone()
        self.weight = nn.Parameter(nf4(weight, where=self.label), requires_grad=False)

    def addition(self) -> Tensor:
        """What is added to the weight, in float32."""
        product: Tensor = self.up.float() @ self.down.float()
        return product * self.scale

    def row_lengths(self) -> Tensor:
        """Lengths of the rows of weight and addition; no gradient flows through them."""
        with torch.no_grad():
            squares: Tensor = (numbers(self.weight).float() + self.addition()).square().sum(dim=1)
            return self.sum_parts(squares).sqrt().to(self.weight.dtype)

    @torch.no_grad()
    def whole(self) -> Tensor:
        """The weight with the addition in it, computed in float32."""
        whole = numbers(self.weight).float() + self.addition()
        if self.lengths is not None:
            whole = whole * (self.lengths.float() / whole.norm(dim=1))[:, None]
        return whole.to(self.weight.dtype)

    def merge(self) -> None:
        """Put the weight with the addition into the place of the weight, which is kept."""
        if not self.merged:
            whole = self.whole()
            self.unmerged = self.weight.data
            self.weight = nn.Parameter(whole, requires_grad=False)

    def unmerge(self) -> None:
        """Put the weight back, bit by bit."""
        if self.unmerged is not None:
            self.weight, self.unmerged = nn.Parameter(self.unmerged, requires_grad=False), None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AdaptedLinear:
        super()._apply(fn, recurse)
        if self.unmerged is not None:
            self.unmerged = fn(self.unmerged)  # moves with the others
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.unmerged is not None:
            destination[f"{prefix}weight"] = self.unmerged  # the addition is saved beside it

    def _load_from_state_dict(self, state: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        self.unmerge()  # what is loaded is a weight without the addition
        super()._load_from_state_dict(state, prefix, *rest)


def _whole(squares: Tensor) -> Tensor:
    return squares


def adapt(model: nn.Module, adapter: Adapter) -> list[str]:
    """Freeze a model and give its linear layers additions; returns the names of the layers.

    Args:
        model: of which any :class:`Linear` layers are replaced.
        adapter: which, and how.

    Raises:
        ConfigError: for a target that no linear layer has, or a model that is adapted already.
        ShapeError: for a layer that cannot be held in four bits, where that is asked for; the model stays as it was.
        MissingPackageError: without torchao, likewise.

    Example:
        >>> import nemolet as nl
        >>> model = nl.language.CausalLM(vocab_size=9, layers=1, width=8, heads=2)
        >>> adapt(model, Adapter(rank=2, targets=("qkv",)))
        ['graph.decoder.blocks.0.attention.qkv']
        >>> sum(p.numel() for p in model.parameters() if p.requires_grad)
        64
    """
    if next(adapted_layers(model), None) is not None:
        raise ConfigError(
            "the model is adapted already", where="adapter", fix="merge the first adapter: nemolet.nn.merge(model)"
        )
    layers = {name: module for name, module in model.named_modules() if type(module) is Linear}
    unused = [target for target in adapter.targets if not any(_matches(target, name) for name in layers)]
    if unused or not layers:
        raise ConfigError(
            "no linear layer has this name",
            where="adapter.targets",
            expected="the end of one of " + ", ".join(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", n) for n in layers)),
            found=", ".join(unused),
        )
    chosen = [name for name in layers if any(_matches(target, name) for target in adapter.targets)]
    for name in chosen if adapter.quantize else ():
        check_nf4(layers[name].weight, where=name)
    model.requires_grad_(False)
    for name in chosen:
        layer = AdaptedLinear(
            layers[name], rank=adapter.rank, scale=adapter.scale, dropout=adapter.dropout, dora=adapter.dora
        )
        put_layer(model, name, layer)
        if adapter.quantize:
            layer.quantize()
    return chosen


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, AdaptedLinear]]:
    """The layers with additions, by name."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, AdaptedLinear))


def departures(model: nn.Module) -> dict[str, Any]:
    """What a model's config does not tell: its additions, and its frozen parameters. Nothing for a model as built.

    Example:
        >>> layer = Linear("D", "F", 2, 3, bias=True)
        >>> departures(layer)
        {}
        >>> freeze(layer, ["bias"]), departures(layer)
        (['bias'], {'frozen': ['bias']})
    """
    additions = {
        name: {
            "rank": each.rank,
            "scale": each.scale,
            "dropout": each.dropout,
            "dora": each.lengths is not None,
            **({} if each.known_by is None else {"quantize": "nf4"}),
        }
        for name, each in adapted_layers(model)
    }
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    return {key: value for key, value in (("adapter", additions), ("frozen", frozen)) if value}


def merge(model: nn.Module) -> nn.Module:
    """Make all additions parts of the weights and remove them: the model is as it was built, with other weights."""
    for name, layer in list(adapted_layers(model)):
        if not layer.merged:
            layer.weight = nn.Parameter(layer.whole(), requires_grad=False)
        put_layer(model, name, layer.plain())
    return model.requires_grad_(True)


@contextmanager
def without_additions(model: nn.Module) -> Iterator[None]:
    """Inside the block, an adapted model is the one that was adapted.

    Example:
        >>> layer = AdaptedLinear(Linear("D", "F", 4, 6), rank=2)
        >>> hidden, _ = torch.ones(4), nn.init.ones_(layer.up)
        >>> with without_additions(layer):
        ...     before = layer(hidden)
        >>> bool((before == layer.plain()(hidden)).all()), bool((before == layer(hidden)).all())
        (True, False)
    """
    layers = [layer for _, layer in adapted_layers(model) if layer.added]
    for layer in layers:
        layer.added = False
    try:
        yield
    finally:
        for layer in layers:
            layer.added = True


def stop_dropout(model: nn.Module) -> None:
    """Let a model drop nothing in training any more; what its config says stays.

    Example:
        >>> layer = AdaptedLinear(Linear("D", "F", 4, 6), rank=2, dropout=0.5)
        >>> stop_dropout(layer), layer.dropout
        (None, 0.0)
    """
    module: Any
    for module in model.modules():
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0


def put_layer(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Replace the layer of a model that has this name."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, layer)


def freeze(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Stop the training of all parameters whose names match one of some patterns; returns their names.

    Raises:
        ConfigError: for a pattern that matches nothing.

    Example:
        >>> freeze(Linear("D", "F", 2, 3, bias=True), ["weight"])
        ['weight']
    """
    names = [name for name, _ in model.named_parameters()]
    unused = [pattern for pattern in patterns if not any(_matches(pattern, name) for name in names)]
    if unused:
        raise ConfigError(
            "no parameter has this name",
            where="freeze",
            expected="a pattern for one of " + ", ".join(names[:12]) + (", ..." if len(names) > 12 else ""),
            found=", ".join(unused),
        )
    frozen = []
    for name, parameter in model.named_parameters():
        if any(_matches(pattern, name) for pattern in patterns):
            parameter.requires_grad_(False)
            frozen.append(name)
    return frozen


def _matches(pattern: str, name: str) -> bool:
    """Whether a pattern is the whole name or its end, from a dot on."""
    return re.search(rf"(^|\.)({pattern})$", name) is not None
