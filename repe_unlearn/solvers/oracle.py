"""Oracle eraser: when the label of every example is known, subtract what it predicts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from repe_unlearn.errors import FileFormatError, InputError, NonFiniteError, ShapeError
from repe_unlearn.moments import Moments
from repe_unlearn.tensorfile import read_tensors, write_tensors
from repe_unlearn.thin_moments import ThinMoments

from .linalg import check, concept_correlations

_KIND = "oracle eraser"
_VERSION = 1
_TENSORS = ("coef", "mean_z")


@dataclass(frozen=True, slots=True, eq=False)
class OracleEraser:
    """The map ``(x, z) -> x - coef (z - mean_z)``: x without its linear regression on z.

    The tensors are detached and cloned, so nothing that happens to the caller's tensors changes an eraser.

    Args:
        coef: ``[d, k]`` regression coefficients.
        mean_z: ``[k]``.

    Raises:
        ShapeError: shapes or dtypes that do not fit together, or integer tensors.
        NonFiniteError: NaN or infinite entries.

    Example:
        >>> e = OracleEraser(torch.tensor([[2.0], [0.0]]), torch.tensor([0.5]))
        >>> e(torch.tensor([[3.0, 4.0]]), torch.tensor([1.0]))
        tensor([[2., 4.]])
    """

    coef: Tensor
    mean_z: Tensor

    def __post_init__(self) -> None:
        for name in _TENSORS:
            value = getattr(self, name)
            if not isinstance(value, Tensor) or not value.is_floating_point():
                raise ShapeError(f"OracleEraser.{name}: got {value!r}; needed a floating-point tensor.")
            object.__setattr__(self, name, value.detach().clone().contiguous())
        if self.coef.ndim != 2 or self.mean_z.shape != self.coef.shape[1:]:
            raise ShapeError(
                f"OracleEraser: got coef {tuple(self.coef.shape)} and mean_z {tuple(self.mean_z.shape)}; "
                "needed [d, k] and [k]."
            )
        if self.coef.dtype != self.mean_z.dtype:
            raise ShapeError(
                f"OracleEraser: got coef {self.coef.dtype} and mean_z {self.mean_z.dtype}; needed one dtype."
            )
        for name in _TENSORS:
            if not torch.isfinite(getattr(self, name)).all():
                raise NonFiniteError(
                    f"OracleEraser.{name} holds NaN or infinite values; check the activations it was fit on."
                )

    @property
    def dim(self) -> int:
        """Width d of the activations."""
        return self.coef.shape[0]

    @property
    def k(self) -> int:
        """Number of concept columns."""
        return self.coef.shape[1]

    def __call__(self, x: Tensor, z: Tensor) -> Tensor:
        """Return the erased activations, same shape and dtype as ``x`` [..., d].

        The arithmetic is done in the wider of the two dtypes, at least float32, and cast once at the end.

        Args:
            x: ``[..., d]``.
            z: ``[...]`` integer class ids (for k classes), ``[...]`` reals (for k = 1), or ``[..., k]``.

        Raises:
            ShapeError: x or z does not fit the eraser, or class ids for an eraser that was fit on reals.
            NonFiniteError: z holds NaN or infinity.
            InputError: a class id outside 0..k-1, or of a class that the fit saw no example of.
        """
        if x.ndim == 0 or x.shape[-1] != self.dim or not x.is_floating_point():
            raise ShapeError(
                f"got activations {x.dtype} {tuple(x.shape)}; this eraser needs floating-point [..., {self.dim}]."
            )
        wide = torch.promote_types(torch.promote_types(x.dtype, self.coef.dtype), torch.float32)
        coef, mean_z = self.coef.to(x.device, wide), self.mean_z.to(x.device, wide)
        targets = self._columns(z, x.shape[:-1]).to(x.device, wide)
        return (x.to(wide) - (targets - mean_z) @ coef.T).to(x.dtype)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> OracleEraser:
        """Return the same map with its tensors on another device or in another floating dtype."""
        return replace(
            self,
            coef=self.coef.to(device=device, dtype=dtype),
            mean_z=self.mean_z.to(device=device, dtype=dtype),
        )

    def save(self, path: str | Path, *, force: bool = False) -> Path:
        """Write one safetensors file, atomically.

        Raises:
            OutputExistsError: the file exists and ``force`` is False.
        """
        tensors = {name: getattr(self, name) for name in _TENSORS}
        return write_tensors(path, tensors, kind=_KIND, version=_VERSION, header={}, force=force)

    @classmethod
    def load(cls, path: str | Path) -> OracleEraser:
        """Read what ``save`` wrote, bit by bit the same map.

        Raises:
            FileFormatError: truncated, foreign or newer file.
        """
        tensors, _ = read_tensors(path, kind=_KIND, version=_VERSION)
        try:
            return cls(*(tensors[name] for name in _TENSORS))
        except (KeyError, InputError) as error:
            raise FileFormatError(f"{path} is not a whole oracle eraser ({error}); save it again.") from error

    def _columns(self, z: Tensor, lead: torch.Size) -> Tensor:
        """Return the labels as columns [..., k]."""
        if z.shape == lead and not z.is_floating_point():
            return self._one_hot(z.to(self.mean_z.device, torch.int64))
        if z.shape == lead and self.k == 1:
            z = z[..., None]
        if z.shape != (*lead, self.k):
            raise ShapeError(
                f"got z {z.dtype} {tuple(z.shape)} for activations with leading shape {tuple(lead)}; needed "
                f"integer class ids {tuple(lead)} or columns {(*lead, self.k)}, as in the fit."
            )
        if not torch.isfinite(z).all():
            raise NonFiniteError("z holds NaN or infinite values; nothing was erased.")
        return z

    def _one_hot(self, ids: Tensor) -> Tensor:
        if abs(float(self.mean_z.sum()) - 1) > 1e-2:  # wide enough for a half dtype
            raise ShapeError(
                f"got integer class ids, but the eraser was fit on {self.k} columns that are no classes (their "
                "means do not sum to 1); needed z as floating-point columns, as in the fit."
            )
        if ids.numel() and not (int(ids.min()) >= 0 and int(ids.max()) < self.k):
            raise InputError(
                f"got class ids from {int(ids.min())} to {int(ids.max())}; the eraser was fit on classes "
                f"0 to {self.k - 1}."
            )
        unseen = sorted(set(ids[(self.mean_z == 0)[ids]].tolist()))
        if unseen:
            raise InputError(
                f"got examples of class {unseen[0]}, of which the fit saw none, so its mean is not known; "
                "fit on examples of every class."
            )
        return torch.nn.functional.one_hot(ids, self.k)

    def __repr__(self) -> str:
        return f"OracleEraser(d={self.dim}, k={self.k}, {str(self.coef.dtype).removeprefix('torch.')})"


def oracle(m: Moments | ThinMoments, *, rtol: float | None = None) -> OracleEraser:
    """Return the eraser that needs the label at test time and, for that, changes x least of all.

    Exact for the sample behind ``m``: the erased x has zero covariance with z and the same mean. Among *all*
    maps of (x, z) with zero covariance afterwards, linear or not, it has the least mean-square change (it is
    the orthogonal projection away from z among random variables), so it never changes x more than ``leace``.
    It needs no covariance of x, hence no shrinkage, and treats every coordinate of x on its own.

    Not promised: that x hides z from whoever knows which map was used. The subtracted constant *is* the
    label's; where labels may leak or be wrong, use ``leace``.

    ``coef = Σxz Σzz⁺``, with the pseudoinverse taken of the *correlation* matrix of z and a relative
    tolerance: a class of prior 0.1 % is erased like any other.

    Args:
        m: moments of x [d] and z [k]; ``ThinMoments`` do as well.
        rtol: eigenvalues of the correlation matrix of z up to this share of the largest count as zero;
            default ``10 * k * sqrt(n) * eps`` of
            float64, since the sums behind it have n terms.

    Returns:
        OracleEraser of widths d and k.

    Raises:
        NotEnoughDataError: one class, constant z, or fewer than 2 samples.
        NonFiniteError: NaN or infinity in the moments.

    Reference:
        Belrose, Schneider-Joseph, Ravfogel, Cotterell, Raff, Biderman: LEACE: Perfect linear concept erasure
        in closed form, NeurIPS 2023, arXiv 2306.03819 (oracle concept erasure).

    Example:
        >>> x, z = torch.tensor([[0.0, 1.0], [2.0, 1.0], [9.0, 4.0], [11.0, 4.0]]), torch.tensor([0, 0, 1, 1])
        >>> oracle(Moments.of(x, z))(x, z)[:, 0].round(decimals=4).tolist()
        [4.5, 6.5, 4.5, 6.5]
    """
    check(m)
    corr, std_z, tolerance = concept_correlations(m)
    inverse = torch.linalg.pinv(corr, hermitian=True, rtol=tolerance if rtol is None else rtol)
    return OracleEraser(m.cov_xz / std_z @ inverse / std_z, m.mean_z)
