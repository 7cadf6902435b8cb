"""Weights as linear maps, however a model stores them: [out, in], [in, out], or stacked over experts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from .architectures import Architecture, Experts, Weight
from .errors import ShapeError, UnsupportedModelError
from .patch import Edit, is_quantised


@dataclass(frozen=True, slots=True, eq=False)
class Linear:
    """A weight of a model, or a stack of one per expert.

    Attributes:
        name: of the parameter.
        stored: its values as they are, ``[..., out, in]`` or turned.
        turned: they are ``[..., in, out]``.
        bias: name of the bias, whether there is one or not.
    """

    name: str
    stored: Tensor
    turned: bool
    bias: str

    def each(self, f: Callable[[Tensor], Tensor]) -> Tensor:
        """Return ``f`` of every [out, in] matrix in float64, stacked as they are; one is in memory at a time."""
        if self.stored.ndim == 3:
            return torch.stack([f(self._wide(matrix)) for matrix in self.stored])
        return f(self._wide(self.stored))

    def edit(self, left: Tensor, right: Tensor, rule: str) -> Edit:
        """Return the edit that adds ``left @ right`` to the map."""
        return Edit(right.mT, left.mT, rule) if self.turned else Edit(left, right, rule)

    def _wide(self, matrix: Tensor) -> Tensor:
        wide = matrix.to("cpu", torch.float64)
        return wide.T if self.turned else wide


def linear(
    model: nn.Module, arch: Architecture, base: str, weight: Weight, d: int, axis: Literal["in", "out"]
) -> Linear:
    """Return one of a row's weights, whose in or out side must be of width d.

    Raises:
        UnsupportedModelError: it is not there, quantised, or not in memory.
        ShapeError: another width.
    """
    if isinstance(weight, Experts):
        name, bias = base + weight.path, base + (weight.bias or f"{weight.path}.bias")
        found = Linear(name, floating(model, name), weight.axes == "eio", bias)
    else:
        # Conv1D is the only turned module, and only inside blocks: heads are ordinary Linear modules.
        name, turned = f"{base}{weight}.weight", arch.family.transposed and bool(base)
        found = Linear(name, floating(model, name), turned, f"{base}{weight}.bias")
    side = -1 if (axis == "in") != found.turned else -2
    if found.stored.ndim != (3 if isinstance(weight, Experts) else 2) or found.stored.shape[side] != d:
        raise ShapeError(
            f"{name} is {tuple(found.stored.shape)}; an eraser of width {d} does not fit its {axis}put side."
        )
    return found


def floating(model: nn.Module, name: str) -> Tensor:
    """Return a parameter in its own dtype.

    Raises:
        UnsupportedModelError: it is not there, quantised, or not in memory.
    """
    weight = find(model, name)
    if not isinstance(weight, Tensor):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no {name} (another head, or a layer that was replaced); load the plain "
            "model with its head."
        )
    if weight.is_meta or is_quantised(weight):
        state = "not in memory (offloaded)" if weight.is_meta else f"quantised ({weight.dtype})"
        raise UnsupportedModelError(
            f"{name} is {state}; bake from the full-precision checkpoint, loaded in memory."
        )
    return weight.detach()


def existing(model: nn.Module, name: str) -> Tensor | None:
    """Return a bias in float64, or None if the model lacks it."""
    bias = find(model, name)
    return bias.detach().to("cpu", torch.float64) if isinstance(bias, Tensor) else None


def find(model: nn.Module, path: str) -> object | None:
    """Return the module or parameter at a path, or None."""
    found: object | None = model
    for name in path.split("."):
        found = getattr(found, name, None)
    return found
