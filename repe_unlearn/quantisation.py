"""What 8- or 4-bit rounding does to a patch: changes below half a step, and what comes back of the erased part."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from .algebra import erased, leftover, require_base
from .architectures import IN_BLOCK, Absent, Architecture, Experts, Read
from .edit import Edit
from .errors import InputError, ShapeError, UnsupportedArchitectureError
from .patch import Patch
from .plan import ErasurePlan

__all__ = ["MarginRow", "margin", "quantisation_safe"]


@dataclass(frozen=True, slots=True)
class MarginRow:
    """How one edited weight fares when it is quantised.

    Attributes:
        name: of the parameter.
        rows: output rows that change (of all experts; tokens of an embedding).
        below: share of those rows in which no element changes by half a step, so that rounding to the steps of the
            unedited weight may give the old codes.
        undone: share of the edit that is gone when the *quantised* weight is edited and rounded to its old steps:
            0 is none, 1 all of it.
        fresh: what is left of the erased part when the edited full-precision weight is quantised with steps of its
            own; as ``EditRow.leftover``, NaN without a plan.
        requantised: what is left of it when the quantised weight is edited and rounded to its old steps.
    """

    name: str
    rows: int
    below: float
    undone: float
    fresh: float
    requantised: float


def margin(
    patch: Patch,
    model: nn.Module,
    plan: ErasurePlan | None = None,
    *,
    bits: Literal[4, 8] = 4,
    group: int = 128,
) -> tuple[MarginRow, ...]:
    """Return, for every edited weight, how much of its edit survives integers: symmetric, to nearest, in groups.

    A simulation with plain rounding; quantisers that look at data do better on average, but they start from the
    same steps. Biases and norms stay in full precision in every common format and are left out.

    Args:
        patch: of this model.
        model: without the patch applied, full precision.
        plan: what the patch was baked from; needed for ``fresh`` and ``requantised``.
        bits: 8 or 4.
        group: input features that share one step; the last group of a row may be smaller.

    Raises:
        InputError: other bits, or an empty group.
        ModelMismatchError: the patch is for another model, or is applied.

    Example:
        ``weak = [row.name for row in margin(patch, model, bits=4) if row.below > 0.5]``
    """
    _check_format(bits, group)
    require_base(patch, model)
    probes = {} if plan is None else dict(erased(model, plan))
    inputs_second_last = set(input_major(model))
    rows = []
    for name, edit in patch.edits.items():
        if name in patch.new_biases or len(edit.shape) < 2:
            continue
        old = model.get_parameter(name).detach().to("cpu", torch.float64)
        delta = edit.delta()
        axis = -2 if name in inputs_second_last else -1
        step = _step(old, bits, group, axis)
        target = _rounded(old, step, bits) + delta
        back = _rounded(target, step, bits)
        fresh = _rounded(old + delta, _step(old + delta, bits, group, axis), bits)
        moved = (delta.abs() / step.clamp_min(torch.finfo(torch.float64).tiny)).amax(axis)
        changed = delta.abs().amax(axis) > 0
        energy = float(delta.square().sum())
        count = int(changed.sum())
        probe = probes.get(name)
        rows.append(
            MarginRow(
                name,
                count,
                float((moved[changed] < 0.5).double().mean()) if count else math.nan,
                float(((target - back) * delta).sum()) / energy if energy else math.nan,
                math.nan if probe is None else leftover(fresh, old, *probe),
                math.nan if probe is None else leftover(back, old, *probe),
            )
        )
    return tuple(rows)


def quantisation_safe(
    edit: Edit, weight: Tensor, *, bits: Literal[4, 8] = 4, group: int = 32
) -> tuple[Edit, float]:
    """Return the edit scaled up so that half of the elements in the rows it touches move by half a step or more.

    Rounding to nearest undoes what moves by less. The edit keeps its direction and its rank; a factor of s gives up
    the optimum of a closed-form edit, misses the target by ``s - 1`` of the distance moved, and multiplies what others
    get to see by s². So look at the factor: well above 2 says that the edit is spread too thinly for this format; solve
    it again with a small ``rank``, at fewer layers, or with a smaller alpha.

    Args:
        edit: of shape [..., outputs, inputs].
        weight: what it will be added to, not quantised, of the same shape and orientation.
        bits: 8 or 4, symmetric.
        group: inputs that share one step; 32 in most GGUF types, 128 in most GPTQ and AWQ files.

    Returns:
        The edit and the factor, 1.0 or more; the edit itself where the factor is 1.

    Raises:
        InputError: other bits, an empty group, or an edit of zeros.
        ShapeError: edit and weight do not fit, or are no matrices.

    Example:
        >>> weight, edit = torch.tensor([[7.0, 1.0], [7.0, 2.0]]), Edit(torch.tensor([[0.1, 0.2], [0, 0]]), None, "x")
        >>> safe, factor = quantisation_safe(edit, weight)
        >>> round(factor, 6)  # a step is 1, the lower of the two middle values 0.1
        5.0
    """
    _check_format(bits, group)
    if edit.shape != tuple(weight.shape) or weight.ndim < 2:
        raise ShapeError(
            f"got an edit of shape {edit.shape} and a weight {tuple(weight.shape)}; needed one shape, a matrix."
        )
    delta = edit.delta()
    touched = delta.abs().amax(-1) > 0
    step = _step(weight.detach().to("cpu", torch.float64), bits, group, -1)
    # Where the step is 0 (a group of zeros), any change makes a step of its own.
    moved = torch.where(step > 0, delta.abs() / step, torch.inf)[touched]
    if not moved.numel():
        raise InputError("got an edit of zeros; there is nothing to scale.")
    # The lower median: at least half of the elements are at or above it.
    median = float(moved.flatten().median())
    if median == 0:
        raise InputError(
            "more than half of the elements in the touched rows do not change, so no factor moves them by half a "
            "step; an edit of a few elements needs no scaling, see margin()."
        )
    factor = max(1.0, 0.5 / median)
    if factor == 1.0:
        return edit, 1.0
    rule = f"{edit.rule}, x{factor:.3g} for {bits} bits in groups of {group}"
    return Edit(edit.left * factor, edit.right, rule), factor


def _check_format(bits: int, group: int) -> None:
    if bits not in (4, 8) or group < 1:
        raise InputError(f"got bits={bits}, group={group}; needed 4 or 8 bits and a group of at least 1.")


def to_integers(weight: Tensor, *, bits: int, group: int, axis: int = -1) -> Tensor:
    """Return a weight as it is after rounding to integers and back: symmetric, to nearest, in groups, in its dtype.

    Args:
        weight: not quantised.
        bits: 8 or 4.
        group: numbers along ``axis`` that share one step; the last group may be smaller.
        axis: of the inputs.

    Raises:
        InputError: other bits, or an empty group.

    Example:
        >>> to_integers(torch.tensor([7.0, 2.6, -0.2]), bits=4, group=32)
        tensor([7., 3., -0.])
    """
    _check_format(bits, group)
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    return _rounded(wide, _step(wide, bits, group, axis), bits).to(weight.dtype)


def _step(weight: Tensor, bits: int, group: int, axis: int) -> Tensor:
    """Return the step of every element, in the shape of the weight."""
    last = weight.movedim(axis, -1)
    pieces = [piece.abs().amax(-1, keepdim=True).expand_as(piece) for piece in last.split(group, dim=-1)]
    return torch.cat(pieces, -1).movedim(-1, axis) / (2 ** (bits - 1) - 1)


def _rounded(weight: Tensor, step: Tensor, bits: int) -> Tensor:
    top = 2 ** (bits - 1) - 1
    codes = torch.where(step > 0, weight / step, 0.0).round().clamp(-top - 1, top)
    return codes * step


def input_major(model: nn.Module) -> Iterator[str]:
    """Yield the weights that are stored [in, out]: Conv1D, and experts of some families."""
    try:
        stacks = Architecture.all_of(model)
    except UnsupportedArchitectureError:
        return
    for arch in stacks:
        for layer, layout in enumerate(arch.layouts):
            for part in map(layout.part, IN_BLOCK):
                if isinstance(part, Absent):
                    continue
                for weight in part.readers if isinstance(part, Read) else part.writers:
                    if isinstance(weight, Experts):
                        if weight.axes == "eio":
                            yield f"{arch.block(layer)}.{weight.path}"
                    elif arch.family.transposed:
                        yield f"{arch.block(layer)}.{weight}.weight"
