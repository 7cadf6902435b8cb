"""Taps: read or replace the tensor at a site while a model runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from .errors import UnsupportedModelError
from .sites import Site

Tap = Callable[[Tensor], Tensor | None]
"""Gets the tensor at a site; returns its replacement or None to leave it as it is; must not write into it."""


def tap(model: nn.Module, taps: Mapping[Site, Tap]) -> ExitStack:
    """Register taps on a model and return the stack that removes them (``close()``, or ``with``).

    All or nothing: if one site is unknown no hook is left behind.

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
            stack.callback(_register(module, site, taps[site]).remove)
        return stack.pop_all()


def compiled(model: nn.Module) -> bool:
    """True when the model, or a part of it, went through ``torch.compile``."""
    return any(
        type(m).__name__ == "OptimizedModule" or getattr(m, "_compiled_call_impl", None) is not None
        for m in model.modules()
    )


def _register(module: nn.Module, site: Site, function: Tap) -> Any:
    if site.side == "output":

        def after(_module: nn.Module, _args: Any, output: Any) -> Any:
            if isinstance(output, Tensor):
                return function(output)
            if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
                new = function(output[0])
                return None if new is None else (new, *output[1:])
            raise UnsupportedModelError(
                f"{site} returns {type(output).__name__}; needed a tensor or a tuple that begins with one."
            )

        return module.register_forward_hook(after)

    def before(_module: nn.Module, args: tuple, kwargs: dict) -> Any:
        if args and isinstance(args[0], Tensor):
            new = function(args[0])
            return None if new is None else ((new, *args[1:]), kwargs)
        # Transformers passes the stream by keyword to attention modules.
        if isinstance(kwargs.get("hidden_states"), Tensor):
            new = function(kwargs["hidden_states"])
            return None if new is None else (args, {**kwargs, "hidden_states": new})
        raise UnsupportedModelError(f"{site} gets no tensor as first argument and none named hidden_states.")

    return module.register_forward_pre_hook(before, with_kwargs=True)
