"""What the solvers on rows share: checked rows with class ids, the way ``Moments`` checks its batches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from repe_unlearn.errors import NotEnoughDataError, ShapeError
from repe_unlearn.moments import Moments

from .linalg import check


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Activations in float64 with class ids that have no gap.

    Attributes:
        x: ``[n, d]`` float64.
        z: ``[n]`` int64 ids 0..k-1; every class has a row.
        counts: ``[k]`` number of rows of every class, int64.
        moments: of x and the one-hot columns of z.
    """

    x: Tensor
    z: Tensor
    counts: Tensor
    moments: Moments

    @classmethod
    def of(cls, x: Tensor, z: Tensor, *, least: int = 1) -> Rows:
        """Return the checked rows of x [n, d] (floating) and z [n] (integer class ids, any of them absent).

        Raises:
            ShapeError: other shapes, or real-valued labels.
            NonFiniteError: NaN or infinity in x.
            NotEnoughDataError: one class, or a class with fewer than ``least`` rows.
        """
        if x.ndim != 2 or z.shape != x.shape[:1] or z.is_floating_point() or z.is_complex():
            raise ShapeError(
                f"got x {tuple(x.shape)} and z {z.dtype} {tuple(z.shape)}; needed rows x [n, d] and integer class "
                "ids z [n]. For real-valued z use leace or mean_difference, which work on Moments."
            )
        names, ids = torch.unique(z.detach().to(x.device), return_inverse=True)
        m = Moments.of(x, ids, classes=len(names))
        check(m)
        counts = torch.bincount(ids, minlength=len(names))
        if int(counts.min()) < least:
            raise NotEnoughDataError(
                f"got {int(counts.min())} row(s) of class {int(names[counts.argmin()])}; needed at least {least} "
                "of every class. Capture more prompts of it, or leave the class out."
            )
        return cls(x.detach().to(torch.float64), ids, counts, m)

    @property
    def share(self) -> Tensor:
        """Share of the rows in every class, ``[k]`` float64."""
        return self.counts.to(torch.float64) / len(self.z)

    @property
    def k(self) -> int:
        """Number of classes."""
        return len(self.counts)
