"""Weights under attack: other values for a while, what two models write differently, and a random edit of equal size."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from repe_unlearn.architectures import Architecture, Experts, Write
from repe_unlearn.edit import Edit
from repe_unlearn.errors import InputError, ModelMismatchError, NonFiniteError
from repe_unlearn.linears import floating
from repe_unlearn.patch import Patch
from repe_unlearn.sites import Site


def random_edit(patch: Patch, seed: int = 0) -> Patch:
    """Return the control of a patch: Gaussian edits of the same tensors, of equal rank and equal Frobenius norm.

    A low-rank edit gets random factors of its rank; a dense one, a random tensor. Each matrix of a stack (experts) has
    the norm of its own edit.

    Args:
        patch: any patch; of two models it is ``difference.diff(base, edited)``.
        seed: of the random numbers; the same seed gives the same edit.

    Example:
        ``control = random_edit(patch, seed=1).apply_(base)``; afterwards ``control.revert_(base)``.
    """
    generator = torch.Generator().manual_seed(seed)
    edits = {name: _random(edit, generator) for name, edit in patch.edits.items()}
    facts = {"rule": "random edit", "seed": str(seed)}
    return replace(patch, edits=edits, exactness={}, provenance=facts)


def _random(edit: Edit, generator: torch.Generator) -> Edit:
    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    *stack, rows, cols = edit.shape if len(edit.shape) > 1 else (1, *edit.shape)
    if edit.rank is None:
        left, right = draw(*stack, rows, cols), None
        scale = _norms(edit.left.reshape(left.shape)) / _norms(left)
        left = (left * scale).reshape(edit.shape)
    else:
        left, right = draw(*stack, rows, edit.rank), draw(*stack, edit.rank, cols)
        left = left * _norms(edit.delta()) / _norms(left @ right)
    return Edit(left, right, f"random, as large as: {edit.rule}")


def _norms(matrices: Tensor) -> Tensor:
    """Return the Frobenius norm of every matrix, ``[..., 1, 1]``."""
    return torch.linalg.matrix_norm(matrices)[..., None, None]


@contextmanager
def replaced(model: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Put other tensors in the place of parameters; afterwards the old ones stand there again, bit for bit.

    The old tensors are set aside and never written, so nothing can be lost, whatever happens inside. Parameters that
    are tied stay tied.

    Args:
        model: any.
        values: name -> tensor of the shape and dtype of the parameter.

    Raises:
        UnsupportedModelError: a parameter that is not there, quantised, or not in memory.
        InputError: another shape or dtype.
        NonFiniteError: NaN or infinity.
    """
    for name, value in values.items():
        old = floating(model, name)
        if value.shape != old.shape or value.dtype != old.dtype:
            raise InputError(
                f"got {tuple(value.shape)} {value.dtype} for {name}; needed {tuple(old.shape)} {old.dtype}."
            )
        if not torch.isfinite(value).all():
            raise NonFiniteError(f"the new values of {name} hold NaN or infinity.")
    held = {name: model.get_parameter(name) for name in values}
    before = {name: parameter.data for name, parameter in held.items()}
    try:
        for name, parameter in held.items():
            parameter.data = values[name].detach().to(parameter.device)
        yield
    finally:
        for name, parameter in held.items():
            parameter.data = before[name]


@dataclass(frozen=True, slots=True, eq=False)
class Written:
    """A weight that writes into the residual stream and differs between two models.

    Attributes:
        name: of the parameter.
        site: where its output is.
        layer: number of its block.
        left: ``[d, k]`` left singular vectors of the change, orthonormal, the largest first.
        turned: its last two axes are ``[in, d]``.
    """

    name: str
    site: Site
    layer: int
    left: Tensor
    turned: bool

    def without(self, weight: Tensor, base: Tensor, k: int) -> Tensor:
        """Return the edited weight less the ``k`` largest components of how it differs from its base."""
        change = _change(weight, base, self.turned)
        u = self.left[:, :k]
        part = u @ (u.T @ change)
        wide = weight.to("cpu", torch.float64) - (part.mT if self.turned else part)
        return wide.to(weight.device, weight.dtype)


def written(model: nn.Module, base: nn.Module, *, most: int = 4) -> tuple[Written, ...]:
    """Return the weights by which an edited model writes something else into the stream than its base does.

    Args:
        model: the edited model, of a supported family.
        base: the same model before.
        most: directions per weight; fewer where the change has a lower rank.

    Raises:
        ModelMismatchError: the two are no versions of one model.
        UnsupportedArchitectureError: the family has no row.
        UnsupportedModelError: weights that are quantised or not in memory.
    """
    arch = Architecture.of(model)
    found = []
    for layer, kind in itertools.product(range(arch.n_layers), ("attn_out", "mlp_out")):
        part = arch.part(kind, layer)
        if not isinstance(part, Write):
            continue
        (site,) = arch.sites(kind, layers=[layer])
        for weight in part.writers:
            stacked = isinstance(weight, Experts)
            name = f"{arch.block(layer)}.{weight.path if stacked else f'{weight}.weight'}"
            new, old = floating(model, name), floating(base, name)
            if new.shape != old.shape:
                raise ModelMismatchError(
                    f"{name} is {tuple(new.shape)} in one model and {tuple(old.shape)} in the other; needed two "
                    "versions of one model."
                )
            if torch.equal(new, old.to(new)):
                continue
            turned = weight.axes == "eio" if stacked else arch.family.transposed
            found.append(Written(name, site, layer, _leading(_change(new, old, turned), most), turned))
    return tuple(found)


def _change(new: Tensor, old: Tensor, turned: bool) -> Tensor:
    """Return ``[..., d, in]`` in float64."""
    delta = new.to("cpu", torch.float64) - old.to("cpu", torch.float64)
    return delta.mT if turned else delta


def _leading(delta: Tensor, most: int) -> Tensor:
    """Return the leading left singular vectors of ``[..., d, in]`` matrices side by side, without those of no size."""
    # The Gram matrix, because d is smaller than what is written from, and only the largest are wanted.
    squares = (delta @ delta.mT).reshape(-1, delta.shape[-2], delta.shape[-2]).sum(0)
    values, vectors = torch.linalg.eigh(squares)
    kept = values[-most:] > 1e-12 * values[-1]
    return vectors[:, -most:][:, kept].flip(1)
