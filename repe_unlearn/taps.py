"""Taps: read or replace the tensor at a site while a model runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from .errors import UnsupportedModelError
from .sites import Site

Tap = Callable[[Tensor], Tensor | None]
"""Gets the tensor at a site; returns its replacement or None to leave it as it is; must not write into it."""


def tap(model: nn.Module, taps: Mapping[Site, Tap]) -> ExitStack:
    """Register taps on a model and return the stack that removes them (``close()``, or ``with``).

    All or nothing: if one site is unknown no hook is left behind. Taps that meet at a module share one hook
    there; each sees what those before it made.

    Raises:
        UnknownSiteError: a site names no module of the model.
        UnsupportedModelError: the model was compiled before (hooks added now would be silently ignored).
    """
    if compiled(model):
        raise UnsupportedModelError(
            "the model was compiled with torch.compile before; hooks added now would be silently ignored. "
            "Apply the plan first and compile afterwards."
        )
    modules = {site: site.module(model) for site in taps}
    with ExitStack() as stack:
        for site, module in modules.items():
            stack.callback(_join(module, site, taps[site]))
        return stack.pop_all()


def compiled(model: nn.Module) -> bool:
    """True when the model, or a part of it, went through ``torch.compile``."""
    return any(
        type(m).__name__ == "OptimizedModule" or getattr(m, "_compiled_call_impl", None) is not None
        for m in model.modules()
    )


class _Chain:
    """The one hook on one side of a module; runs its taps in the order in which they came."""

    def __init__(self, module: nn.Module, site: Site):
        # One-tuples, because the same function may be there twice.
        self.taps: list[tuple[Tap]] = []
        # Functions, not methods: a deep copy of the model shares them, and lets go when the original does.
        if site.side == "output":
            self.handle = module.register_forward_hook(lambda _m, _args, output: self._after(site, output))
        else:
            self.handle = module.register_forward_pre_hook(
                lambda _m, args, kwargs: self._before(site, args, kwargs), with_kwargs=True
            )

    def _run(self, x: Tensor) -> Tensor | None:
        """Return what the taps make of x, None if none of them changed it."""
        changed = None
        for (function,) in tuple(self.taps):
            new = function(x)
            if new is not None:
                x = changed = new
        return changed

    def _after(self, site: Site, output: Any) -> Any:
        if isinstance(output, Tensor):
            return self._run(output)
        if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
            new = self._run(output[0])
            return None if new is None else (new, *output[1:])
        raise UnsupportedModelError(
            f"{site} returns {type(output).__name__}; needed a tensor or a tuple that begins with one."
        )

    def _before(self, site: Site, args: tuple, kwargs: dict) -> Any:
        if args and isinstance(args[0], Tensor):
            new = self._run(args[0])
            return None if new is None else ((new, *args[1:]), kwargs)
        # Transformers passes the stream by keyword to attention modules.
        if isinstance(kwargs.get("hidden_states"), Tensor):
            new = self._run(kwargs["hidden_states"])
            return None if new is None else (args, {**kwargs, "hidden_states": new})
        raise UnsupportedModelError(f"{site} gets no tensor as first argument and none named hidden_states.")


_chains: WeakKeyDictionary[nn.Module, dict[str, _Chain]] = WeakKeyDictionary()


def _join(module: nn.Module, site: Site, function: Tap) -> Callable[[], None]:
    """Add a tap to the chain on one side of a module, made if needed; return what takes it out again."""
    sides = _chains.setdefault(module, {})
    if site.side not in sides:
        sides[site.side] = _Chain(module, site)
    chain, entry = sides[site.side], (function,)
    chain.taps.append(entry)

    def leave() -> None:
        chain.taps[:] = [other for other in chain.taps if other is not entry]
        if not chain.taps:
            chain.handle.remove()
            sides.pop(site.side, None)

    return leave
