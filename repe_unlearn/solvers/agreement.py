"""Check that two moments were taken over the same activations."""

from __future__ import annotations

import torch

from repe_unlearn.errors import InputError, NonFiniteError, ShapeError
from repe_unlearn.moments import Moments

from .linalg import scales

# Two passes over the same activations differ by rounding; another token selection differs far more.
_SAME = 1e-8


def require_same_x(a: Moments, b: Moments, name: str) -> None:
    """Refuse ``b`` unless its count, mean and covariance of x are those of ``a`` to 1e-8.

    Means are compared relative to the standard deviation and the mean of each coordinate, covariances
    relative to both standard deviations, so that units do not matter.

    Args:
        a: moments of x [d] and one concept.
        b: moments of the same x and another concept.
        name: what to call ``b`` in messages.

    Raises:
        ShapeError: the widths of x differ.
        NonFiniteError: NaN or infinity in ``b``.
        InputError: the samples of x differ.

    Example:
        >>> x = torch.tensor([[0.0, 1.0], [2.0, 1.0], [4.0, 4.0]])
        >>> a, b = Moments.of(x, torch.tensor([0, 0, 1])), Moments.of(x, torch.tensor([0, 1, 1]))
        >>> require_same_x(a, b, "the second concept")
    """
    if a.d != b.d:
        raise ShapeError(f"{name}: got moments of width d={b.d}; needed d={a.d}, from the same activations.")
    for field in ("mean_x", "mean_z", "m_xx", "m_xz", "m_zz"):
        if not torch.isfinite(getattr(b, field)).all():
            raise NonFiniteError(
                f"{name}: Moments.{field} holds NaN or infinite values; check the activations it was made from."
            )
    if not abs(a.n - b.n) <= _SAME * a.n:
        raise InputError(
            f"{name}: got moments of {b.n:g} samples; needed those of the same {a.n:g} activations. "
            "Capture both concepts with the same prompts and the same token selection."
        )
    std, _ = scales(a)
    off_mean = float(((a.mean_x - b.mean_x).abs() / (std + a.mean_x.abs())).max())
    off_cov = float(((a.cov_xx - b.cov_xx).abs() / std[:, None] / std).max())
    if off_mean > _SAME or off_cov > _SAME:
        raise InputError(
            f"{name}: got moments of other activations (relative difference {off_mean:.1e} in the mean of x, "
            f"{off_cov:.1e} in its covariance); needed at most {_SAME:.0e}. Capture both concepts with the "
            "same prompts and the same token selection."
        )
