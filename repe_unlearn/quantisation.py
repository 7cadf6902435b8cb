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
from .errors import InputError, UnsupportedArchitectureError
from .patch import Patch
from .plan import ErasurePlan

__all__ = ["MarginRow", "margin"]


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
    if bits not in (4, 8) or group < 1:
        raise InputError(f"got bits={bits}, group={group}; needed 4 or 8 bits and a group of at least 1.")
    require_base(patch, model)
    probes = {} if plan is None else dict(erased(model, plan))
    inputs_second_last = set(_input_major(model))
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


def _step(weight: Tensor, bits: int, group: int, axis: int) -> Tensor:
    """Return the step of every element, in the shape of the weight."""
    last = weight.movedim(axis, -1)
    pieces = [piece.abs().amax(-1, keepdim=True).expand_as(piece) for piece in last.split(group, dim=-1)]
    return torch.cat(pieces, -1).movedim(-1, axis) / (2 ** (bits - 1) - 1)


def _rounded(weight: Tensor, step: Tensor, bits: int) -> Tensor:
    top = 2 ** (bits - 1) - 1
    codes = torch.where(step > 0, weight / step, 0.0).round().clamp(-top - 1, top)
    return codes * step


def _input_major(model: nn.Module) -> Iterator[str]:
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
