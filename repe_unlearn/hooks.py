"""Apply: a plan as runtime hooks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .eraser import Eraser
from .errors import InputError, ShapeError
from .gate import Gate
from .plan import ErasurePlan
from .positions import Call, Clock, for_apply, watch
from .sites import Site
from .steering import Steer, SteeringPlan
from .taps import Tap, tap
from .tokens import Select

Schedule = Callable[[int], float]


class Applied:
    """A plan that is active on a model until ``remove()`` or the end of ``with``; may be removed twice."""

    def __init__(self, stack: ExitStack, sites: tuple[Site, ...]):
        self._stack = stack
        self.sites = sites

    def remove(self) -> None:
        """Take the hooks off the model."""
        self._stack.close()

    def __enter__(self) -> Applied:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"Applied({len(self.sites)} sites)"


def apply(
    model: nn.Module,
    plan: ErasurePlan | SteeringPlan,
    *,
    strength: float | Mapping[Site, float] = 1.0,
    schedule: Schedule | None = None,
    select: Select | str | None = None,
    gate: Gate | None = None,
    tokenizer: Any = None,
) -> Applied:
    """Erase at every site of a plan whenever the model runs, from now until the returned handle is removed.

    Without ``select``, ``schedule`` and ``gate`` every position is erased, in prompts and in generation. With
    them a position is edited by ``strength * schedule(number)`` where it is selected and the gate has fired,
    and comes through bit for bit elsewhere. All of it holds with or without a key-value cache, under padding
    on either side, prefill in chunks and beam search. The arithmetic is in float32 at least (float64 in a
    float64 model), also under autocast, and the result is cast back to the model's dtype. The model is
    otherwise untouched; if anything is refused no hook is left behind.

    Plans that meet at a module share one hook there and act in the order in which they were applied.

    Args:
        model: the model that the plan was fit on.
        plan: what to erase where, or where to steer to; a steering plan brings its own gate.
        strength: 1 erases, 0 does nothing, in between moves part of the way (see ``Eraser.partial``); or one
            such number per site, 1 for sites that are not named.
        schedule: from the number of a generated token (0 for the first that is fed back) to a factor on the
            strength; prompt tokens get ``schedule(-1)``.
        select: which positions are edited, a ``Select`` or its text form; None for all. Its text kinds need
            the text and only work on capture.
        gate: edits act only where it fires; it must run before every site of the plan.
        tokenizer: looks up special tokens and texts of tokens that ``select`` names.

    Returns:
        A handle with ``remove()``, also usable as ``with apply(model, plan): ...``.

    Raises:
        ModelMismatchError: the plan was fit on another model.
        UnknownSiteError: a site names no module of the model.
        UnsupportedModelError: the model was compiled before; with select, schedule or gate also an
            encoder-decoder, and assisted decoding when it is asked for.
        InputError: a strength that is not finite or names no site of the plan, or a selection that has no meaning
            while a model runs. In the first forward: a site runs before its gate.

    Example:
        ``with apply(model, plan, select="all,phase=generation,specials"): model.generate(**inputs)``
    """
    steering = isinstance(plan, SteeringPlan)
    moves: Mapping[Site, Eraser | Steer] = plan.steers if steering else plan.erasers
    if steering and gate is None:
        gate = plan.gate
    strengths = _strengths(strength, moves)
    plan.require(model)
    chosen = None if select is None else for_apply(_parsed(select), tokenizer)
    moves = {
        site: e if strengths[site] == 1.0 else e.partial(strengths[site])
        for site, e in moves.items()
        if e.rank and strengths[site]
    }
    with ExitStack() as stack:
        weights = None
        if chosen is not None or schedule is not None or gate is not None:
            clock, leave = watch(model)
            stack.callback(leave)
            weights = _Weights(clock, chosen, schedule, gate)
            if gate is not None:
                listen = weights.listen
                stack.enter_context(tap(model, {gate.site: lambda x: listen(x)}))
        stack.enter_context(tap(model, {site: _edit(site, e, weights) for site, e in moves.items()}))
        return Applied(stack.pop_all(), tuple(moves))


def _parsed(select: Select | str) -> Select:
    return Select.parse(select) if isinstance(select, str) else select


def _strengths(strength: float | Mapping[Site, float], sites: Iterable[Site]) -> dict[Site, float]:
    sites = tuple(sites)
    given = strength if isinstance(strength, Mapping) else dict.fromkeys(sites, strength)
    for site, value in given.items():
        if site not in sites:
            raise InputError(
                f"got a strength for {site}, which the plan does not hold; name sites of the plan."
            )
        if not math.isfinite(value):
            raise InputError(f"got strength={value!r}; needed a finite number.")
    return {site: float(given.get(site, 1.0)) for site in sites}


class _Weights:
    """How much of the edit each token of the running call gets; the same at every site of one plan."""

    _count = itertools.count()

    def __init__(self, clock: Clock, select: Select | None, schedule: Schedule | None, gate: Gate | None):
        self._clock, self._select, self._schedule, self._gate = clock, select, schedule, gate
        self._key = f"gate {next(self._count)}"
        self._factors: dict[int, float] = {}
        self._opened: tuple[Call, Tensor] | None = None
        self._ready: tuple[Call, Tensor] | None = None

    def listen(self, x: Tensor) -> None:
        """Let the gate decide, at its site."""
        assert self._gate is not None
        self._opened = (self._clock.now(), self._gate.decide(x, self._clock, self._key))

    def at(self, site: Site, x: Tensor) -> Tensor:
        """Return the weight of every row of x, ``[b * t, 1]``."""
        call = self._clock.now()
        if self._ready is None or self._ready[0] is not call:
            self._ready = (call, self._of(call, site, x))
        rows = call.shape[0] * call.shape[1]
        if x.numel() != rows * x.shape[-1]:
            call.rows_of(x[..., 0], site)  # says what does not fit
        return self._ready[1].to(x.device)

    def _of(self, call: Call, site: Site, x: Tensor) -> Tensor:
        weight = torch.ones(call.shape, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        if self._schedule is not None:
            weight = weight * weight.new_tensor([self._factor(n, self._schedule) for n in call.numbers])
        if self._select is not None:
            weight = weight * call.selected(self._select).to(x.device)
        if self._gate is not None:
            if self._opened is None or self._opened[0] is not call:
                raise InputError(
                    f"{site} runs before the gate at {self._gate.site}; a gate must come first. Nothing was applied: "
                    "choose an earlier site for the gate, or later ones for the plan."
                )
            weight = weight * self._opened[1].to(x.device)
        return weight.reshape(-1, 1)

    def _factor(self, number: int, schedule: Schedule) -> float:
        if number not in self._factors:
            value = float(schedule(number))
            if not math.isfinite(value):
                raise InputError(f"got schedule({number}) = {value!r}; needed a finite number.")
            self._factors[number] = value
        return self._factors[number]


def _edit(site: Site, move: Eraser | Steer, weights: _Weights | None) -> Tap:
    erase: Erase = fused(move) if isinstance(move, Eraser) else move
    if weights is None:
        return erase
    return lambda x: erase(x, weights.at(site, x))


class Erase(Protocol):
    """Returns erased activations, same shape and dtype as x [..., d]."""

    def __call__(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """Erase every row, or row i by ``weight[i]`` with weight ``[n, 1]``: 0 leaves it bit for bit."""
        ...


def fused(eraser: Eraser) -> Erase:
    """Return the eraser as two matrix products, shift folded in, its factors kept per device and dtype."""
    ready: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor, Tensor]] = {}

    def erase(x: Tensor, weight: Tensor | None = None) -> Tensor:
        if x.shape[-1] != eraser.dim:
            raise ShapeError(
                f"got activations of width {x.shape[-1]}; the eraser at this site needs {eraser.dim}."
            )
        # Autocast would run the products in half precision.
        if torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                return products(x, weight)
        return products(x, weight)

    def products(x: Tensor, weight: Tensor | None) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        key = (x.device, dtype)
        if key not in ready:
            parts = (eraser.right.T, eraser.left.T, -(eraser.right @ eraser.shift))
            # The first run may be under inference_mode, a later one may need gradients: keep ordinary tensors.
            with torch.inference_mode(False):
                right, left, offset = (
                    part.to(*key).clone(memory_format=torch.contiguous_format) for part in parts
                )
            ready[key] = (right, left, offset)
        right, left, offset = ready[key]
        rows = x.reshape(-1, x.shape[-1]).to(dtype)
        read = torch.addmm(offset, rows, right)
        if weight is None:
            return torch.addmm(rows, read, left, alpha=-1).to(x.dtype).reshape(x.shape)
        erased = torch.addmm(rows, read * weight.to(dtype), left, alpha=-1)
        # A selection, not a product with 0: an infinite value there would become NaN.
        return torch.where(weight != 0, erased, rows).to(x.dtype).reshape(x.shape)

    return erase
