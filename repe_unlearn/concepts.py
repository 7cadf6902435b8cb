"""Several concepts at once, on samples that lack some of the labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from .errors import InputError, NonFiniteError, NotEnoughDataError, ShapeError
from .moments import Moments
from .thin_moments import ThinMoments

_M = TypeVar("_M", Moments, ThinMoments)


@dataclass(frozen=True, slots=True)
class Concepts:
    """Lays out the labels of several concepts as columns z, so that an eraser of z erases all of them.

    A missing label costs its own concept only. ``columns`` writes 0 in place of it and adds one column per
    concept that says where a label is known; such columns stream, merge, subtract and all-reduce exactly like
    any z. ``resolve`` then takes those columns out of the finished moments, exactly:

    - ``mean_x`` and ``cov_xx`` come from *all* rows, with labels or without;
    - column j of ``m_xz`` is the centred sum of products over the rows that have a label for j's concept;
    - entry (i, j) of ``m_zz`` comes from the rows that have both labels, each column centred on its own mean;
    - ``mean_z`` is the mean over the labelled rows.

    (These are the moments of a sample in which every missing label is the mean of its column, so they are those
    of a real sample, and every solver takes them.) After ``leace`` each concept has zero covariance with x over
    its own labelled rows.

    Args:
        classes: one entry per concept: the number of classes of integer ids, or None for a real. A real should be
            centred roughly beforehand if its mean is 1e4 times its spread or more: the zeros in place of missing
            labels cost ``(mean / spread)²`` of the 1e-16.
        missing: the id that means "no label". For reals it is NaN.

    Raises:
        InputError: no concept, fewer than 2 classes, or ``missing`` is a class.

    Example:
        >>> concepts = Concepts((2, None))
        >>> gender, age = torch.tensor([0, 1, -1, 1]), torch.tensor([20.0, 50.0, 40.0, float("nan")])
        >>> m = Moments.of(torch.randn(4, 6), concepts.columns(gender, age))
        >>> concepts.resolve(m).mean_z.round(decimals=3).tolist()
        [0.333, 0.667, 36.667]
    """

    classes: tuple[int | None, ...]
    missing: int = -1

    def __post_init__(self) -> None:
        if not self.classes or any(count is not None and count < 2 for count in self.classes):
            raise InputError(
                f"got classes={self.classes!r}; needed one entry per concept: the number of classes (2 or more), "
                "or None for a real."
            )
        if any(count is not None and 0 <= self.missing < count for count in self.classes):
            raise InputError(
                f"got missing={self.missing}, which is a class; needed an id outside 0..k-1, usually -1."
            )

    @property
    def k(self) -> int:
        """Number of concept columns that ``resolve`` leaves."""
        return sum(self._widths)

    @property
    def _widths(self) -> tuple[int, ...]:
        return tuple(1 if count is None else count for count in self.classes)

    def columns(self, *labels: Tensor) -> Tensor:
        """Return z ``[..., k + c]``: the columns of all c concepts, then one column per concept, 1 where labelled.

        Args:
            *labels: one tensor ``[...]`` per concept, in the order of ``classes``: integer ids, or reals.

        Raises:
            ShapeError: another number of tensors, or shapes that differ.
            InputError: ids where a real was declared or the other way round; an id out of range.
            NonFiniteError: an infinite real.
        """
        shapes = {tuple(part.shape) for part in labels}
        if len(labels) != len(self.classes) or len(shapes) != 1:
            raise ShapeError(
                f"got {len(labels)} label tensors of shapes {sorted(shapes)}; needed {len(self.classes)}, one per "
                "concept, all of the same shape."
            )
        parts, known = [], []
        for i, (label, count) in enumerate(zip(labels, self.classes, strict=True)):
            if label.is_floating_point() != (count is None):
                raise InputError(
                    f"got {label.dtype} labels for concept {i}; needed "
                    f"{'reals (NaN where missing)' if count is None else f'integer ids below {count}'}."
                )
            has = ~label.isnan() if count is None else label != self.missing
            label = torch.where(has, label, torch.zeros_like(label))
            if count is None:
                if not torch.isfinite(label).all():
                    raise NonFiniteError(
                        f"got infinite labels for concept {i}; needed finite reals, or NaN where missing."
                    )
                columns = label.to(torch.float64)[..., None]
            else:
                low, high = (int(label.min()), int(label.max())) if label.numel() else (0, 0)
                if low < 0 or high >= count:
                    raise InputError(
                        f"got class ids from {low} to {high} for concept {i}; needed 0 <= id < {count}, or "
                        f"{self.missing} where missing."
                    )
                columns = torch.nn.functional.one_hot(label.to(torch.int64), count).to(torch.float64)
            parts.append(columns * has[..., None])
            known.append(has.to(torch.float64)[..., None])
        return torch.cat([*parts, *known], dim=-1)

    def resolve(self, m: _M) -> _M:
        """Return the moments of the k concept columns, from finished moments of ``columns``.

        Call it last: resolved moments of two samples do not merge into those of both, because each is centred on
        the labels that it has. The moments of ``columns`` do.

        Args:
            m: ``Moments`` or ``ThinMoments`` with z from ``columns``.

        Raises:
            ShapeError: m has another number of columns.
            NotEnoughDataError: a concept has no label at all.
        """
        k, c = self.k, len(self.classes)
        if m.k != k + c:
            raise ShapeError(
                f"got moments of {m.k} columns; needed {k + c}: {k} for the concepts and {c} that say where a label "
                "is known, as Concepts.columns makes them."
            )
        known = m.mean_z[k:]
        unlabelled = [i for i in range(c) if float(known[i]) <= 0]
        if unlabelled:
            raise NotEnoughDataError(f"got no label at all for concept {unlabelled[0]} of {c}; needed some.")
        owner = torch.arange(c, device=known.device).repeat_interleave(
            torch.tensor(self._widths, device=known.device)
        )
        mean_z = m.mean_z[:k] / known[owner]
        # With indicator o and label z, the column (z - mean) where labelled and 0 elsewhere is  o z - mean o.
        take = torch.zeros(k + c, k, dtype=torch.float64, device=known.device)
        columns = torch.arange(k, device=known.device)
        take[columns, columns] = 1.0
        take[k + owner, columns] = -mean_z
        if isinstance(m, ThinMoments):
            return ThinMoments(m.x, m.z @ take + mean_z, m.weight)
        return Moments(m.n, m.mean_x, mean_z, m.m_xx, m.m_xz @ take, take.T @ m.m_zz @ take)
