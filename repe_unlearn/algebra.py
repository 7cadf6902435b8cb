"""Arithmetic of patches: one after another, a fraction of one, and what the cast leaves of the erased part."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .architectures import Absent, Architecture, Experts, Read
from .eraser import Eraser
from .errors import InputError, ModelMismatchError
from .fingerprints import fingerprint
from .patch import Edit, Patch
from .plan import ErasurePlan

__all__ = ["EditRow", "compose", "report", "scale"]

_STRENGTH = ("exact", "erasure-exact", "approximate")


def compose(first: Patch, second: Patch, *, model: nn.Module | None = None) -> Patch:
    """Return the patch that does what ``first`` and then ``second`` do, for the model of ``first``.

    ``second`` was made for the model after ``first`` (bake a plan while ``first`` is applied). Low-rank edits stay
    low-rank (the ranks add), dense edits and biases add. Two patches for one and the same model also compose, as
    long as they edit different parameters. The sum is cast once where two patches would be cast twice, so in
    bfloat16 the weights may differ from those by a rounding step.

    Args:
        first: any patch.
        second: made for the model that ``first`` leaves, or for the model of ``first``.
        model: the unpatched model; with it, that ``second`` belongs after ``first`` is checked by fingerprint
            (``first`` is applied and taken back). Without it a patch with another fingerprint is taken at its word.

    Raises:
        ModelMismatchError: both are for one model and edit the same parameter; or ``second`` is for a model that
            ``first`` does not leave; or the edits of a parameter have different shapes.

    Example:
        >>> a = Patch({"w.weight": Edit(torch.ones(4, 1), torch.ones(1, 5), "a")}, "0" * 16)
        >>> b = Patch({"w.weight": Edit(torch.ones(4, 1), torch.eye(5)[:1], "b")}, "1" * 16)
        >>> compose(a, b).edits["w.weight"].rank
        2
    """
    _require_order(first, second, model)
    edits = dict(first.edits)
    if second.tied is not None and first.tied is None:
        # What the first patch did to the one tensor, both tensors have after the second one parts them.
        embedding, head = second.tied
        shared = edits.get(embedding) or edits.get(head)
        edits.update({} if shared is None else {embedding: shared, head: shared})
    for name, edit in second.edits.items():
        edits[name] = _sum(name, edits[name], edit) if name in edits else edit
    created = {**first.new_biases, **first.zero_biases, **second.new_biases, **second.zero_biases}
    return replace(
        first,
        edits=edits,
        new_biases={name: shape for name, shape in created.items() if name in edits},
        zero_biases={name: shape for name, shape in created.items() if name not in edits},
        config_updates={**first.config_updates, **second.config_updates},
        tied=first.tied or second.tied,
        adapter=first.adapter or second.adapter,
        exactness=_weaker(first.exactness, second.exactness),
        provenance={**_merged(first.provenance, second.provenance), "composed": "yes"},
    )


def scale(patch: Patch, alpha: float) -> Patch:
    """Return the patch with every edit times ``alpha``: 0.5 does half, 0 nothing, negative values the opposite.

    For exact sites this is the bake of the plan's partial erasers (``eraser.partial(alpha)``). Behind a post-norm,
    and for composed patches, it only lies between the model and the patched model: those sites become
    ``approximate``. A head that the patch unties is untied whatever ``alpha`` is.

    Args:
        patch: any patch.
        alpha: finite.

    Raises:
        InputError: alpha is not finite.

    Example:
        >>> half = scale(Patch({"b": Edit(torch.ones(2), None, "shift")}, "0" * 16), 0.5)
        >>> half.edits["b"].delta()
        tensor([0.5000, 0.5000], dtype=torch.float64)
    """
    if not math.isfinite(alpha):
        raise InputError(f"got alpha={alpha}; needed a finite factor, e.g. 0.5 for half of the edit.")
    if alpha == 1:
        return patch
    composed = "composed" in patch.provenance
    return replace(
        patch,
        edits={
            name: Edit(edit.left * alpha, edit.right, f"{alpha:g} x ({edit.rule})")
            for name, edit in patch.edits.items()
        },
        exactness={
            site: "exact" if level == "exact" and not composed else "approximate"
            for site, level in patch.exactness.items()
        },
        provenance={**patch.provenance, "scaled": f"{alpha:g}"},
    )


@dataclass(frozen=True, slots=True)
class EditRow:
    """One line of ``report``; every norm is a Frobenius norm.

    Attributes:
        name, rule, rank: of the edit; ``rank`` None is dense.
        dtype: to which the edited parameter is cast.
        norm: of the change.
        relative: change over weight; NaN for new biases and for zeros.
        rounding: what the cast adds over the change; 1 means that the dtype swallows an edit of this size.
        leftover: what remains of the erased part after the cast: |W'L| / |WL| for a reader, |R W'| / |R W| for a
            writer. NaN without a plan, for biases and embeddings, and where the plan has no eraser for this parameter.
    """

    name: str
    rule: str
    rank: int | None
    dtype: str
    norm: float
    relative: float
    rounding: float
    leftover: float


def report(
    patch: Patch, model: nn.Module, plan: ErasurePlan | None = None, *, dtype: torch.dtype | None = None
) -> tuple[EditRow, ...]:
    """Return norm, rank, relative change and what the cast leaves, for every tensor that a patch edits.

    The leftover is computed from the plan's erasers and the cast weights alone, so it also shows a wrong edit.

    Args:
        patch: of this model.
        model: without the patch applied, weights in memory.
        plan: what the patch was baked from; needed for the leftover.
        dtype: to cast to instead of each parameter's own, e.g. to ask what bfloat16 would leave.

    Raises:
        ModelMismatchError: the patch is for another model, or is applied.
        ShapeError: an edit does not fit its parameter.

    Example:
        ``max(row.leftover for row in report(patch, model, plan) if row.leftover == row.leftover)``
    """
    require_base(patch, model)
    probes = {} if plan is None else dict(erased(model, plan))
    rows = []
    for name, edit in patch.edits.items():
        # A new bias starts as zeros of its module's dtype.
        beside = (
            model.get_parameter(f"{name.removesuffix('bias')}weight") if name in patch.new_biases else None
        )
        weight = model.get_parameter(name) if beside is None else beside.new_zeros(patch.new_biases[name])
        old = weight.detach().to("cpu", torch.float64)
        to = dtype or weight.dtype
        delta = edit.delta()
        exact = old + delta
        cast = exact.to(to).to(torch.float64)
        size, change = float(old.norm()), float(delta.norm())
        rows.append(
            EditRow(
                name,
                edit.rule,
                edit.rank,
                str(to).removeprefix("torch."),
                change,
                change / size if size else math.nan,
                float((cast - exact).norm()) / change if change else math.nan,
                leftover(cast, old, *probes[name]) if name in probes else math.nan,
            )
        )
    return tuple(rows)


def require_base(patch: Patch, model: nn.Module) -> None:
    """Refuse a model that is not the unpatched one of a patch."""
    found = fingerprint(model)
    if found != patch.fingerprint:
        raise ModelMismatchError(
            f"the patch is for fingerprint {patch.fingerprint}, this model has {found}; load the unpatched "
            "checkpoint it was made for (or revert_ the patch)."
        )


def _require_order(first: Patch, second: Patch, model: nn.Module | None) -> None:
    if first.fingerprint == second.fingerprint:
        both = sorted(set(first.edits) & set(second.edits))
        if both:
            raise ModelMismatchError(
                f"both patches were made for the model {first.fingerprint} and edit {both[0]}"
                f"{f' and {len(both) - 1} more' if both[1:] else ''}; apply_ the first, then bake the second plan "
                "on the patched model."
            )
        return
    if model is None:
        return
    first.apply_(model)
    try:
        found = fingerprint(model)
    finally:
        first.revert_(model)
    if found != second.fingerprint:
        raise ModelMismatchError(
            f"after the first patch the model has fingerprint {found}; the second was made for "
            f"{second.fingerprint}. Bake it on the model with the first patch applied."
        )


def _sum(name: str, a: Edit, b: Edit) -> Edit:
    if a.shape != b.shape:
        raise ModelMismatchError(f"the patches edit {name} as {a.shape} and as {b.shape}: other models.")
    rule = f"{a.rule}; then {b.rule}"
    if a.right is None or b.right is None or a.left.shape[-1] + b.left.shape[-1] >= min(a.shape[-2:]):
        return Edit(a.delta() + b.delta(), None, rule)
    assert a.rank is not None
    assert b.rank is not None
    return Edit(_beside((a.left, b.left), -1), _beside((a.right, b.right), -2), rule)


def _beside(factors: tuple[Tensor, Tensor], axis: int) -> Tensor:
    """Concatenate along the rank; leading axes (experts) may be there in one factor only."""
    leading = torch.broadcast_shapes(*(f.shape[:-2] for f in factors))
    return torch.cat([f.expand(*leading, *f.shape[-2:]) for f in factors], dim=axis)


def _weaker(a: Mapping[str, str], b: Mapping[str, str]) -> dict[str, str]:
    merged = {**a, **b}
    for site in set(a) & set(b):
        merged[site] = max(
            a[site], b[site], key=lambda level: _STRENGTH.index(level) if level in _STRENGTH else 9
        )
    return merged


def _merged(a: Mapping[str, str], b: Mapping[str, str]) -> dict[str, str]:
    """Facts that agree once, others one after the other."""
    return {
        key: "; then ".join(dict.fromkeys(facts[key] for facts in (a, b) if key in facts))
        for key in {**a, **b}
    }


def erased(model: nn.Module, plan: ErasurePlan) -> Iterator[tuple[str, tuple[Tensor, int]]]:
    """Yield each baked weight with the directions [d, r] that it must not hold any more, and its axis of size d."""
    plan.require(model)
    stacks = Architecture.all_of(model)
    for site, eraser in plan.erasers.items():
        found = next(((arch, at) for arch in stacks if (at := arch.locate(site))), None)
        if found is None:
            continue
        arch, (kind, layer) = found
        part = arch.part(kind, None if kind == "final" else layer)
        if part is None or isinstance(part, Absent):
            continue
        reads = isinstance(part, Read)
        base = "" if kind == "final" else f"{arch.block(layer)}."
        norm = "" if isinstance(part, Read) or part.norm is None else f"{base}{part.norm}"
        directions = _directions(model, arch, eraser, norm, reads)
        for weight in part.readers if isinstance(part, Read) else part.writers:
            if isinstance(weight, Experts):
                yield base + weight.path, (directions, weight.axes.index("i" if reads else "o") - 3)
            else:
                last = reads != (arch.family.transposed and kind != "final")
                yield f"{base}{weight}.weight", (directions, -1 if last else -2)


def _directions(model: nn.Module, arch: Architecture, eraser: Eraser, norm: str, reads: bool) -> Tensor:
    """A reader is blind along ``left``; what a writer writes is zero under ``right``, behind a norm's gain if any."""
    if reads:
        return eraser.left.double()
    gain = model.get_parameter(f"{norm}.weight").double() + arch.family.norm_offset if norm else 1.0
    return (eraser.right.double() * gain).T


def leftover(new: Tensor, old: Tensor, directions: Tensor, axis: int) -> float:
    """Return the norm of what a weight holds along directions, over what the old weight held there."""
    before, after = (float((w.movedim(axis, -1) @ directions).norm()) for w in (old, new))
    return after / before if before else math.nan
