"""Eraser: an immutable low-rank affine map on activations."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .errors import InputError, NonFiniteError, ShapeError
from .tables import html_table


@dataclass(frozen=True, slots=True, eq=False)
class Eraser:
    """The affine map ``x -> x - (x - shift) rightᵀ leftᵀ``, of rank ``r`` on vectors of width ``d``.

    With ``right @ left = I_r`` (every solver of this package except a partial eraser) it is idempotent, and
    afterwards ``right @ x`` equals ``right @ shift`` for every input: what the rows of ``right`` read is
    constant. The tensors are detached, cloned and kept in float64 unless ``to`` says otherwise, so nothing
    that happens to the caller's tensors changes an eraser.

    Args:
        left: ``[d, r]``, the directions along which x is moved.
        right: ``[r, d]``, what is read off x.
        shift: ``[d]``, the point that stays fixed (the mean of x; zeros for a linear eraser).

    Raises:
        ShapeError: shapes or dtypes that do not fit together, or integer tensors.
        NonFiniteError: NaN or infinite entries.

    Example:
        >>> e = Eraser(torch.tensor([[1.0], [0.0]]), torch.tensor([[1.0, 0.0]]), torch.tensor([5.0, 5.0]))
        >>> e(torch.tensor([3.0, 4.0]))
        tensor([5., 4.])
    """

    left: Tensor
    right: Tensor
    shift: Tensor

    def __post_init__(self) -> None:
        for name in ("left", "right", "shift"):
            value = getattr(self, name)
            if not isinstance(value, Tensor) or not value.is_floating_point():
                raise ShapeError(f"Eraser.{name}: got {_describe(value)}; needed a floating-point tensor.")
            object.__setattr__(self, name, value.detach().clone().contiguous())
        d, r = (*self.left.shape, 0, 0)[:2]
        if self.left.ndim != 2 or self.right.shape != (r, d) or self.shift.shape != (d,):
            raise ShapeError(
                f"Eraser: got left {tuple(self.left.shape)}, right {tuple(self.right.shape)}, shift "
                f"{tuple(self.shift.shape)}; needed [d, r], [r, d] and [d]."
            )
        if not self.left.dtype == self.right.dtype == self.shift.dtype:
            raise ShapeError(
                f"Eraser: got left {self.left.dtype}, right {self.right.dtype}, shift {self.shift.dtype}; "
                "needed one dtype for all three."
            )
        for name in ("left", "right", "shift"):
            if not torch.isfinite(getattr(self, name)).all():
                raise NonFiniteError(
                    f"Eraser.{name} holds NaN or infinite values; check the activations it was fit on."
                )

    @property
    def dim(self) -> int:
        """Width d of the activations."""
        return self.left.shape[0]

    @property
    def rank(self) -> int:
        """Number r of directions that are removed; 0 means the identity."""
        return self.left.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the three tensors."""
        return self.left.dtype

    @property
    def device(self) -> torch.device:
        """Device of the three tensors."""
        return self.left.device

    @property
    def is_linear(self) -> bool:
        """True when zero maps to zero, so that no bias is needed to express the map."""
        return not bool(self.bias().any())

    @property
    def is_idempotent(self) -> bool:
        """True when applying twice equals applying once (``right @ left = I``), to the dtype's rounding."""
        left, right = self.left.double(), self.right.double()
        eye = torch.eye(self.rank, dtype=left.dtype, device=self.device)
        # The size of the terms of each entry; free of the units of x, which a product of norms is not.
        terms = (right.abs() @ left.abs()).clamp_min(1.0)
        return bool(((right @ left - eye).abs() <= _slack(self.dtype) * terms).all())

    @property
    def is_orthogonal(self) -> bool:
        """True when the linear part is an orthogonal projection, i.e. a symmetric idempotent matrix."""
        change = self.left.double() @ self.right.double()
        tolerance = _slack(self.dtype) * max(1.0, float(change.norm()))
        return self.is_idempotent and bool((change - change.T).norm() <= tolerance)

    def __call__(self, x: Tensor) -> Tensor:
        """Return the erased activations, same shape and dtype as ``x`` [..., d].

        The arithmetic is done in the wider of the two dtypes, at least float32, and cast once at the end.

        Raises:
            ShapeError: the last dimension of x is not ``dim``, or x is not floating point.
        """
        if x.ndim == 0 or x.shape[-1] != self.dim or not x.is_floating_point():
            raise ShapeError(
                f"got activations {_describe(x)}; this eraser needs floating-point [..., {self.dim}]."
            )
        wide = torch.promote_types(torch.promote_types(x.dtype, self.dtype), torch.float32)
        left, right, shift = (t.to(x.device, wide) for t in (self.left, self.right, self.shift))
        y = x.to(wide)
        # Centred before it is read: hooks fold the shift into a constant, which is faster and rounds more.
        return (y - ((y - shift) @ right.T) @ left.T).to(x.dtype)

    def matrix(self) -> Tensor:
        """Return the dense linear part ``I - left @ right``, [d, d] (acts on column vectors)."""
        return torch.eye(self.dim, dtype=self.dtype, device=self.device) - self.left @ self.right

    def bias(self) -> Tensor:
        """Return the constant part b, [d], of ``eraser(x) = matrix() @ x + b``."""
        return self.left @ (self.right @ self.shift)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Eraser:
        """Return the same map with its tensors on another device or in another floating dtype."""
        return replace(
            self,
            **{
                name: getattr(self, name).to(device=device, dtype=dtype)
                for name in ("left", "right", "shift")
            },
        )

    def partial(self, alpha: float) -> Eraser:
        """Return ``x -> x + alpha (self(x) - x)``: alpha 0 is the identity, 1 is this eraser.

        Anything but 1 leaves ``(1 - alpha)`` of what the eraser reads; it is no longer idempotent.

        Raises:
            InputError: alpha is not finite.
        """
        if not math.isfinite(alpha):
            raise InputError(f"got alpha={alpha!r}; needed a finite number, usually between 0 and 1.")
        return replace(self, left=self.left * alpha)

    def compose(self, other: Eraser) -> Eraser:
        """Return ``x -> self(other(x))`` as one eraser of rank at most ``self.rank + other.rank``.

        Raises:
            ShapeError: the widths differ.
            InputError: the composition has no fixed point, hence no form as one eraser (for example when both
                set the same reading to different values along different directions).
        """
        if other.dim != self.dim:
            raise ShapeError(f"cannot compose erasers of width {self.dim} and {other.dim}.")
        a, b = self.to(dtype=torch.float64), other.to(self.device, torch.float64)
        # With A = a.left a.right, B likewise: I - (I - A)(I - B) = A + B - A B = left right, where
        left = torch.cat([a.left, b.left - a.left @ (a.right @ b.left)], dim=1)
        right = torch.cat([a.right, b.right])
        # b.shift is a fixed point of b, and of the composition if it is one of a too. Where a still moves it,
        # look for one nearby: left right step = pull. (right.T = Q S, step = Q c keeps all matrices thin.)
        pull = a.left @ (a.right @ (a.shift - b.shift))
        q, s = torch.linalg.qr(right.T)
        step = q @ (torch.linalg.pinv(left @ s.T) @ pull)
        missed = float((left @ (right @ step) - pull).norm())
        rounding = float(a.left.norm() * a.right.norm() * (a.shift.norm() + b.shift.norm()))
        if missed > 1e-8 * float(pull.norm()) + 1e-13 * rounding:
            raise InputError(
                "got two erasers whose composition has no fixed point (they set the same reading to "
                "different values along different directions); needed compatible shifts. Apply them in turn, "
                "or fit both with the same mean or with affine=False."
            )
        joint = Eraser(left, right, b.shift + step)
        return joint.to(dtype=torch.promote_types(self.dtype, other.dtype))

    def allclose(self, other: Eraser, rtol: float = 1e-9) -> bool:
        """True when both are the same map, compared relative to the size of the change they make."""
        if other.dim != self.dim:
            return False
        a, b = self.to(dtype=torch.float64), other.to(self.device, torch.float64)
        scale = max(float((a.left @ a.right).norm()), float((b.left @ b.right).norm()))
        far = float((a.matrix() - b.matrix()).norm())
        bias_scale = max(float(a.bias().norm()), float(b.bias().norm()))
        return far <= rtol * scale and float((a.bias() - b.bias()).norm()) <= rtol * max(bias_scale, scale)

    def __repr__(self) -> str:
        kind = ("orthogonal" if self.is_orthogonal else "oblique") if self.is_idempotent else "partial"
        affine = "linear" if self.is_linear else "affine"
        dtype = str(self.dtype).removeprefix("torch.")
        return f"Eraser(d={self.dim}, rank={self.rank}, {kind}, {affine}, {dtype})"

    def _repr_html_(self) -> str:
        # The singular values of left @ right, from its two small triangular factors.
        a, b = (torch.linalg.qr(t.double(), mode="r").R for t in (self.left, self.right.T))
        found = torch.linalg.svdvals(a @ b.T).tolist()
        rows = [(i, f"{value:.3g}") for i, value in enumerate(found[:8])]
        columns = ("direction", "moved per unit read (1 if orthogonal)")
        return html_table(repr(self), columns, rows, self.rank)


def _slack(dtype: torch.dtype) -> float:
    # Wide dtypes: what a solver loses. Half dtypes: what casting the factors loses (1e3 eps would let anything pass).
    eps = torch.finfo(dtype).eps
    return min(1e3 * eps, max(4 * eps, 1e-4))


def _describe(value: object) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
