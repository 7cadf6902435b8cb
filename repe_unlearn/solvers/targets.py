"""Targets of a weight edit: what change e of a linear module's output is wanted at each of its inputs k."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from repe_unlearn.eraser import Eraser
from repe_unlearn.errors import InputError, NonFiniteError, NotEnoughDataError, ShapeError
from repe_unlearn.moments import Moments

from .agreement import require_same_x


@dataclass(frozen=True, slots=True, eq=False)
class Target:
    """A wanted change e as a function of the key k and of z, affine in both.

    The key k [m] is what the edited weight reads; z [d] is what was captured beside it
    (``capture(..., target=site)``). For a writer of the stream e moves the output of the module and the output of its
    block by the same amount, so z decides what a target such as ``c u - z`` is about: with z the block output
    (``resid_post``) the block output is steered, the residual that passes by included, as RMU trains it; with z the
    output of the module (``mlp_out``) the passing residual is left in place. Behind a post-norm (Gemma 2, OLMo 2) a
    block output is not affine in the weight; take z at the module there.

    Attributes:
        name: in words; ends up in the rule of the edit.
        wanted: ``(weight [d, m], forget, retain or None) -> Moments`` of the same keys, with e [d] in place of z.
        basis: ``[d, r]`` columns that span every e, where it is known that r < d; else None. The edit is then of
            rank r.
    """

    name: str
    wanted: Callable[[Tensor, Moments, Moments | None], Moments]
    basis: Tensor | None = None

    def __repr__(self) -> str:
        return f"Target({self.name})"


def rmu(direction: Tensor, c: float | None = None, *, times: float = 5.0) -> Target:
    """Return ``e = c u - z``: every forget position is to hold the one vector c u (RMU).

    What a gradient run of RMU converges to at its edited layer, in one step. Not recommended for other than
    comparison: the edit is mostly a detector of the topic that writes the one direction u, which can be found and
    ablated.

    Args:
        direction: ``[d]``, made a unit vector u.
        c: length; default ``times`` root mean square lengths of z over the forget positions (adaptive RMU).
        times: used when c is None.

    Raises:
        ShapeError, NonFiniteError, InputError: direction is no finite vector other than zero, or c not finite.

    Reference:
        Li et al.: The WMDP Benchmark, ICML 2024, arXiv 2403.03218; Dang et al.: On effects of steering latent
        representation for LLM unlearning, AAAI 2025, arXiv 2408.06223 (adaptive c).
    """
    unit = _vector(direction, "direction")
    if not float(unit.norm()) > 0:
        raise InputError("got a direction of zeros; needed one that can be made a unit vector.")
    unit = unit / unit.norm()
    _finite(c=c, times=times)

    def wanted(weight: Tensor, forget: Moments, retain: Moments | None) -> Moments:
        length = times * energy(forget) ** 0.5 if c is None else c
        return _affine(weight, forget, constant=length * _fits(unit, weight, "direction"), scale=-1.0)

    return Target(f"rmu, c={f'{times:g} rms' if c is None else f'{c:g}'}", wanted)


def rmu_directions(d: int, topics: int, seed: int = 0) -> Tensor:
    """Return one direction per topic, ``[topics, d]`` float64: Gaussian, orthogonalised, of length 1.

    Each row alone is uniform on the sphere, and the same for any number of topics. Orthogonal rows keep the junk of
    one topic out of the way of another's.

    Raises:
        InputError: topics is below 1 or above d.

    Example:
        >>> u = rmu_directions(16, 3)
        >>> torch.allclose(u @ u.T, torch.eye(3).double())
        True
    """
    if not 1 <= topics <= d:
        raise InputError(f"got topics={topics} with d={d}; needed 1 to d, since directions are orthogonal.")
    generator = torch.Generator().manual_seed(seed)
    gaussian = torch.randn(topics, d, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian.T)
    return (q * r.diagonal().sign()).T.contiguous()


def mean_retain() -> Target:
    """Return ``e = mean of z over retain - z``: forget positions are to look like the average retain position."""

    def wanted(weight: Tensor, forget: Moments, retain: Moments | None) -> Moments:
        if retain is None:
            raise InputError(
                "the target mean_retain needs retain moments; give some, or use mean_of(vector)."
            )
        return _affine(
            weight, forget, constant=_fits(retain.mean_z, weight, "mean of z over retain"), scale=-1.0
        )

    return Target("mean of retain", wanted)


def mean_of(vector: Tensor) -> Target:
    """Return ``e = vector - z`` for a vector [d] of your own, such as the mean over another set of prompts.

    Raises:
        ShapeError, NonFiniteError: no vector, or not finite.
    """
    vector = _vector(vector, "vector")

    def wanted(weight: Tensor, forget: Moments, retain: Moments | None) -> Moments:
        return _affine(weight, forget, constant=_fits(vector, weight, "vector"), scale=-1.0)

    return Target("given mean", wanted)


def zero() -> Target:
    """Return ``e = -W k``: the weight is to write nothing at forget positions. z is not used; a bias stays."""

    def wanted(weight: Tensor, forget: Moments, retain: Moments | None) -> Moments:
        return _affine(weight, forget, on_keys=-weight)

    return Target("zero", wanted)


def project(eraser: Eraser | Tensor, mean: Tensor | None = None) -> Target:
    """Return ``e = eraser(z) - z``: an eraser of z, baked into the weight for forget positions only.

    The rank of the edit is at most that of the eraser.

    Args:
        eraser: of width d, from any solver; or a basis ``[d, r]`` whose span is projected away.
        mean: ``[d]`` the point that stays fixed when a basis is given; default the mean of z over forget.

    Raises:
        InputError: a basis with dependent columns, or a mean beside an eraser, which has its own.
        ShapeError, NonFiniteError: a basis that is no matrix, or not finite.
    """
    if isinstance(eraser, Eraser):
        if mean is not None:
            raise InputError("got mean= beside an eraser, which has its shift; give mean= with a basis only.")
        left, right, shift = (t.double() for t in (eraser.left, eraser.right, eraser.shift))
    else:
        left = _basis(eraser)
        right, shift = left.T, None if mean is None else _vector(mean, "mean")

    def wanted(weight: Tensor, forget: Moments, retain: Moments | None) -> Moments:
        a, b = _fits(left, weight, "eraser"), right.to(weight)
        centre = _fits(forget.mean_z if shift is None else shift, weight, "mean")
        return _affine(weight, forget, constant=a @ (b @ centre), low=(-a, b))

    return Target(f"projection, rank {left.shape[1]}", wanted, left)


def redirect(direction: Tensor, coef: float = 1.0) -> Target:
    """Return ``e = coef * direction``: forget positions are moved by one vector, as it is (LUNAR).

    Of rank 1. The direction (in LUNAR the mean of refused minus the mean of answered prompts) is to be
    taken where it shall act: at the block output or the output of the module. z is not used.

    Raises:
        ShapeError, NonFiniteError, InputError: direction is no finite vector, or coef not finite.

    Reference:
        Shen et al.: LLM Unlearning via Neural Activation Redirection, 2025, arXiv 2502.07218.
    """
    direction = _vector(direction, "direction")
    _finite(coef=coef)

    def wanted(weight: Tensor, forget: Moments, retain: Moments | None) -> Moments:
        return _affine(weight, forget, constant=coef * _fits(direction, weight, "direction"))

    return Target(f"redirect, coef={coef:g}", wanted, direction[:, None])


def values(wanted_values: Moments) -> Target:
    """Return ``e = v - W k`` with a wanted output v per key (UCE, MEMIT).

    Args:
        wanted_values: moments of the forget keys k [m] with the wanted output v [d] of the weight, without its bias,
            as z.

    Raises:
        InputError, ShapeError: when solved, if the keys are not those of the forget moments.

    Reference:
        Gandikota et al.: Unified Concept Editing in Diffusion Models, WACV 2024, arXiv 2308.14761.
    """

    def wanted(weight: Tensor, forget: Moments, retain: Moments | None) -> Moments:
        require_same_x(forget, wanted_values, "the wanted values")
        return _affine(weight, wanted_values, scale=1.0, on_keys=-weight)

    return Target("values", wanted)


def energy(m: Moments) -> float:
    """Return the mean of ``‖z‖²``."""
    return float(m.cov_zz.diagonal().sum() + m.mean_z.square().sum())


def _affine(
    weight: Tensor,
    m: Moments,
    *,
    constant: Tensor | None = None,
    scale: float = 0.0,
    low: tuple[Tensor, Tensor] | None = None,
    on_keys: Tensor | None = None,
) -> Moments:
    """Return the moments of k and ``e = constant + (scale I + low[0] low[1]) z + on_keys k``."""
    d = weight.shape[0]
    if scale or low is not None:
        _fits(m.mean_z, weight, "z")

    def map_z(z: Tensor) -> Tensor:  # [k, *] -> [d, *]
        out = scale * z if scale else z.new_zeros(d, *z.shape[1:])
        return out if low is None else out + low[0] @ (low[1] @ z)

    mean, cross, second = map_z(m.mean_z), map_z(m.m_xz.T), map_z(map_z(m.m_zz).T)
    if constant is not None:
        mean = mean + constant
    if on_keys is not None:
        mixed, own = on_keys @ cross.T, on_keys @ m.m_xx
        mean, second = mean + on_keys @ m.mean_x, second + mixed + mixed.T + own @ on_keys.T
        cross = cross + own
    return Moments(m.n, m.mean_x, mean, m.m_xx, cross.T, second)


def _vector(value: Tensor, name: str) -> Tensor:
    """Return a float64 copy of a finite vector."""
    if not isinstance(value, Tensor) or value.ndim != 1 or not value.is_floating_point():
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ShapeError(f"{name}: got {got}; needed a floating-point vector [d].")
    if not torch.isfinite(value).all():
        raise NonFiniteError(f"{name} holds NaN or infinite values; check where it comes from.")
    return value.detach().double().clone()


def _basis(value: Tensor) -> Tensor:
    """Return an orthonormal basis [d, r] of the columns of a matrix."""
    if value.ndim != 2 or not value.is_floating_point() or not 1 <= value.shape[1] <= value.shape[0]:
        raise ShapeError(f"got a basis {tuple(value.shape)}; needed floating-point [d, r] with 1 <= r <= d.")
    if not torch.isfinite(value).all():
        raise NonFiniteError("the basis holds NaN or infinite values; check where it comes from.")
    q, r = torch.linalg.qr(value.detach().double())
    diagonal = r.diagonal().abs()
    if not bool((diagonal > 1e-10 * value.double().norm(dim=0)).all()):
        raise InputError("got a basis with dependent columns; drop those that the others span.")
    return q


def _fits(rows: Tensor, weight: Tensor, name: str) -> Tensor:
    """Return a tensor [d, ...] where the weight [d, m] is, if the two widths d agree."""
    if rows.shape[0] != weight.shape[0]:
        raise ShapeError(
            f"{name}: got width {rows.shape[0]}; the weight {tuple(weight.shape)} writes {weight.shape[0]}. "
            "Capture with target=Site(...) at the output of the block or of the module."
        )
    return rows.to(weight)


def _finite(**numbers: float | None) -> None:
    for name, value in numbers.items():
        if value is not None and not abs(value) < float("inf"):
            raise InputError(f"got {name}={value}; needed a finite number.")


def usable(m: Moments, name: str, *, d: int | None = None) -> None:
    """Refuse moments of no rows, of other keys, or with NaN.

    Raises:
        ShapeError, NotEnoughDataError, NonFiniteError: width, count or content.
    """
    if d is not None and m.d != d:
        raise ShapeError(f"{name}: got keys of width {m.d}; the weight reads {d}. Capture at its input.")
    if not m.n > 0:
        raise NotEnoughDataError(f"{name}: got no rows; check the token selection and the prompts.")
    for field in ("mean_x", "mean_z", "m_xx", "m_xz", "m_zz"):
        if not torch.isfinite(getattr(m, field)).all():
            raise NonFiniteError(
                f"{name}: Moments.{field} holds NaN or infinite values; check the activations it was made from."
            )
