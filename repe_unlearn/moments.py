"""Moments: mergeable sufficient statistics of activations x and a concept z."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .errors import FileFormatError, InputError, ModelMismatchError, NotEnoughDataError, ShapeError
from .rows import checked_rows
from .tables import html_table
from .tensorfile import read_tensors, write_tensors

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_KIND = "moments"
_VERSION = 1
_TENSORS = ("mean_x", "mean_z", "m_xx", "m_xz", "m_zz")
_BLOCK_ROWS = 512
_STRIP = 256  # columns per product; narrower ones do less and run slower


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
            weight: ``[...]`` non-negative sample weights; default 1. They count rows (2 is the row twice, 0 is a
                row that is not there, whatever it holds), so weights of mean 1 keep n the number of rows.
            mask: ``[...]`` True where a sample counts; default everywhere.

        Raises:
            ShapeError: leading shapes differ or x is not floating point.
            NonFiniteError: x, z or weight holds NaN or infinity.
            NotEnoughDataError: no sample is left.
            InputError: a class id is negative or not below ``classes``, or a weight is negative.
        """
        rows, targets, weights = checked_rows(x, z, classes, weight, mask)
        if weights is None:
            weights = rows.new_ones(rows.shape[0])
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
    def var_x(self) -> Tensor:
        """Variance of every coordinate of x, ``[d]``: the diagonal of ``cov_xx`` without making it."""
        return self.m_xx.diagonal() / self.n

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
        require_same_widths((self.d, self.k), (other.d, other.k))
        other = other.to(self.mean_x.device)
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

    def all_reduce(self, group: ProcessGroup | None = None) -> Moments:
        """Return the moments of the samples of all ranks together, the same value on every rank.

        Equal to merging the parts in one process, to rounding, whatever the
        number of samples on each rank; a rank without samples passes ``Moments.empty(d, k)``. Every rank of
        the group has to call it. Two reductions: counts and means first, then every rank moves its sums to
        the common mean and these are added up, ``d (d + k) + k²`` numbers.

        Args:
            group: a ``torch.distributed`` process group; default all ranks. With the NCCL backend the moments
                have to be on the rank's GPU: ``m.to("cuda").all_reduce()``.

        Raises:
            InputError: ``torch.distributed`` is not initialised.
            ShapeError: the ranks hold moments of different widths; raised on every rank.

        Example:
            Started by ``torchrun --nproc-per-node 2 fit.py``, after ``init_process_group()``::

                rank, ranks = dist.get_rank(), dist.get_world_size()
                m = Moments.of(x[rank::ranks], z[rank::ranks], classes=2).all_reduce()
        """
        import torch.distributed as dist

        require_process_group()
        # The largest and, negated, the smallest width: all ranks learn of a mismatch, and none is left waiting.
        widths = torch.tensor([self.d, self.k, -self.d, -self.k], device=self.mean_x.device)
        dist.all_reduce(widths, dist.ReduceOp.MAX, group=group)
        if (widths[:2] + widths[2:]).any():
            (d_high, k_high), (d_low, k_low) = widths[:2].tolist(), (-widths[2:]).tolist()
            raise ranks_differ((self.d, self.k), (d_low, d_high), (k_low, k_high))
        joint = torch.cat([self.mean_x, self.mean_z])
        first = torch.cat([joint.new_tensor([self.n]), joint * self.n])
        dist.all_reduce(first, group=group)
        n = float(first[0])
        if n == 0:
            return Moments.empty(self.d, self.k, self.mean_x.device)
        mean = first[1:] / n
        mean_x, mean_z = mean[: self.d].clone(), mean[self.d :].clone()
        dx, dz = self.mean_x - mean_x, self.mean_z - mean_z
        sums = [
            (m + self.n * torch.outer(a, b)).contiguous()
            for m, a, b in ((self.m_xx, dx, dx), (self.m_xz, dx, dz), (self.m_zz, dz, dz))
        ]
        for part in sums:
            dist.all_reduce(part, group=group)
        return Moments(n, mean_x, mean_z, *sums)

    def to(self, device: torch.device | str) -> Moments:
        """Return the same moments on another device."""
        return Moments(self.n, *(getattr(self, name).to(device) for name in _TENSORS))

    def save(self, path: str | Path, *, fingerprint: str | None = None, force: bool = False) -> Path:
        """Write one safetensors file, atomically.

        Args:
            path: of the new file.
            fingerprint: of the model that was captured (``fingerprint(model)``), to be asked for by ``load``.
            force: replace an existing file.

        Raises:
            OutputExistsError: the file exists and ``force`` is False.
        """
        tensors = {name: getattr(self, name) for name in _TENSORS}
        header = {"n": self.n, "fingerprint": fingerprint}
        return write_tensors(path, tensors, kind=_KIND, version=_VERSION, header=header, force=force)

    @classmethod
    def load(cls, path: str | Path, *, fingerprint: str | None = None) -> Moments:
        """Read what ``save`` wrote.

        Args:
            path: of the file.
            fingerprint: of the model that the moments have to be of; default any.

        Raises:
            FileFormatError: truncated, foreign or newer file.
            ModelMismatchError: the file was saved with another fingerprint, or with none.
        """
        tensors, header = read_tensors(path, kind=_KIND, version=_VERSION)
        require_fingerprint(path, header, fingerprint)
        try:
            return cls(float(header["n"]), *(tensors[name] for name in _TENSORS))
        except KeyError as missing:
            raise FileFormatError(
                f"{path} lacks {missing}; it is not a whole moments file. Capture again."
            ) from None

    def __repr__(self) -> str:
        return f"Moments(n={self.n:g}, d={self.d}, k={self.k})"

    def _repr_html_(self) -> str:
        std_x, std_z = (m.diagonal().div(self.n or 1.0).sqrt() for m in (self.m_xx, self.m_zz))
        scale = std_x[:, None] * std_z * (self.n or 1.0)
        strongest = torch.where(scale > 0, self.m_xz / scale, 0.0).abs().amax(0)
        rows = [
            (column, *(f"{float(value[column]):.3g}" for value in (self.mean_z, std_z, strongest)))
            for column in range(min(self.k, 8))
        ]
        columns = ("column of z", "mean", "std", "strongest correlation with a coordinate of x")
        return html_table(repr(self), columns, rows, self.k)


def require_same_widths(a: tuple[int, int], b: tuple[int, int]) -> None:
    """Refuse to merge statistics of widths (d, k) that differ.

    Raises:
        ShapeError: d or k differ.
    """
    if a != b:
        raise ShapeError(
            f"cannot merge moments of width (d={a[0]}, k={a[1]}) with (d={b[0]}, k={b[1]}); "
            "were the two captured at the same kind of site, with the same classes?"
        )


def require_fingerprint(path: str | Path, header: Mapping[str, object], wanted: str | None) -> None:
    """Refuse a file of statistics that were not captured from the wanted model; None takes any.

    Raises:
        ModelMismatchError: the header holds another fingerprint, or none.
    """
    found = header.get("fingerprint")
    if wanted is not None and found != wanted:
        raise ModelMismatchError(
            f"{path} was saved with fingerprint {found}; needed {wanted}. Load the model that was captured, or "
            "capture again and save with fingerprint=fingerprint(model)."
        )


def require_process_group() -> None:
    """Refuse to reduce over ranks where there are none.

    Raises:
        InputError: ``torch.distributed`` is not initialised.
    """
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        raise InputError(
            "got no process group; needed one before all_reduce. Start with torchrun and call "
            "torch.distributed.init_process_group() first."
        )


def ranks_differ(own: tuple[int, int], d: tuple[int, int], k: tuple[int, int]) -> ShapeError:
    """Return the error for ranks that hold statistics of several widths: own (d, k), and lowest and highest."""
    return ShapeError(
        f"got moments of width (d={own[0]}, k={own[1]}) on this rank and others elsewhere (d from {d[0]} to {d[1]}, "
        f"k from {k[0]} to {k[1]}); needed the same on every rank. Give classes= where a rank may lack a class."
    )


class Accumulator:
    """Adds batches in place, at about the cost of one matrix product each; ``moments()`` gives the value.

    Rows are centred on a fixed reference (the mean of the first block), so that large means do not cancel,
    and summed in float64. They are gathered into blocks of 512 rows first: a product with 512 rows costs
    little more than with 8. The block is one buffer of ``512 * (d + k)`` numbers beside the ``d * (d + k)``
    sums.

    Args:
        classes: number of classes for integer z, see ``Moments.of``.
        product: dtype of the centred rows and of the product within one block; the blocks are always added
            up in float64. float32 is faster where float64 is slow (GPUs, keep TF32 off); the entries of the
            covariance are then good to about 1e-7 of the two standard deviations, not 1e-15.

    Raises:
        InputError: ``product`` is neither float64 nor float32.

    Example:
        >>> sums = Accumulator(classes=2)
        >>> for _ in range(3):
        ...     sums.add(torch.randn(10, 4), torch.arange(10) % 2)
        >>> sums.moments()
        Moments(n=30, d=4, k=2)
    """

    __slots__ = (
        "_block",
        "_filled",
        "_n",
        "_reference",
        "_sums",
        "_weights",
        "_widths",
        "classes",
        "product",
    )

    def __init__(self, classes: int | None = None, *, product: torch.dtype = torch.float64) -> None:
        if product not in (torch.float64, torch.float32):
            raise InputError(f"got product={product}; needed torch.float64 or torch.float32.")
        self.classes = classes
        self.product = product
        self._widths: tuple[int, int] | None = None
        self._n = 0.0
        self._block: Tensor | None = None  # [512, at least d + k]; rows below _filled wait for the product
        self._weights: Tensor | None = None  # [512], of the rows of the block; None as long as all are 1
        self._filled = 0
        self._reference: Tensor | None = None  # [d + k]
        self._sums: tuple[Tensor, Tensor, Tensor] | None = None  # of rows, of x with rows, of z with z

    def add(self, x: Tensor, z: Tensor, weight: Tensor | None = None, *, check: bool = True) -> None:
        """Add rows ``x`` [n, d] with labels ``z`` [n] or [n, k]; same checks as ``Moments.of``.

        A refused batch leaves the sums as they were; later changes of the caller's tensors do not matter.

        Args:
            x: as ``Moments.of``.
            z: as ``Moments.of``.
            weight: ``[n]`` non-negative sample weights; default 1. Batches with and without may alternate.
            check: look for NaN, infinity and bad class ids. A look makes a GPU wait; without it the caller vouches
                for x [n, d], z [n, k] (no ids) and weight [n], all finite.

        Raises:
            ShapeError: also when d or k differs from earlier batches.
        """
        if check:
            rows, targets, weights = checked_rows(x, z, self.classes, weight, None, widen=False)
        else:
            rows, targets, weights = x.detach(), z.detach(), weight
        if rows.shape[0] == 0:
            return
        widths = (rows.shape[1], targets.shape[1])
        if self._widths is not None and widths != self._widths:
            raise ShapeError(
                f"got a batch of width (d={widths[0]}, k={widths[1]}); earlier batches had "
                f"(d={self._widths[0]}, k={self._widths[1]}). Give classes= if a batch may lack a class."
            )
        self._widths = widths
        d, width = widths[0], sum(widths)
        if self._block is None:
            # Rows that start at a multiple of 64 bytes: the product is up to 10 % faster.
            padded = -(-width // 8) * 8
            self._block = torch.empty(_BLOCK_ROWS, padded, dtype=torch.float64, device=rows.device)
        if weights is not None and self._weights is None:
            self._weights = self._block.new_ones(_BLOCK_ROWS)
        start = 0
        while start < rows.shape[0]:
            count = min(_BLOCK_ROWS - self._filled, rows.shape[0] - start)
            into = self._block[self._filled : self._filled + count, :width]
            into[:, :d].copy_(rows[start : start + count])
            into[:, d:].copy_(targets[start : start + count])
            if self._weights is not None:
                self._weights[self._filled : self._filled + count] = (
                    1.0 if weights is None else weights[start : start + count]
                )
            self._filled += count
            start += count
            if self._filled == _BLOCK_ROWS:
                self._flush()

    def _flush(self) -> None:
        if not self._filled or self._block is None or self._widths is None:
            return
        d, width = self._widths[0], sum(self._widths)
        joint = self._block[: self._filled, :width]
        weights = None if self._weights is None else self._weights[: self._filled]
        if self._reference is None or self._sums is None:
            self._reference = joint.mean(0)
            zeros = joint.new_zeros
            self._sums = (zeros(width), zeros(d, width), zeros(width - d, width - d))
        joint.sub_(self._reference)
        roots = None if weights is None else weights.sqrt()
        if roots is not None:
            joint.mul_(roots[:, None])
        total, cross, zz = self._sums
        if self.product != torch.float64:
            joint = joint.to(self.product)
        # The product is symmetric: strips from the diagonal on are about half of it; ``moments`` mirrors them.
        for start in range(0, d, _STRIP):
            stop = min(start + _STRIP, d)
            into, left, right = cross[start:stop, start:], joint[:, start:stop].T, joint[:, start:]
            if self.product == torch.float64:
                into.addmm_(left, right)
            else:
                into += left @ right
        total += joint.sum(0, dtype=torch.float64) if roots is None else roots @ joint.to(torch.float64)
        zz.addmm_(joint[:, d:].T.to(torch.float64), joint[:, d:].to(torch.float64))
        self._n += self._filled if weights is None else float(weights.sum())
        self._filled = 0

    def state(self) -> dict[str, Tensor]:
        """Return tensors from which ``restore`` goes on as if nothing had happened, to the last bit."""
        if self._widths is None or self._block is None:
            return {}
        tensors = {
            "widths": torch.tensor(self._widths),
            "n": torch.tensor(self._n, dtype=torch.float64),
            "rows": self._block[: self._filled, : sum(self._widths)],
        }
        if self._weights is not None:
            tensors["weights"] = self._weights[: self._filled]
        if self._reference is not None and self._sums is not None:
            names = ("reference", "total", "cross", "zz")
            tensors |= dict(zip(names, (self._reference, *self._sums), strict=True))
        return tensors

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take over what ``state`` returned; the sums go on, on the device of the given tensors."""
        if not state:
            return
        rows, sums = state["rows"], ("total", "cross", "zz")
        d, k = state["widths"].tolist()
        self._widths, self._n, self._filled = (d, k), float(state["n"]), rows.shape[0]
        self._block = rows.new_empty(_BLOCK_ROWS, -(-(d + k) // 8) * 8)
        self._block[: self._filled, : d + k] = rows
        if "weights" in state:
            self._weights = rows.new_ones(_BLOCK_ROWS)
            self._weights[: self._filled] = state["weights"]
        if "reference" in state:
            # Copies: the sums are added to in place.
            self._reference = state["reference"].clone()
            total, cross, zz = (state[name].clone() for name in sums)
            self._sums = (total, cross, zz)

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
        d, n = cross.shape[0], self._n
        offset = total / n
        mean = self._reference + offset
        m_xx = torch.triu(cross[:, :d])
        m_xx += torch.triu(m_xx, 1).T
        m_xx.addr_(offset[:d], offset[:d], alpha=-n)
        m_xz = cross[:, d:] - n * torch.outer(offset[:d], offset[d:])
        m_zz = zz - n * torch.outer(offset[d:], offset[d:])
        return Moments(n, mean[:d].clone(), mean[d:].clone(), m_xx, m_xz, m_zz)
