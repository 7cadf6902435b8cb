"""Gate: a linear test at one site that decides where edits at later sites act."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .errors import InputError, NonFiniteError, NotEnoughDataError, ShapeError
from .moments import Moments
from .positions import Clock
from .shrinkage import Shrinkage
from .sites import Site
from .solvers.leace import leace
from .tokens import Select

_PROMPT = Select("all", sinks=0, specials=True, phase="prompt")


@dataclass(frozen=True, slots=True, eq=False)
class Gate:
    """Fires at a token where ``weight . x > threshold`` at its site; edits elsewhere act only where it fired.

    Args:
        site: where x is read: before or at the first site that it governs, in the order in which the model
            runs. At the same site it reads what comes in, before the plan's own edit.
        weight: ``[d]``.
        threshold: in the units of ``weight . x``.
        per: ``"token"`` decides for every token alone. ``"sequence"`` fires for a row from the first token of
            its *prompt* that passes, and stays on for the rest of the prompt and all that is generated;
            generated tokens never switch it. Beams of one prompt share it, so reordering them changes nothing.

    Raises:
        ShapeError: weight is not a floating-point vector.
        NonFiniteError: NaN or infinity.
        InputError: an unknown ``per``.

    Example:
        >>> gate = Gate(Site("model.layers.3"), torch.tensor([1.0, 0.0]), threshold=0.5)
        >>> gate.fires(torch.tensor([[2.0, 0.0], [0.0, 2.0]])).tolist()
        [True, False]
    """

    site: Site
    weight: Tensor
    threshold: float
    per: Literal["token", "sequence"] = "token"

    def __post_init__(self) -> None:
        if (
            not isinstance(self.weight, Tensor)
            or self.weight.ndim != 1
            or not self.weight.is_floating_point()
        ):
            got = tuple(self.weight.shape) if isinstance(self.weight, Tensor) else type(self.weight).__name__
            raise ShapeError(f"Gate.weight: got {got}; needed a floating-point vector [d].")
        object.__setattr__(self, "weight", self.weight.detach().clone())
        object.__setattr__(self, "threshold", float(self.threshold))
        if not (torch.isfinite(self.weight).all() and math.isfinite(self.threshold)):
            raise NonFiniteError(
                "the gate's weight or threshold is NaN or infinite; fit it on finite moments."
            )
        if self.per not in ("token", "sequence"):
            raise InputError(f"got per={self.per!r}; needed 'token' or 'sequence'.")

    @classmethod
    def fit(
        cls,
        moments: Moments,
        site: Site,
        *,
        fires_on: int = 1,
        per: Literal["token", "sequence"] = "token",
        shrinkage: Shrinkage = "olse",
    ) -> Gate:
        """Return the linear discriminant between two classes with its threshold at the midpoint of their means.

        The direction is ``Σxx⁻¹ (mean of one class - mean of the other)``, which is that of the within-class
        discriminant; it depends on no units of x. The two classes weigh the same whatever their counts.

        Args:
            moments: of a concept with two classes, from ``capture(...)[site]``.
            site: where they were captured.
            fires_on: the class (0 or 1) that opens the gate.
            per: see ``Gate``.
            shrinkage: of the covariance, see ``leace``.

        Raises:
            InputError: not two classes, or ``fires_on`` is not one of them.
            NotEnoughDataError: a class is absent or does not differ from the other in mean.
        """
        if moments.k != 2 or fires_on not in (0, 1):
            raise InputError(
                f"got moments of {moments.k} concept columns and fires_on={fires_on!r}; needed two classes and one of "
                "them (0 or 1)."
            )
        eraser = leace(moments, shrinkage=shrinkage)
        if eraser.rank != 1:
            raise NotEnoughDataError(
                "the two classes do not differ in mean at this site; choose another one."
            )
        weight = eraser.right[0]
        # One-hot z: the covariance with a column is n_c / n times the distance of that class from the mean.
        scores = weight @ (moments.mean_x[:, None] + moments.cov_xz / moments.mean_z)
        sign = 1.0 if scores[fires_on] > scores[1 - fires_on] else -1.0
        return cls(site, sign * weight, sign * float(scores.mean()), per)

    def fires(self, x: Tensor) -> Tensor:
        """Return where ``weight . x > threshold``, [...] bool, for x [..., d].

        Raises:
            ShapeError: another width.
        """
        if x.shape[-1] != self.weight.shape[0]:
            raise ShapeError(
                f"got activations of width {x.shape[-1]} at {self.site}; its gate needs {self.weight.shape[0]}."
            )
        wide = torch.promote_types(x.dtype, torch.float32)
        return (x.to(wide) * self.weight.to(x.device, wide)).sum(-1) > self.threshold

    def decide(self, x: Tensor, clock: Clock, key: str) -> Tensor:
        """Return where edits may act in the running call, ``[b, t]`` bool.

        Args:
            x: ``[b, t, d]`` at the gate's site.
            clock: of the model; keeps what a sequence needs to remember, under ``key``.
            key: unique to this use of the gate.

        Raises:
            InputError: the prompt began before the gate was there.
            ShapeError: x is not one vector per token.
        """
        call = clock.now()
        fired = call.rows_of(self.fires(x), self.site)
        if self.per == "token":
            return fired
        opened = (fired & call.selected(_PROMPT).to(fired.device)).cumsum(1) > 0
        if call.begin:
            if key not in clock.carried:
                raise InputError(
                    f"the gate at {self.site} has not seen the first {call.begin} tokens of this sequence, which are "
                    "in the cache; run the whole sequence with the plan applied."
                )
            opened = opened | clock.carried[key].to(fired.device)
        clock.carried[key] = opened[:, -1:]
        return opened
