"""Survey: what work on a model will take, and which of its weights can be edited, before any of it is done."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from .architectures import IN_BLOCK, Absent, Architecture, Experts, Read
from .closed_form import default_layers, places_of
from .errors import UnsupportedModelError
from .linears import floating

__all__ = ["Cost", "Speed", "Writers", "costs", "experts", "speed", "weight_bytes", "width", "writers"]

_TOKENS = 64
_SIDE = 512
_MATRICES = 5  # of d × d: what statistics, their correlation matrix and its factor take at their peak


@dataclass(frozen=True, slots=True)
class Speed:
    """How fast this machine is with one model.

    Attributes:
        forward: tokens per second of a forward pass; NaN for models that read no text.
        product: operations per second of a float64 matrix product, which statistics and solves are made of.
    """

    forward: float
    product: float


@dataclass(frozen=True, slots=True)
class Cost:
    """What one step takes: seconds, and bytes beyond the weights. A guess of the right size, not a promise."""

    step: str
    seconds: float
    bytes: float


@dataclass(frozen=True, slots=True)
class Writers:
    """Which blocks ``closed_form`` can edit at one kind of site, and why not at the others.

    Attributes:
        layers: blocks whose writer is one matrix.
        width: number of inputs of those matrices.
        refused: block -> reason.
    """

    layers: tuple[int, ...] = ()
    width: int = 0
    refused: Mapping[int, str] = field(default_factory=dict)


@torch.no_grad()
def speed(model: nn.Module) -> Speed:
    """Return what a forward pass of 64 random tokens and a float64 product of 512 × 512 take here; changes nothing.

    Args:
        model: a causal language model or an encoder of text; of others only the product is measured.

    Example:
        ``costs(model, speed(model))``
    """
    device = next(model.parameters()).device
    a = torch.ones(_SIDE, _SIDE, dtype=torch.float64, device=device if device.type == "cuda" else "cpu")
    product = 2 * _SIDE**3 / min(_seconds(lambda: a @ a) for _ in range(3))
    config: Any = model.config
    vocabulary = getattr(config.get_text_config(), "vocab_size", None)
    if vocabulary is None or getattr(config, "is_encoder_decoder", False):
        return Speed(math.nan, product)
    longest = getattr(config, "max_position_embeddings", None) or _TOKENS
    length = max(1, min(_TOKENS, longest // 2))  # some families number positions from 2 on
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (1, length), generator=generator).to(device)
    was_training = model.training
    model.eval()
    try:
        model(input_ids=ids[:, :8])  # kernels and pages are set up by the first run
        forward = length / _seconds(lambda: model(input_ids=ids))
    finally:
        model.train(was_training)
    return Speed(forward, product)


def costs(model: nn.Module, measured: Speed, *, tokens: int = 1000) -> tuple[Cost, ...]:
    """Return what capture, a fit in sequence and a closed-form edit of the default layers take for so many tokens.

    Counted: a forward pass; per site of what the layers read (d wide) statistics of d² numbers and a solve of d³
    operations; per edited weight the same for its inputs. Steps that the model has no place for are left out.

    Args:
        model: supported by a row of ``families``.
        measured: from ``speed``.
        tokens: number of prompt tokens, 1 or more.

    Example:
        ``[(c.step, c.seconds) for c in costs(model, Speed(forward=500, product=3e10))]``
    """
    arch = Architecture.of(model)
    d = width(model)
    sites = len(arch.sites(*arch.reads))
    run = tokens / measured.forward
    sums = sites * tokens * d**2 / measured.product  # half of the symmetric product
    item = next(model.parameters()).element_size()
    waiting = 4 * tokens * d * item
    found = [
        Cost(f"capture at {sites} sites", run + sums, 8 * sites * d**2),
        Cost(
            f"fit in sequence at {sites} sites",
            run + sums + sites * d**3 / measured.product,
            8 * _MATRICES * d**2 + waiting,
        ),
    ]
    kinds = writers(model).values()
    chosen = [n for n in default_layers(arch.n_layers) if all(n in kind.layers for kind in kinds)]
    if chosen:
        each = sum((tokens * kind.width**2 + kind.width**3) / measured.product for kind in kinds)
        m = max(kind.width for kind in kinds)
        bytes_ = 8 * _MATRICES * m**2 + 8 * tokens * (m + d) + waiting
        found.append(
            Cost(f"closed form, layers {chosen[0]} to {chosen[-1]}", run + len(chosen) * each, bytes_)
        )
    return tuple(found)


def writers(model: nn.Module) -> dict[Literal["mlp_out", "attn_out"], Writers]:
    """Return which blocks ``closed_form`` can edit, for both of its ``writers``.

    Example:
        ``writers(model)["mlp_out"].layers``
    """
    arch = Architecture.of(model)
    kinds: tuple[Literal["mlp_out", "attn_out"], ...] = ("mlp_out", "attn_out")
    found: dict[Literal["mlp_out", "attn_out"], Writers] = {}
    for kind in kinds:
        layers, refused, width = [], {}, 0
        for layer in range(arch.n_layers):
            try:
                (place,) = places_of(model, arch, [layer], [kind])
            except UnsupportedModelError as error:
                refused[layer] = str(error)
                continue
            layers.append(layer)
            width = place.linear.stored.shape[-2 if place.linear.turned else -1]
        found[kind] = Writers(tuple(layers), width, refused)
    return found


def experts(model: nn.Module) -> dict[int, int]:
    """Return block -> number of experts, for the blocks that have experts.

    Example:
        ``experts(model)  # {} for a dense model``
    """
    arch = Architecture.of(model)
    found: dict[int, int] = {}
    for layer, layout in enumerate(arch.layouts):
        for part in map(layout.part, IN_BLOCK):
            if isinstance(part, Absent):
                continue
            for weight in part.readers if isinstance(part, Read) else part.writers:
                if isinstance(weight, Experts):
                    found[layer] = floating(model, f"{arch.block(layer)}.{weight.path}").shape[0]
    return found


def width(model: nn.Module) -> int:
    """Return the width d of a model's residual stream.

    Example:
        ``width(model)  # 576 for SmolLM2-135M``
    """
    config: Any = model.config
    return getattr(config, "hidden_size", None) or config.get_text_config().hidden_size


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes of all parameters; tied ones count once.

    Example:
        >>> weight_bytes(nn.Linear(3, 2))
        32
    """
    return sum(p.numel() * p.element_size() for p in model.parameters())


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return max(time.perf_counter() - start, 1e-9)
