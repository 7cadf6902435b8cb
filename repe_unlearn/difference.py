"""The patch that turns one checkpoint into another, found tensor by tensor without loading either model."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .errors import InputError, ModelMismatchError, NonFiniteError
from .families import FAMILIES
from .fingerprints import digest, sample_positions
from .named_tensors import Weights, weights_of
from .patch import Edit, Patch

__all__ = ["diff", "norms"]

# Say nothing about what a model computes.
_IGNORED = {
    "transformers_version",
    "dtype",
    "torch_dtype",
    "_name_or_path",
    "architectures",
    "tie_word_embeddings",
}


def diff(
    base: str | Path | nn.Module,
    edited: str | Path | nn.Module,
    *,
    max_rank: int = 64,
    bitwise: bool = False,
    progress: bool = False,
) -> Patch:
    """Return the patch that makes ``edited`` out of ``base``, of the lowest rank that explains the difference.

    Two tensors of each side are in memory at a time. A difference is stored as low rank when what remains beside it
    is no larger than the rounding of ``edited`` to its dtype, else as it is. Dense edits reproduce ``edited`` bit for
    bit. Low-rank ones reproduce what was rounded, so that some elements come out one rounding step apart; every edit's
    rule, and ``provenance["reproduces"]``, say how many.

    Args:
        base: folder with ``config.json`` and safetensors, by path or URL, or a model in memory. Names that a family has only in
            its files (experts one by one) become those of the model's parameters.
        edited: the same model after any edit of its weights, also with new biases or an untied head.
        max_rank: larger ranks are stored dense.
        bitwise: store dense whatever low-rank would not reproduce bit for bit.
        progress: show a progress bar.

    Raises:
        ModelMismatchError: the two are no versions of one model (names, shapes, model type).
        UnsupportedModelError: quantised or offloaded weights.
        InputError: the two do not differ.
        NonFiniteError: NaN or infinity in a tensor that differs.
        FileFormatError: a folder without safetensors, or damaged.

    Example:
        ``diff("llama", "llama-edited").save("patch.safetensors")``
    """
    if max_rank < 1:
        raise InputError(f"got max_rank={max_rank}; needed at least 1.")
    old, new = weights_of(base), weights_of(edited)
    if old.model_type != new.model_type:
        raise ModelMismatchError(f"base is a {old.model_type} model, edited a {new.model_type} model.")
    tied = old.tie if old.tie is not None and new.tie is None else None
    created = _created(old, new, tied)
    edits: dict[str, Edit] = {}
    off = total = 0
    samples = []
    for name in tqdm(sorted(old.shapes), disable=not progress, desc="diff", unit="tensor"):
        before = old.read(name)
        samples.append((name, tuple(before.shape), _samples(before)))
        after = new.read(name)
        targets = [(name, after)]
        if tied is not None and name == tied[0]:
            targets.append((tied[1], new.read(tied[1])))
        for target, value in targets:
            if torch.equal(before, value):
                continue
            edits[target], count = _edit(target, before, value, max_rank, bitwise)
            off, total = off + count, total + value.numel()
    zeros = []
    for name in created:
        value = new.read(name)
        if value.any():
            edits[name] = Edit(value, None, "difference: new bias")
        else:
            zeros.append(name)
    config, unheld = _config(old, new)
    if not edits:
        what = "the head is untied but unchanged" if tied else "every tensor is the same, bit for bit"
        raise InputError(f"base and edited do not differ in their weights ({what}); a patch needs an edit.")
    facts = {"reproduces": f"{total - off} of {total} changed elements bit for bit" if off else "bit for bit"}
    return Patch(
        edits,
        old.print or digest(old.model_type, samples),
        {name: shape for name, shape in created.items() if name in edits},
        {name: created[name] for name in zeros},
        config,
        tied,
        provenance={**facts, **({"config keys left out": ", ".join(unheld)} if unheld else {})},
    )


def norms(base: str | Path | nn.Module, patch: Patch) -> dict[str, float]:
    """Return the Frobenius norm in ``base`` of every tensor that a patch edits, 0 for a new bias."""
    weights = weights_of(base)
    held = {*weights.shapes, *(weights.tie or ())}
    return {name: float(weights.read(name).double().norm()) if name in held else 0.0 for name in patch.edits}


def _created(old: Weights, new: Weights, tied: tuple[str, str] | None) -> dict[str, tuple[int, ...]]:
    """Return the new biases; anything else that only one side has is another model."""
    known = {*old.shapes, *(tied or ())}
    created = {name: shape for name, shape in new.shapes.items() if name not in known}
    wrong = sorted(name for name in created if not name.endswith("bias"))
    wrong += sorted(name for name in known - set(new.shapes) if new.tie is None or name != new.tie[1])
    wrong += [
        name for name in sorted(old.shapes) if new.shapes.get(name, old.shapes[name]) != old.shapes[name]
    ]
    if wrong:
        raise ModelMismatchError(
            f"base and edited are no two versions of one model: {wrong[0]} "
            f"{f'and {len(wrong) - 1} more tensors ' if wrong[1:] else ''}exist on one side only or have other shapes. "
            "A patch holds edits of tensors, new biases and an untied head."
        )
    return created


def _config(old: Weights, new: Weights) -> tuple[dict[str, object], list[str]]:
    """Return the top-level settings that changed, and the names of changed ones that are no plain values."""
    switches = {key for row in FAMILIES if old.model_type in row.model_types for key in row.bias_switches}
    # A file leaves out defaults, a model does not: a key on one side says something only between like and like.
    alike = bool(old.print) == bool(new.print)
    plain: dict[str, object] = {}
    unheld = []
    for key, value in new.config.items():
        comparable = key in old.config or alike or (key in switches and value)
        if key in _IGNORED or not comparable or (key in old.config and old.config[key] == value):
            continue
        if value is None or isinstance(value, bool | int | float | str):
            plain[key] = value
        else:
            unheld.append(key)
    return plain, sorted(unheld)


def _samples(tensor: Tensor) -> Tensor:
    return tensor.flatten()[torch.tensor(sample_positions(tensor.numel()), dtype=torch.int64)]


def _edit(name: str, old: Tensor, new: Tensor, max_rank: int, bitwise: bool) -> tuple[Edit, int]:
    """Return an edit, and the number of elements that it does not reproduce bit for bit."""
    if not torch.isfinite(old).all() or not torch.isfinite(new).all():
        raise NonFiniteError(f"{name} holds NaN or infinite values on one side; a patch cannot hold those.")
    factors = _factors(old, new, max_rank)
    if factors is not None:
        edit = Edit(*factors, f"difference: rank {factors[0].shape[-1]}")
        off = int((edit.apply(old).to(new.dtype) != new).sum())
        if off == 0:
            return edit, 0
        if not bitwise:
            rule = f"{edit.rule}, {off} of {new.numel()} elements a rounding step off"
            return Edit(*factors, rule), off
    edit = Edit(new.double() - old.double(), None, "difference: dense")
    return edit, int((edit.apply(old).to(new.dtype) != new).sum())


def _factors(old: Tensor, new: Tensor, max_rank: int) -> tuple[Tensor, Tensor] | None:
    if old.ndim not in (2, 3):
        return None
    found = []
    for before, after in zip(*(t if t.ndim == 3 else t[None] for t in (old, new)), strict=True):
        pair = _low_rank(before.double(), after, max_rank)
        if pair is None:
            return None
        found.append(pair)
    rank = max(left.shape[1] for left, _ in found)
    lefts = torch.stack([nn.functional.pad(left, (0, rank - left.shape[1])) for left, _ in found])
    rights = torch.stack([nn.functional.pad(right, (0, 0, 0, rank - right.shape[0])) for _, right in found])
    return (lefts, rights) if old.ndim == 3 else (lefts[0], rights[0])


def _low_rank(old: Tensor, new: Tensor, max_rank: int) -> tuple[Tensor, Tensor] | None:
    """Return factors of the smallest rank beside which only rounding remains, or None.

    Args:
        old: [m, n] in float64.
        new: [m, n] in its own dtype, whose rounding is what may remain.
        max_rank: to try.
    """
    delta = new.double() - old
    if not delta.any():
        return delta[:, :0], delta[:0]
    q = _range(delta, max_rank + 8)
    u, s, vh = torch.linalg.svd(q.T @ delta, full_matrices=False)
    beside = float((delta - q @ (q.T @ delta)).square().sum())
    tails = [math.sqrt(beside + float(s[r:].square().sum())) for r in range(min(max_rank, len(s)) + 1)]
    # Rounding to nearest moves each element by a uniform share of half a step: a twelfth of the step squared.
    rounding = math.sqrt(1.1 * float(_steps(new).square().sum()) / 12)
    arithmetic = sum(delta.shape) * torch.finfo(torch.float64).eps * float(s[0])
    rank = next((r for r, tail in enumerate(tails) if r and tail <= rounding + arithmetic), None)
    if rank is None or rank * sum(delta.shape) >= delta.numel():
        return None
    left, right = (q @ u[:, :rank]) * s[:rank], vh[:rank]
    # A small change that is not low rank can hide below the rounding: then the factors explain no element of it.
    got = (old + left @ right).to(new.dtype).double()
    missed = (got - new.double()).abs() > 64 * torch.finfo(torch.float64).eps * new.double().abs().max()
    return (left, right) if int(missed.sum()) <= 0.5 * int((delta != 0).sum()) else None


def _range(matrix: Tensor, size: int) -> Tensor:
    """Return orthonormal columns [m, size] that hold the leading left singular vectors; the same ones every time."""
    generator = torch.Generator().manual_seed(0)
    size = min(size, *matrix.shape)
    start = torch.randn(matrix.shape[1], size, generator=generator, dtype=matrix.dtype)
    q, _ = torch.linalg.qr(matrix @ start)
    for _ in range(2):
        q, _ = torch.linalg.qr(matrix.T @ q)
        q, _ = torch.linalg.qr(matrix @ q)
    return q


def _steps(values: Tensor) -> Tensor:
    """Return the distance between neighbouring numbers of the dtype at each value, in float64."""
    info = torch.finfo(values.dtype)
    _, exponent = torch.frexp(values.double().abs().clamp_min(info.tiny))
    return torch.ldexp(torch.full_like(values, info.eps, dtype=torch.float64), exponent - 1)
