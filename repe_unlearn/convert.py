"""Convert: erasers to and from the concept-erasure library."""

from __future__ import annotations

import torch
from concept_erasure import LeaceEraser

from .eraser import Eraser
from .errors import InputError


def to_concept_erasure(eraser: Eraser) -> LeaceEraser:
    """Return the same map as a ``concept_erasure.LeaceEraser`` that shares no memory with ``eraser``.

    Exact: the three tensors are copied as they are. A shift of zeros becomes ``bias=None``, which is how that
    library writes a linear eraser. Its erasers compute in the dtypes that they meet: a linear one must be cast
    to the dtype of the activations first, ``to_concept_erasure(eraser.to(dtype=x.dtype))``.

    Args:
        eraser: ``left`` [d, r], ``right`` [r, d], ``shift`` [d].

    Returns:
        ``LeaceEraser`` with ``proj_left`` [d, r], ``proj_right`` [r, d] and ``bias`` [d] or None.

    Raises:
        InputError: something else than an ``Eraser``.

    Reference:
        Belrose, Schneider-Joseph, Ravfogel, Cotterell, Raff, Biderman: LEACE: Perfect linear concept erasure
        in closed form, NeurIPS 2023, arXiv 2306.03819; package concept-erasure 0.2.4.

    Example:
        >>> e = Eraser(torch.tensor([[1.0], [0.0]]), torch.tensor([[1.0, 0.5]]), torch.tensor([5.0, 5.0]))
        >>> to_concept_erasure(e)(torch.tensor([3.0, 4.0]))
        tensor([5.5000, 4.0000])
    """
    if not isinstance(eraser, Eraser):
        raise InputError(f"got {type(eraser).__name__}; needed a repe_unlearn Eraser.")
    bias = eraser.shift.clone() if bool(eraser.shift.any()) else None
    return LeaceEraser(eraser.left.clone(), eraser.right.clone(), bias)


def from_concept_erasure(eraser: LeaceEraser) -> Eraser:
    """Return the same map as an ``Eraser`` that later updates of the fitter cannot change.

    Exact, in the same dtype. That library keeps its factors k columns wide and sets the columns below its
    tolerance to zero; those are left out here, so ``rank`` is the number of directions that are really removed.
    Whether the factors are good is another question: see ``repe_unlearn.diagnostics.diagnose``.

    Args:
        eraser: ``proj_left`` [d, k], ``proj_right`` [k, d], ``bias`` [d] or None (linear).

    Returns:
        Eraser of rank at most k.

    Raises:
        InputError: something else than a ``LeaceEraser`` (fitters: pass ``fitter.eraser``).
        ShapeError: complex or integer factors, or shapes that do not fit.
        NonFiniteError: NaN or infinity in a factor.

    Reference:
        As ``to_concept_erasure``.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> x, z = torch.randn(200, 8), torch.eye(3)[torch.arange(200) % 3]
        >>> theirs = LeaceEraser.fit(x + z @ torch.randn(3, 8), z)
        >>> ours = from_concept_erasure(theirs)
        >>> tuple(theirs.proj_left.shape), ours.rank, torch.allclose(ours(x), theirs(x), atol=1e-5)
        ((8, 3), 2, True)
    """
    if not isinstance(eraser, LeaceEraser):
        raise InputError(
            f"got {type(eraser).__name__}; needed a concept_erasure.LeaceEraser (of a fitter pass fitter.eraser)."
        )
    left, right, bias = eraser.proj_left, eraser.proj_right, eraser.bias
    if left.ndim == right.ndim == 2 and left.shape[1] == right.shape[0]:
        used = left.ne(0).any(dim=0) & right.ne(0).any(dim=1)
        left, right = left[:, used], right[used]
    if bias is None:
        return Eraser(left, right, torch.zeros_like(left[:, :1]).sum(1))
    # Statistics and factors may differ in dtype; the wider one holds both exactly.
    dtype = torch.promote_types(left.dtype, bias.dtype)
    return Eraser(left.to(dtype), right.to(dtype), bias.to(dtype))
