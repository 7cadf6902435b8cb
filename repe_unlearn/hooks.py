"""Apply: an erasure plan as runtime hooks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType

import torch
from torch import Tensor, nn

from .eraser import Eraser
from .errors import InputError, ShapeError
from .plan import ErasurePlan
from .sites import Site
from .taps import tap


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


def apply(model: nn.Module, plan: ErasurePlan, *, strength: float = 1.0) -> Applied:
    """Erase at every site of a plan whenever the model runs, from now until the returned handle is removed.

    Every position is erased, in prompts and in generation, with or without a key-value cache. The arithmetic
    is in float32 at least (float64 in a float64 model) and the result is cast back to the model's dtype. The
    model is otherwise untouched; if any site is unknown no hook is left behind.

    Args:
        model: the model that the plan was fit on.
        plan: what to erase where.
        strength: 1 erases, 0 does nothing, in between moves part of the way (see ``Eraser.partial``).

    Returns:
        A handle with ``remove()``, also usable as ``with apply(model, plan): ...``.

    Raises:
        ModelMismatchError: the plan was fit on another model.
        UnknownSiteError: a site names no module of the model.
        UnsupportedModelError: the model was compiled before.
        InputError: strength is not a finite number.

    Example:
        ``with apply(model, plan): model.generate(**inputs)``
    """
    if not torch.isfinite(torch.tensor(float(strength))):
        raise InputError(f"got strength={strength!r}; needed a finite number.")
    plan.require(model)
    erasers = {
        site: e if strength == 1.0 else e.partial(strength) for site, e in plan.erasers.items() if e.rank
    }
    return Applied(tap(model, {site: fused(eraser) for site, eraser in erasers.items()}), tuple(erasers))


def fused(eraser: Eraser) -> Callable[[Tensor], Tensor]:
    """Return the eraser as two matrix products, shift folded in, its factors kept per device and dtype."""
    ready: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor, Tensor]] = {}

    def erase(x: Tensor) -> Tensor:
        if x.shape[-1] != eraser.dim:
            raise ShapeError(
                f"got activations of width {x.shape[-1]}; the eraser at this site needs {eraser.dim}."
            )
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
        erased = torch.addmm(rows, torch.addmm(offset, rows, right), left, alpha=-1)
        return erased.to(x.dtype).reshape(x.shape)

    return erase
