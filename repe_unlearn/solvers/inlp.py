"""INLP: iterative nullspace projection."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from repe_unlearn.eraser import Eraser
from repe_unlearn.errors import InputError, NoConceptWarning, NotEnoughDataError, NumericalWarning, ShapeError

from .logistic import Probing
from .rows import Rows

_TOLERANCE = 1e-4  # the loss is then exact to about 1e-8, far below what another sample would change


def inlp(
    x: Tensor,
    z: Tensor,
    *,
    rounds: int = 50,
    heldout: Tensor | None = None,
    ridge: float = 1e-2,
    slack: float = 2.0,
    affine: bool = True,
) -> Eraser:
    """Return the orthogonal projection after which a fresh linear probe names held-out classes at chance.

    Every round trains a logistic probe on the rows projected so far; if it reads the held-out rows above chance,
    its k - 1 directions are removed too. It works on rows, not on Moments: a probe is not a function of second
    moments. The claim is the stopping rule, a measurement on the held-out rows. Cov(x, z) is small afterwards but
    not zero; ``leace`` makes it zero, with k - 1 directions in all. INLP is here as the field's baseline.

    Classes weigh the same in training and in the accuracy, so chance is 1/k however unequal the classes are. The
    result is deterministic; the basis is kept orthonormal to rounding (each new direction is orthogonalised twice),
    so that a hundred rounds drift no more than one. The rows are factorized once, so that a round costs little more
    than the thin products of its Newton steps.

    Args:
        x: ``[n, d]`` activations, any floating dtype; computed in float64.
        z: ``[n]`` integer class ids.
        rounds: largest number of rounds, at least 1.
        heldout: ``[n]`` True where a row only measures. Default: every fourth row of each class, in order. Give
            it when rows share content (prompts of one pair, tokens of one prompt), which must not be split.
        ridge: penalty of the probe, as a share of the mean variance of x.
        slack: standard errors above chance that the held-out accuracy may have when the rounds stop.
        affine: keep the mean of x.

    Returns:
        Orthogonal eraser of rank at most ``min(d, rounds (k - 1))``; rank 0 with a NoConceptWarning if the first
        probe is at chance. A NumericalWarning if the rounds did not suffice.

    Raises:
        ShapeError: x, z or heldout of another shape, or real-valued z.
        InputError: rounds, ridge or slack out of range.
        NotEnoughDataError: one class, or a class without a training or held-out row.
        NonFiniteError: NaN or infinity in x.

    Reference:
        Ravfogel, Elazar, Gonen, Twiton, Goldberg: Null it out: guarding protected attributes by iterative
        nullspace projection, ACL 2020, arXiv 2004.07667.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> x, z = torch.randn(400, 6, generator=g), torch.arange(400) % 2
        >>> x[:, 0] += 3 * z
        >>> e = inlp(x, z)
        >>> e.rank, round(float(e.right[0, 0].abs()), 1)
        (1, 1.0)
    """
    if rounds < 1:
        raise InputError(f"got rounds={rounds}; needed at least 1.")
    if not slack >= 0:
        raise InputError(f"got slack={slack!r}; needed a number of standard errors >= 0, usually 1 to 3.")
    rows = Rows.of(x, z)
    held = _every_fourth(rows) if heldout is None else _mask(heldout, rows)
    chance, error = 1 / rows.k, _standard_error(rows, held)
    train_z, held_z = rows.z[~held], rows.z[held]
    weight = (1 / torch.bincount(train_z, minlength=rows.k).to(torch.float64))[train_z]
    share = weight / weight.sum()
    centre = share @ rows.x[~held]
    train_x, held_x = rows.x[~held] - centre, rows.x[held] - centre
    cov = train_x.T @ (share[:, None] * train_x)

    probing = Probing.of(train_x, train_z, cov, ridge=ridge, weight=weight)
    basis, accuracy = train_x.new_zeros(rows.moments.d, 0), 1.0
    for _ in range(rounds + 1):  # one more, which only measures
        probe = probing.fit(tolerance=_TOLERANCE)
        guess = (held_x @ probe.weights + probe.intercepts).argmax(1)
        accuracy = _balanced(guess, held_z, rows.k)
        if accuracy <= chance + slack * error or basis.shape[1] >= min(rounds * (rows.k - 1), rows.moments.d):
            break
        wider = _extend(basis, probe.weights)
        if wider.shape[1] == basis.shape[1]:
            break
        basis, probing = wider, probing.without(wider[:, basis.shape[1] :])
    _warn(accuracy, chance, slack * error, basis)
    return Eraser(basis, basis.T, rows.moments.mean_x if affine else torch.zeros_like(rows.moments.mean_x))


def _every_fourth(rows: Rows) -> Tensor:
    held = torch.zeros(len(rows.z), dtype=torch.bool, device=rows.z.device)
    for c in range(rows.k):
        held[(rows.z == c).nonzero()[:, 0][3::4]] = True
    if int(rows.counts.min()) < 4:
        raise NotEnoughDataError(
            f"got a class with {int(rows.counts.min())} rows; needed at least 4, of which one is held out. "
            "Capture more prompts."
        )
    return held


def _mask(heldout: Tensor, rows: Rows) -> Tensor:
    if heldout.shape != rows.z.shape or heldout.dtype != torch.bool:
        raise ShapeError(
            f"got heldout {heldout.dtype} {tuple(heldout.shape)}; needed a bool tensor {tuple(rows.z.shape)}."
        )
    held = heldout.detach().to(rows.z.device)
    for name, part in (("training", rows.z[~held]), ("held-out", rows.z[held])):
        if int(torch.bincount(part, minlength=rows.k).min()) == 0:
            raise NotEnoughDataError(f"a class has no {name} row; needed at least one of every class.")
    return held


def _standard_error(rows: Rows, held: Tensor) -> float:
    """Standard error of the balanced accuracy of guessing."""
    counts = torch.bincount(rows.z[held], minlength=rows.k).to(torch.float64)
    p = 1 / rows.k
    return math.sqrt(p * (1 - p) * float((1 / counts).sum())) / rows.k


def _balanced(guess: Tensor, z: Tensor, k: int) -> float:
    """Mean over the classes of the share of rows that are named right."""
    hits = torch.bincount(z[guess == z], minlength=k)
    return float((hits.to(torch.float64) / torch.bincount(z, minlength=k)).mean())


def _extend(basis: Tensor, weights: Tensor) -> Tensor:
    """Return the orthonormal basis with the range of the weights added."""
    u, s, _ = torch.linalg.svd(weights, full_matrices=False)
    u = u[:, s > 1e-7 * s.max()]  # k columns that sum to zero span k - 1 directions
    room = basis.shape[0] - basis.shape[1]
    u = u[:, :room]
    for _ in range(2):  # twice is enough (Kahan): the second pass removes what the first left by cancellation
        u = torch.linalg.qr(u - basis @ (basis.T @ u)).Q
    return torch.cat([basis, u], dim=1)


def _warn(accuracy: float, chance: float, margin: float, basis: Tensor) -> None:
    if basis.shape[1] == 0:
        warnings.warn(
            f"the first linear probe names {accuracy:.3f} of the held-out rows, chance is {chance:.3f}: the eraser "
            "is the identity. If this is not expected, check labels and tokens.",
            NoConceptWarning,
            stacklevel=3,
        )
    elif accuracy > chance + margin and basis.shape[1] < basis.shape[0]:
        warnings.warn(
            f"after {basis.shape[1]} directions a linear probe still names {accuracy:.3f} of the held-out rows, "
            f"chance is {chance:.3f}; the eraser is usable but leaks. Allow more rounds, or use leace.",
            NumericalWarning,
            stacklevel=3,
        )
