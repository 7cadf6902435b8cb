"""Interventions: run a module while tensors inside it are watched, nudged or held at earlier values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .sites import Side


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a module: what it got and what it gave, tensors copied."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    raw: Any

    @property
    def input(self) -> Tensor | None:
        """The first tensor that went in, by the rule of taps: what a site on the input side means."""
        return _first_input(self.args, self.kwargs)

    @property
    def output(self) -> Tensor | None:
        """The first tensor that came out: the output itself, or the head of a tuple or of a model output."""
        if isinstance(self.raw, tuple):
            head = self.raw[0] if self.raw else None
        else:
            head = next(iter(self.raw.values()), None) if isinstance(self.raw, Mapping) else self.raw
        return head if isinstance(head, Tensor) else None


Trace = dict[str, list[Call]]
"""Every call of every watched module that ran, by module path ('' is the module that was run)."""


def run(
    root: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    watch: Iterable[str],
    frozen: Mapping[str, list[Call]] | None = None,
    nudge: Mapping[tuple[str, Side], Tensor] | None = None,
    parameters: Mapping[str, Tensor] | None = None,
) -> Trace:
    """Run a module once and return what its parts read and wrote; no hook is left behind, also after an error.

    Args:
        root: the module to call.
        args: what to call it with; never written into.
        kwargs: the same by keyword.
        watch: paths of the modules to record, '' for the root.
        frozen: path -> earlier calls whose outputs the module gives again instead of its own.
        nudge: (path, side) -> what is added to the first tensor there (of the same size, or broadcast). It is
            added after freezing.
        parameters: path -> what to use instead of the module's own parameter, which stays.

    Returns:
        The calls in the order of the paths' first calls.
    """
    frozen, nudge = frozen or {}, nudge or {}
    trace: Trace = {}
    entered: dict[str, list[tuple[tuple, dict]]] = {}

    def before(path: str, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        step = nudge.get((path, "input"))
        if step is not None:
            args, kwargs = _with_first_input(args, kwargs, step)
        entered.setdefault(path, []).append(_copied(args, kwargs))
        return args, kwargs

    def after(path: str, output: Any) -> Any:
        calls = trace.setdefault(path, [])
        if path in frozen and len(calls) < len(frozen[path]):
            output = _copy(frozen[path][len(calls)].raw)
        step = nudge.get((path, "output"))
        if step is not None:
            output = _nudged(output, step)
        calls.append(Call(*entered[path].pop(), _copy(output)))
        return output

    with ExitStack() as stack:
        for path in {*watch, *frozen, *(path for path, _ in nudge)}:
            module = root.get_submodule(path)
            pre = module.register_forward_pre_hook(
                lambda _m, args, kwargs, path=path: before(path, args, kwargs), with_kwargs=True
            )
            post = module.register_forward_hook(lambda _m, _args, output, path=path: after(path, output))
            stack.callback(pre.remove)
            stack.callback(post.remove)
        args, named = _copied(args, kwargs)
        torch.func.functional_call(root, dict(parameters or {}), args, named)
    return trace


def replay(module: nn.Module, call: Call, step: Tensor, parameters: Mapping[str, Tensor]) -> list[Tensor]:
    """Repeat a call with ``step`` added to its input and other parameters; return all float tensors it gives.

    The module keeps its own parameters.
    """
    args, kwargs = _copied(*_with_first_input(call.args, call.kwargs, step))
    output = torch.func.functional_call(module, dict(parameters), args, kwargs)
    parts = output if isinstance(output, tuple) else (output,)
    return [part for part in parts if isinstance(part, Tensor) and part.is_floating_point()]


def _copied(args: tuple, kwargs: Mapping[str, Any]) -> tuple[tuple, dict[str, Any]]:
    return _copy(args), {key: _copy(value) for key, value in kwargs.items()}


def _first_input(args: tuple, kwargs: dict) -> Tensor | None:
    head = args[0] if args else kwargs.get("hidden_states")
    return head if isinstance(head, Tensor) else None


def _with_first_input(args: tuple, kwargs: dict, step: Tensor) -> tuple[tuple, dict]:
    if args and isinstance(args[0], Tensor):
        return (_nudged(args[0], step), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": _nudged(kwargs["hidden_states"], step)}


def _nudged(value: Any, step: Tensor) -> Any:
    if isinstance(value, tuple):
        return (_nudged(value[0], step), *value[1:])
    return value + (step.reshape(value.shape) if step.numel() == value.numel() else step)


def _copy(value: Any) -> Any:
    # Models add in place: a recorded tensor must not change afterwards, nor may a replayed one be used up.
    if isinstance(value, Tensor):
        return value.clone()
    return tuple(_copy(part) for part in value) if type(value) is tuple else value
