"""An erased model without hooks: for torch.export, ONNX and every runtime that traces modules."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import Tensor, nn

from repe_unlearn.eraser import Eraser
from repe_unlearn.errors import ShapeError, UnsupportedModelError
from repe_unlearn.plan import ErasurePlan
from repe_unlearn.sites import Site
from repe_unlearn.taps import compiled

__all__ = ["Erase", "torch_module"]

# In eval mode these compute with the weights of their parts and never call the parts themselves.
_FAST_PATHS = (nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.MultiheadAttention)


def torch_module(model: nn.Module, plan: ErasurePlan) -> nn.Module:
    """Return a model that computes what ``model`` computes under ``apply(model, plan)``, without any hook.

    The erasers are buffers of submodules named ``erase_input`` and ``erase_output``, so they are in the
    ``state_dict``, move with ``to`` and are traced by ``torch.export.export`` like everything else; all other names
    stay as they are. The result is of the same class, can be deep-copied and pickled, and shares the memory of its
    weights with ``model``, which is untouched (``copy.deepcopy`` it to have them apart).

    Unlike ``bake`` it takes every site that hooks take, the residual stream too; the weights stay unedited, so who
    has the file has the concept.

    Args:
        model: the model that the plan was fit on, in the dtype that it will run in: the erasers are kept in
            float32 at least, and a cast of the result casts them too.
        plan: what to erase where, at every position.

    Raises:
        ModelMismatchError: the plan was fit on another model.
        UnknownSiteError: a site names no module.
        UnsupportedModelError: a plan is applied to the model, accelerate offloads it, it was compiled or scripted,
            or a site names a module that is never called.

    Example:
        ``torch.export.export(torch_module(model, plan), (), {"input_ids": ids, "use_cache": False}, strict=False)``
    """
    plan.require(model)
    _refuse_hooks(model)
    for site in plan.sites:
        _refuse_uncalled(model, site)
    erased = copy.deepcopy(model, _shared_weights(model))
    for site, eraser in plan.erasers.items():
        if eraser.rank:
            _insert(erased, site, eraser)
    return erased


class Erase(nn.Module):
    """``x -> x - (x - shift) rightᵀ leftᵀ`` with the three tensors as buffers, shapes as in ``Eraser``."""

    left: Tensor
    right: Tensor
    shift: Tensor

    def __init__(self, eraser: Eraser):
        super().__init__()
        for name in ("left", "right", "shift"):
            self.register_buffer(name, getattr(eraser, name))

    def forward(self, x: Tensor) -> Tensor:
        """Return erased activations, same shape and dtype as x [..., d]; float32 arithmetic at least.

        Raises:
            ShapeError: x has another width.
        """
        if x.shape[-1] != self.shift.shape[0]:
            raise ShapeError(
                f"got activations of width {x.shape[-1]}; the eraser here needs {self.shift.shape[0]}."
            )
        if torch.is_autocast_enabled(x.device.type):  # it would run the products in half precision
            with torch.autocast(x.device.type, enabled=False):
                return self._erased(x)
        return self._erased(x)

    def _erased(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        y = x.to(wide)
        read = (y - self.shift.to(wide)) @ self.right.to(wide).T
        return (y - read @ self.left.to(wide).T).to(x.dtype)

    def extra_repr(self) -> str:
        """Show width and rank."""
        return f"d={self.left.shape[0]}, rank={self.left.shape[1]}"


def _insert(model: nn.Module, site: Site, eraser: Eraser) -> None:
    module = site.module(model)
    like = next((p for p in (*module.parameters(), *model.parameters()) if p.is_floating_point()), None)
    device = None if like is None else like.device
    dtype = torch.float32 if like is None else torch.promote_types(like.dtype, torch.float32)
    if not isinstance(module, _Erased):
        # A subclass, not a wrapper: models read attributes of their parts, and names of weights must not change.
        module.__class__ = _erased_class(type(module))
    name = f"erase_{site.side}"
    if name not in module._modules:
        module.add_module(name, nn.Sequential())
    # Two sites may name one module by two paths; like hooks they act in the order of the plan.
    module.get_submodule(name).append(Erase(eraser.to(device, dtype)))  # type: ignore[operator]  # a Sequential


class _Erased:
    """Marks the classes that ``_erased_class`` makes."""


@functools.cache
def _erased_class(base: type[nn.Module]) -> type[nn.Module]:
    """Return a subclass that applies ``erase_input`` and ``erase_output``, where it has them, around the forward."""

    @functools.wraps(base.forward)  # transformers and torch.export read the signature
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        parts = self._modules
        if (before := parts.get("erase_input")) is not None:
            args, kwargs = _with_input(before, args, kwargs)
        output = base.forward(self, *args, **kwargs)
        return output if (after := parts.get("erase_output")) is None else _with_output(after, output)

    def reduce(self: nn.Module, protocol: int) -> Any:
        return _blank, (base,), self.__dict__  # the class has no name that pickle could find it by

    names = {
        "forward": forward,
        "__reduce_ex__": reduce,
        "__module__": base.__module__,
        "__doc__": base.__doc__,
    }
    return type(base.__name__, (_Erased, base), names)


def _blank(base: type[nn.Module]) -> nn.Module:
    made = _erased_class(base)
    return made.__new__(made)


def _with_input(erase: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    if args and isinstance(args[0], Tensor):
        return (erase(args[0]), *args[1:]), kwargs
    # Transformers passes the stream by keyword to attention modules.
    if isinstance(kwargs.get("hidden_states"), Tensor):
        return args, {**kwargs, "hidden_states": erase(kwargs["hidden_states"])}
    raise UnsupportedModelError(
        "a module with an eraser at its input gets no tensor as first argument and none named hidden_states; "
        "choose a site whose module does."
    )


def _with_output(erase: nn.Module, output: Any) -> Any:
    if isinstance(output, Tensor):
        return erase(output)
    if type(output) is tuple and output and isinstance(output[0], Tensor):
        return (erase(output[0]), *output[1:])
    raise UnsupportedModelError(
        f"a module with an eraser at its output returns {type(output).__name__}; needed a tensor or a tuple that "
        "begins with one. Choose a site inside it."
    )


def _shared_weights(model: nn.Module) -> dict[int, Any]:
    """Return the memo of a deep copy that makes new parameters on the old memory, ties kept."""
    # Parameters of other classes (quantised ones) carry more than their tensor: they are copied.
    plain = (p for p in model.parameters() if type(p) is nn.Parameter)
    return {id(p): nn.Parameter(p.detach(), requires_grad=p.requires_grad) for p in plain}


def _refuse_hooks(model: nn.Module) -> None:
    """Refuse hooks that a copy must not take along; those that belong to the model (transformers') it keeps."""
    for name, module in model.named_modules():
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        ours = any(str(getattr(hook, "__module__", "")).startswith("repe_unlearn.") for hook in hooks)
        if ours or hasattr(module, "_hf_hook"):
            whose, remedy = (
                ("a plan or a capture", "remove it first (applied.remove())")
                if ours
                else ("accelerate", "load the model without device_map")
            )
            raise UnsupportedModelError(
                f"{name or type(model).__name__} carries a hook of {whose}; {remedy}."
            )
    if compiled(model):
        raise UnsupportedModelError(
            "the model was compiled with torch.compile before; make the erased module first and compile that."
        )


def _refuse_uncalled(model: nn.Module, site: Site) -> None:
    """Refuse sites whose forward would never run, so that nothing would be erased there."""
    module = site.module(model)
    if isinstance(module, torch.jit.ScriptModule):
        reason = "it is scripted"
    elif type(module).forward is nn.Module.forward:
        reason = f"{type(module).__name__} only holds other modules and is never called"
    else:
        around = (site.path[:i] for i, letter in enumerate(site.path) if letter == ".")
        owner = next((p for p in around if isinstance(model.get_submodule(p), _FAST_PATHS)), None)
        if owner is None:
            return
        reason = f"{owner} ({type(model.get_submodule(owner)).__name__}) has a fast path that does not call its parts"
    raise UnsupportedModelError(f"{site} cannot hold an eraser: {reason}. Choose another site.")
