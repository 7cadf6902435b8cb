"""ThinMoments: the statistics of few samples of wide activations, without a d x d matrix."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .errors import InputError, NotEnoughDataError
from .moments import Moments, require_same_widths
from .rows import checked_rows


@dataclass(frozen=True, slots=True, eq=False)
class ThinMoments:
    """What ``Moments`` holds, kept as the n rows themselves: n·d numbers in place of d², for n below d.

    ``leace``, ``mean_difference`` and ``random`` take it and give the eraser that they give for
    ``dense()``, to rounding; n = 512 rows of width d = 8192 need 34 MB and a second where the d x d way
    needs gigabytes and a minute. It also has what ``Moments`` cannot have, because no fourth moment follows
    from second ones: ``shrinkage="ledoit_wolf"``. The rows are kept, so memory grows with every sample and
    whoever holds the value holds the activations. There is no file format.

    Make it with ``of``; the other fields follow from the first three.

    Attributes:
        x: ``[n, d]`` the rows, in the dtype they came in.
        z: ``[n, k]`` the concept columns, float64.
        weight: ``[n]`` non-negative weights, float64; they count rows, 2 is the row twice.
        n: sum of the weights.
        mean_x: ``[d]``.
        mean_z: ``[k]``.
        var_x: ``[d]`` variance of every coordinate, divided by n.
        m_xz: ``[d, k]`` centred sum of products, as in ``Moments``.
        m_zz: ``[k, k]``.

    Example:
        >>> m = ThinMoments.of(torch.randn(6, 100), torch.arange(6) % 2)
        >>> m, m.dense()
        (ThinMoments(n=6, d=100, k=2, rows=6), Moments(n=6, d=100, k=2))
    """

    x: Tensor
    z: Tensor
    weight: Tensor
    n: float = field(init=False)
    mean_x: Tensor = field(init=False)
    mean_z: Tensor = field(init=False)
    var_x: Tensor = field(init=False)
    m_xz: Tensor = field(init=False)
    m_zz: Tensor = field(init=False)

    def __post_init__(self) -> None:
        n = float(self.weight.sum())
        if self.x.shape[0] == 0 or n <= 0:
            raise NotEnoughDataError(
                f"got x {tuple(self.x.shape)} with no sample left after mask and weights; needed at least one."
            )
        rows = self.x.to(torch.float64)
        mean_x, mean_z = self.weight @ rows / n, self.weight @ self.z / n
        centred, zc = rows - mean_x, self.z - mean_z
        weighted = zc * self.weight[:, None]
        set_ = object.__setattr__
        set_(self, "n", n)
        set_(self, "mean_x", mean_x)
        set_(self, "mean_z", mean_z)
        set_(self, "m_xz", centred.T @ weighted)
        set_(self, "m_zz", zc.T @ weighted)
        set_(self, "var_x", self.weight @ centred.square_() / n)

    @classmethod
    def of(
        cls,
        x: Tensor,
        z: Tensor,
        *,
        classes: int | None = None,
        weight: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> ThinMoments:
        """Return the statistics of one batch, holding its own copy of the rows.

        Args:
            x: ``[..., d]`` activations of any floating dtype.
            z: ``[...]`` class ids or reals, or ``[..., k]``, as for ``Moments.of``.
            classes: number of classes for integer ids; default ``z.max() + 1``.
            weight: ``[...]`` non-negative sample weights; default 1.
            mask: ``[...]`` True where a sample counts; default everywhere.

        Raises:
            ShapeError, NonFiniteError, NotEnoughDataError, InputError: as ``Moments.of``.
        """
        rows, targets, weights = checked_rows(x, z, classes, weight, mask, widen=False)
        ones = targets.new_ones(rows.shape[0])
        return cls(rows.clone(), targets.clone(), ones if weights is None else weights.clone())

    @property
    def d(self) -> int:
        """Width of x."""
        return self.x.shape[1]

    @property
    def k(self) -> int:
        """Number of concept columns."""
        return self.z.shape[1]

    @property
    def cov_xz(self) -> Tensor:
        """Cross-covariance of x and z, ``[d, k]``, divided by n."""
        return self.m_xz / self.n

    @property
    def cov_zz(self) -> Tensor:
        """Covariance of z, ``[k, k]``, divided by n."""
        return self.m_zz / self.n

    @property
    def m_xx(self) -> Tensor:
        """Refused: the d x d matrix is what this value avoids.

        Raises:
            InputError: always; it says to call ``dense``.
        """
        raise InputError(
            f"got ThinMoments where the {self.d} x {self.d} covariance of x is needed; "
            "pass m.dense(), or use leace, mean_difference or random."
        )

    @property
    def cov_xx(self) -> Tensor:
        """Refused like ``m_xx``.

        Raises:
            InputError: always.
        """
        return self.m_xx

    def standardised(self, scale: Tensor) -> Tensor:
        """Return the rows Y ``[n, d]`` in float64 with ``Yᵀ Y = cov_xx / scale / scaleᵀ``.

        Args:
            scale: ``[d]`` positive.
        """
        rows = self.x.to(torch.float64, copy=True).sub_(self.mean_x)
        return rows.div_(scale).mul_((self.weight / self.n).sqrt()[:, None])

    def dense(self) -> Moments:
        """Return the same statistics as ``Moments``, with the d x d matrix."""
        return Moments.of(self.x, self.z, weight=self.weight)

    def merge(self, other: ThinMoments) -> ThinMoments:
        """Return the statistics of both samples together, also written ``a + b``: their rows in one value.

        Raises:
            ShapeError: the widths differ.
        """
        require_same_widths((self.d, self.k), (other.d, other.k))
        return ThinMoments(
            torch.cat([self.x, other.x]),  # to the wider of the two dtypes, which loses nothing
            torch.cat([self.z, other.z]),
            torch.cat([self.weight, other.weight]),
        )

    def __add__(self, other: ThinMoments) -> ThinMoments:
        return self.merge(other)

    def to(self, device: torch.device | str) -> ThinMoments:
        """Return the same statistics on another device."""
        return ThinMoments(self.x.to(device), self.z.to(device), self.weight.to(device))

    def __repr__(self) -> str:
        return f"ThinMoments(n={self.n:g}, d={self.d}, k={self.k}, rows={self.x.shape[0]})"
