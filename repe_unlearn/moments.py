"""Moments: mergeable sufficient statistics of activations x and a concept z."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from .errors import FileFormatError, InputError, NonFiniteError, NotEnoughDataError, ShapeError
from .tensorfile import read_tensors, write_tensors

_KIND = "moments"
_VERSION = 1
_BUFFER_ROWS = 512


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """Count, means and centred second moments of ``x`` [*, d] and ``z`` [*, k], always in float64.

    Two moments of disjoint samples merge exactly (Chan, Golub & LeVeque 1983), in any order and any grouping,
    so data can be streamed, sharded and taken out again. The tensors are owned by this value and never
    changed.

    Attributes:
        n: total weight of the samples (their number, when no weights are given).
        mean_x: ``[d]``.
        mean_z: ``[k]``.
        m_xx: ``[d, d]`` centred sum of products ``Σ w (x - mean_x)(x - mean_x)ᵀ``.
        m_xz: ``[d, k]``.
        m_zz: ``[k, k]``.

    Example:
        >>> x = torch.tensor([[0.0, 1.0], [2.0, 1.0], [4.0, 4.0]])
        >>> m = Moments.of(x, torch.tensor([0, 0, 1]))
        >>> m.n, m.mean_x.tolist(), m.k
        (3.0, [2.0, 2.0], 2)
    """

    n: float
    mean_x: Tensor
    mean_z: Tensor
    m_xx: Tensor
    m_xz: Tensor
    m_zz: Tensor

    @classmethod
    def of(
        cls,
        x: Tensor,
        z: Tensor,
        *,
        classes: int | None = None,
        weight: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Moments:
        """Return the moments of one batch.

        Args:
            x: ``[..., d]`` activations of any floating dtype.
            z: ``[...]`` integer class ids (turned into one-hot columns), ``[...]`` reals, or ``[..., k]``
                reals / one-hot.
            classes: number of classes k for integer ids; default ``z.max() + 1``. Give it when batches may
                lack a class.
            weight: ``[...]`` non-negative sample weights; default 1.
            mask: ``[...]`` True where a sample counts; default everywhere.

        Raises:
            ShapeError: leading shapes differ or x is not floating point.
            NonFiniteError: x, z or weight holds NaN or infinity.
            NotEnoughDataError: no sample is left.
            InputError: a class id is negative or not below ``classes``, or a weight is negative.
        """
        rows, targets, weights = _rows(x, z, classes, weight, mask)
        n = float(weights.sum())
        if rows.shape[0] == 0 or n <= 0:
            raise NotEnoughDataError(
                f"got x {tuple(x.shape)} with no sample left after mask and weights; needed at least one."
            )
        mean_x, mean_z = weights @ rows / n, weights @ targets / n
        xc, zc = rows - mean_x, targets - mean_z
        wx, wz = xc * weights[:, None], zc * weights[:, None]
        return cls(n, mean_x, mean_z, xc.T @ wx, xc.T @ wz, zc.T @ wz)

    @classmethod
    def empty(cls, d: int, k: int, device: torch.device | str = "cpu") -> Moments:
        """Return the moments of nothing: the neutral element of ``+``."""
        zeros = lambda *shape: torch.zeros(*shape, dtype=torch.float64, device=device)  # noqa: E731
        return cls(0.0, zeros(d), zeros(k), zeros(d, d), zeros(d, k), zeros(k, k))

    @property
    def d(self) -> int:
        """Width of x."""
        return self.mean_x.shape[0]

    @property
    def k(self) -> int:
        """Number of concept columns."""
        return self.mean_z.shape[0]

    @property
    def cov_xx(self) -> Tensor:
        """Covariance of x, ``[d, d]``, divided by n."""
        return self.m_xx / self.n

    @property
    def cov_xz(self) -> Tensor:
        """Cross-covariance of x and z, ``[d, k]``, divided by n."""
        return self.m_xz / self.n

    @property
    def cov_zz(self) -> Tensor:
        """Covariance of z, ``[k, k]``, divided by n."""
        return self.m_zz / self.n

    def class_means(self) -> Tensor:
        """Return the mean of x in every class, ``[k, d]``, for one-hot z; NaN for a class without samples."""
        return self.mean_x + self.m_xz.T / (self.n * self.mean_z)[:, None]

    def merge(self, other: Moments) -> Moments:
        """Return the moments of both samples together; also written ``a + b``."""
        return self._combine(other, 1.0)

    def __add__(self, other: Moments) -> Moments:
        return self._combine(other, 1.0)

    def __sub__(self, other: Moments) -> Moments:
        """Return the moments without a sample that was merged before."""
        return self._combine(other, -1.0)

    def _combine(self, other: Moments, sign: float) -> Moments:
        if (self.d, self.k) != (other.d, other.k):
            raise ShapeError(
                f"cannot merge moments of width (d={self.d}, k={self.k}) with (d={other.d}, k={other.k}); "
                "were the two captured at the same kind of site, with the same classes?"
            )
        n = self.n + sign * other.n
        if abs(n) <= 1e-12 * self.n:
            n = 0.0  # fractional weights do not cancel exactly
        if n < 0:
            raise NotEnoughDataError(f"cannot take {other.n:g} samples out of {self.n:g}.")
        if n == 0:
            return Moments.empty(self.d, self.k, self.mean_x.device)
        dx, dz = other.mean_x - self.mean_x, other.mean_z - self.mean_z
        step = sign * other.n / n
        between = sign * self.n * other.n / n
        return Moments(
            n,
            self.mean_x + step * dx,
            self.mean_z + step * dz,
            self.m_xx + sign * other.m_xx + between * torch.outer(dx, dx),
            self.m_xz + sign * other.m_xz + between * torch.outer(dx, dz),
            self.m_zz + sign * other.m_zz + between * torch.outer(dz, dz),
        )

    def to(self, device: torch.device | str) -> Moments:
        """Return the same moments on another device."""
        tensors = (self.mean_x, self.mean_z, self.m_xx, self.m_xz, self.m_zz)
        return Moments(self.n, *(t.to(device) for t in tensors))

    def save(self, path: str | Path, *, force: bool = False) -> Path:
        """Write one safetensors file, atomically.

        Raises:
            OutputExistsError: the file exists and ``force`` is False.
        """
        tensors = {name: getattr(self, name) for name in ("mean_x", "mean_z", "m_xx", "m_xz", "m_zz")}
        return write_tensors(path, tensors, kind=_KIND, version=_VERSION, header={"n": self.n}, force=force)

    @classmethod
    def load(cls, path: str | Path) -> Moments:
        """Read what ``save`` wrote.

        Raises:
            FileFormatError: truncated, foreign or newer file.
        """
        tensors, header = read_tensors(path, kind=_KIND, version=_VERSION)
        try:
            return cls(
                float(header["n"]), *(tensors[name] for name in ("mean_x", "mean_z", "m_xx", "m_xz", "m_zz"))
            )
        except KeyError as missing:
            raise FileFormatError(
                f"{path} lacks {missing}; it is not a whole moments file. Capture again."
            ) from None

    def __repr__(self) -> str:
        return f"Moments(n={self.n:g}, d={self.d}, k={self.k})"

    def _repr_html_(self) -> str:
        return f"<code>{json.dumps(repr(self))[1:-1]}</code>"


@dataclass(slots=True)
class Accumulator:
    """Adds batches in place, at about the cost of one matrix product each; ``moments()`` gives the value.

    Rows are centred on a fixed reference (the mean of the first block), so that large means do not cancel,
    and summed in float64. Small batches are gathered into blocks first: a product with 512 rows costs little
    more than with 8.

    Args:
        classes: number of classes for integer z, see ``Moments.of``.
    """

    classes: int | None = None
    _waiting: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    _rows: int = 0
    _widths: tuple[int, int] | None = None
    _n: float = 0.0
    _reference: Tensor | None = None
    _sums: tuple[Tensor, Tensor, Tensor] | None = None  # sum of rows, of their products, of z with rows

    def add(self, x: Tensor, z: Tensor) -> None:
        """Add rows ``x`` [n, d] with labels ``z`` [n] or [n, k]; same checks as ``Moments.of``.

        A refused batch leaves the sums as they were; later changes of the caller's tensors do not matter.

        Raises:
            ShapeError: also when d or k differs from earlier batches.
        """
        rows, targets, _ = _rows(x, z, self.classes, None, None, widen=False)
        if rows.shape[0] == 0:
            return
        widths = (rows.shape[1], targets.shape[1])
        if self._widths is not None and widths != self._widths:
            raise ShapeError(
                f"got a batch of width (d={widths[0]}, k={widths[1]}); earlier batches had "
                f"(d={self._widths[0]}, k={self._widths[1]}). Give classes= if a batch may lack a class."
            )
        self._widths = widths
        self._rows += rows.shape[0]
        if self._rows >= _BUFFER_ROWS:
            self._waiting.append((rows, targets))
            self._flush()
        else:
            self._waiting.append((rows.clone(), targets.clone()))  # the caller may reuse its buffers

    def _flush(self) -> None:
        if not self._waiting:
            return
        x = torch.cat([rows for rows, _ in self._waiting]).to(torch.float64)
        z = torch.cat([targets for _, targets in self._waiting]).to(x.device, torch.float64)
        self._waiting, self._rows = [], 0
        joint_width = x.shape[1] + z.shape[1]
        if self._reference is None or self._sums is None:
            self._reference = torch.cat([x.mean(0), z.mean(0)])
            self._sums = (
                x.new_zeros(joint_width),
                x.new_zeros(x.shape[1], joint_width),
                x.new_zeros(z.shape[1], z.shape[1]),
            )
        joint = torch.cat([x, z], dim=1).sub_(self._reference)
        d = x.shape[1]
        total, cross, zz = self._sums
        total += joint.sum(0)
        cross.addmm_(joint[:, :d].T, joint)
        zz.addmm_(joint[:, d:].T, joint[:, d:])
        self._n += joint.shape[0]

    def moments(self) -> Moments:
        """Return the moments of everything added so far.

        Raises:
            NotEnoughDataError: nothing was added.
        """
        self._flush()
        if self._sums is None or self._reference is None:
            raise NotEnoughDataError(
                "no activation reached this site; check the token selection and the prompts."
            )
        total, cross, zz = self._sums
        d = cross.shape[0]
        offset = total / self._n
        mean = self._reference + offset
        cross = cross - self._n * torch.outer(offset[:d], offset)
        m_zz = zz - self._n * torch.outer(offset[d:], offset[d:])
        return Moments(
            self._n, mean[:d].clone(), mean[d:].clone(), cross[:, :d].clone(), cross[:, d:].clone(), m_zz
        )


def _rows(
    x: Tensor,
    z: Tensor,
    classes: int | None,
    weight: Tensor | None,
    mask: Tensor | None,
    widen: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Check and flatten one batch to x [n, d], z [n, k], weight [n] (x in float64 when ``widen``)."""
    if x.ndim < 1 or not x.is_floating_point():
        raise ShapeError(
            f"got x of dtype {x.dtype} and shape {tuple(x.shape)}; needed floating-point activations "
            "of shape [..., d]."
        )
    lead = x.shape[:-1]
    count = math.prod(lead)
    if z.shape != lead and (z.ndim == 0 or z.shape[:-1] != lead):
        raise ShapeError(
            f"got x {tuple(x.shape)} and z {tuple(z.shape)}; needed z of shape {tuple(lead)} "
            f"or {(*lead, 'k')}."
        )
    rows = x.detach().reshape(count, x.shape[-1])
    rows = rows.to(torch.float64) if widen else rows
    columns = 1 if z.shape == lead else z.shape[-1]
    labels = z.detach().reshape(count, columns).to(rows.device)
    weights = torch.ones(rows.shape[0], dtype=torch.float64, device=rows.device)
    if weight is not None:
        weights = _flat(weight, lead, "weight").to(weights)
        if (weights < 0).any():
            raise InputError(
                "got a negative sample weight; needed weights >= 0 (use '-' on Moments to take samples out)."
            )
    if mask is not None:
        keep = _flat(mask, lead, "mask").to(rows.device, torch.bool)
        rows, labels, weights = rows[keep], labels[keep], weights[keep]
    # After the mask, so that an ignored position may hold any label (-100 is common).
    ids = z.shape == lead and not z.is_floating_point()
    targets = _one_hot(labels[:, 0], classes) if ids else labels.to(torch.float64)
    for name, value in (("x", rows), ("z", targets), ("weight", weights)):
        if not torch.isfinite(value).all():
            bad = int((~torch.isfinite(value)).reshape(value.shape[0], -1).any(1).sum())
            raise NonFiniteError(
                f"{name} holds NaN or infinite values in {bad} of {value.shape[0]} rows; nothing was added."
            )
    return rows, targets, weights


def _flat(value: Tensor, lead: torch.Size, name: str) -> Tensor:
    if value.shape != lead:
        raise ShapeError(f"got {name} {tuple(value.shape)}; needed {tuple(lead)}, one entry per sample.")
    return value.reshape(-1)


def _one_hot(ids: Tensor, classes: int | None) -> Tensor:
    if ids.numel() == 0:
        return torch.zeros(0, classes or 0, dtype=torch.float64)
    ids = ids.to(torch.int64)
    k = classes if classes is not None else int(ids.max()) + 1
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= k:
        raise InputError(f"got class ids from {low} to {high}; needed 0 <= id < {k} (the number of classes).")
    return torch.nn.functional.one_hot(ids, k).to(torch.float64)
