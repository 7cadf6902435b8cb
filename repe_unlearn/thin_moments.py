"""ThinMoments: the statistics of few samples of wide activations, without a d x d matrix."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .errors import FileFormatError, InputError, NotEnoughDataError, ShapeError
from .moments import (
    Moments,
    ranks_differ,
    require_fingerprint,
    require_process_group,
    require_same_widths,
)
from .rows import checked_rows
from .tensorfile import read_tensors, write_tensors

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_KIND = "thin moments"
_VERSION = 1
_TENSORS = ("x", "z", "weight")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_ROUNDING = 1e-12  # of fractional weights, when rows are taken out again


@dataclass(frozen=True, slots=True, eq=False)
class ThinMoments:
    """What ``Moments`` holds, kept as the n rows themselves: n·d numbers in place of d², for n below d.

    ``leace``, ``mean_difference`` and ``random`` take it and give the eraser that they give for
    ``dense()``, to rounding; n = 512 rows of width d = 8192 need 34 MB and a second where the d x d way
    needs gigabytes and a minute. It also has what ``Moments`` cannot have, because no fourth moment follows
    from second ones: ``shrinkage="ledoit_wolf"``. The rows are kept, so memory grows with every sample and
    whoever holds the value, or its file, holds the activations.

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
        parts = n if n > 0 else 1.0  # of nothing all statistics are 0, as those of ``Moments.empty``
        rows = self.x.to(torch.float64)
        mean_x, mean_z = self.weight @ rows / parts, self.weight @ self.z / parts
        centred, zc = rows - mean_x, self.z - mean_z
        weighted = zc * self.weight[:, None]
        set_ = object.__setattr__
        set_(self, "n", n)
        set_(self, "mean_x", mean_x)
        set_(self, "mean_z", mean_z)
        set_(self, "m_xz", centred.T @ weighted)
        set_(self, "m_zz", zc.T @ weighted)
        set_(self, "var_x", self.weight @ centred.square_() / parts)

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
        if rows.shape[0] == 0:
            raise NotEnoughDataError(
                f"got x {tuple(x.shape)} with no sample left after mask and weights; needed at least one."
            )
        ones = targets.new_ones(rows.shape[0])
        return cls(rows.clone(), targets.clone(), ones if weights is None else weights.clone())

    @classmethod
    def empty(
        cls, d: int, k: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float16
    ) -> ThinMoments:
        """Return the statistics of nothing: the neutral element of ``+``; ``dtype`` is that of the rows."""
        wide = torch.zeros(0, k + 1, dtype=torch.float64, device=device)
        return cls(torch.zeros(0, d, dtype=dtype, device=device), wide[:, 1:], wide[:, 0])

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
        if self.n == 0:
            return Moments.empty(self.d, self.k, self.x.device)
        return Moments.of(self.x, self.z, weight=self.weight)

    def merge(self, other: ThinMoments) -> ThinMoments:
        """Return the statistics of both samples together, also written ``a + b``: their rows in one value.

        Raises:
            ShapeError: the widths differ.
        """
        require_same_widths((self.d, self.k), (other.d, other.k))
        other = other.to(self.x.device)
        return ThinMoments(
            torch.cat([self.x, other.x]),  # to the wider of the two dtypes, which loses nothing
            torch.cat([self.z, other.z]),
            torch.cat([self.weight, other.weight]),
        )

    def __add__(self, other: ThinMoments) -> ThinMoments:
        return self.merge(other)

    def __sub__(self, other: ThinMoments) -> ThinMoments:
        """Return the statistics without a batch that was merged before; the order of the other rows is kept.

        A row is taken out where the same numbers and the same label are held, to the bit; a part of its weight may go.

        Raises:
            InputError: a row of the batch is not part of these, or not with that much weight.
            ShapeError: the widths differ.
        """
        require_same_widths((self.d, self.k), (other.d, other.k))
        places: defaultdict[bytes, list[int]] = defaultdict(list)
        for i, key in enumerate(_row_keys(self)):
            places[key].append(i)
        left = self.weight.tolist()
        for i, (key, weight) in enumerate(zip(_row_keys(other), other.weight.tolist(), strict=True)):
            wanted = weight
            while wanted > _ROUNDING * weight:
                if not places[key]:
                    raise InputError(
                        f"row {i} of the batch to take out is not among the {self.x.shape[0]} rows that are held, or "
                        "with less weight; needed a batch that was merged before, in its own dtype or narrower."
                    )
                last = places[key][-1]
                taken = min(wanted, left[last])
                wanted, left[last] = wanted - taken, left[last] - taken
                if left[last] <= _ROUNDING * weight:
                    left[last] = 0.0
                    places[key].pop()
        weights = self.weight.new_tensor(left)
        keep = weights > 0
        return ThinMoments(self.x[keep], self.z[keep], weights[keep])

    def all_reduce(self, group: ProcessGroup | None = None) -> ThinMoments:
        """Return the statistics of the samples of all ranks together: their rows in the order of the ranks.

        The same value on every rank, which then holds all rows. Counts may differ; a rank without samples
        passes ``ThinMoments.empty(d, k)``. Every rank of the group has to call it.

        Args:
            group: as for ``Moments.all_reduce``.

        Raises:
            InputError: ``torch.distributed`` is not initialised.
            ShapeError: the ranks hold statistics of different widths; raised on every rank.
        """
        import torch.distributed as dist

        require_process_group()
        own = torch.tensor(
            [self.x.shape[0], self.d, self.k, _DTYPES.index(self.x.dtype)], device=self.x.device
        )
        gathered = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
        dist.all_gather(gathered, own, group=group)
        rows, d, k, dtypes = zip(*(each.tolist() for each in gathered), strict=True)
        if len(set(d)) > 1 or len(set(k)) > 1:
            raise ranks_differ((self.d, self.k), (min(d), max(d)), (min(k), max(k)))
        dtype = _DTYPES[dtypes[0]]
        for i in dtypes[1:]:
            dtype = torch.promote_types(dtype, _DTYPES[i])
        if not any(rows):
            return ThinMoments.empty(self.d, self.k, self.x.device, dtype)
        # As bytes, in blocks of one size: what every backend can gather, whatever the dtype.
        parts = (self.x.to(dtype), self.z, self.weight[:, None])
        mine = torch.cat([part.contiguous().view(torch.uint8) for part in parts], dim=1)
        mine = torch.nn.functional.pad(mine, (0, 0, 0, max(rows) - mine.shape[0]))
        blocks = [torch.empty_like(mine) for _ in rows]
        dist.all_gather(blocks, mine, group=group)
        joint = torch.cat([block[:count] for block, count in zip(blocks, rows, strict=True)])
        widths = [part.shape[1] * part.element_size() for part in parts]
        x, z, weight = (
            part.contiguous().view(like.dtype)
            for part, like in zip(joint.split(widths, dim=1), parts, strict=True)
        )
        return ThinMoments(x, z, weight[:, 0].contiguous())

    def save(self, path: str | Path, *, fingerprint: str | None = None, force: bool = False) -> Path:
        """Write one safetensors file, atomically; it holds the rows themselves.

        Args:
            path: of the new file.
            fingerprint: of the model that was captured (``fingerprint(model)``), to be asked for by ``load``.
            force: replace an existing file.

        Raises:
            OutputExistsError: the file exists and ``force`` is False.
        """
        tensors = {name: getattr(self, name) for name in _TENSORS}
        header = {"fingerprint": fingerprint}
        return write_tensors(path, tensors, kind=_KIND, version=_VERSION, header=header, force=force)

    @classmethod
    def load(cls, path: str | Path, *, fingerprint: str | None = None) -> ThinMoments:
        """Read what ``save`` wrote.

        Args:
            path: of the file.
            fingerprint: of the model that the rows have to be of; default any.

        Raises:
            FileFormatError: truncated, foreign or newer file.
            ModelMismatchError: the file was saved with another fingerprint, or with none.
        """
        tensors, header = read_tensors(path, kind=_KIND, version=_VERSION)
        require_fingerprint(path, header, fingerprint)
        try:
            x, z, weight = (tensors[name] for name in _TENSORS)
            if x.ndim != 2 or z.shape[:-1] != weight.shape or len(x) != len(weight):
                raise ShapeError(f"x {tuple(x.shape)}, z {tuple(z.shape)}, weight {tuple(weight.shape)}")
            return cls(x, z, weight)
        except (KeyError, ShapeError) as error:
            raise FileFormatError(
                f"{path} is not a whole thin moments file ({error}). Capture again."
            ) from error

    def to(self, device: torch.device | str) -> ThinMoments:
        """Return the same statistics on another device."""
        return ThinMoments(self.x.to(device), self.z.to(device), self.weight.to(device))

    def __repr__(self) -> str:
        return f"ThinMoments(n={self.n:g}, d={self.d}, k={self.k}, rows={self.x.shape[0]})"


def _row_keys(m: ThinMoments) -> list[bytes]:
    """Return a digest of the numbers and the label of every row, the same for every dtype that holds them."""
    joint = torch.cat([m.x.to(torch.float64), m.z], dim=1).add_(0.0)  # -0 is 0
    return [blake2b(row.tobytes(), digest_size=20).digest() for row in joint.cpu().numpy()]
