"""Placement: where a model's weights lie, and whether this process can run it as one whole model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from .errors import UnsupportedModelError


def require_whole(model: nn.Module) -> None:
    """Refuse a model of which this process holds only a part, or that is wrapped by another module.

    Sharded weights (FSDP, tensor parallel) are gathered by collective calls that all ranks have to make in step.
    A capture stops the forward in the middle and gives every rank batches of its own, so ranks would wait for each
    other for ever; under tensor parallelism the tensor at a site is moreover a part or an unfinished sum.

    Raises:
        UnsupportedModelError: the reason, and what to do instead.
    """
    if isinstance(model, DistributedDataParallel | DataParallel):
        raise UnsupportedModelError(
            f"got a model wrapped in {type(model).__name__}, whose module names all begin with 'module.'; pass "
            "model.module. Under torchrun each rank takes its share of the prompts by itself."
        )
    # By name: importing torch.distributed.fsdp or tensor costs seconds, and no such model exists without the import.
    kinds = {type(module).__name__ for module in model.modules()}
    kinds |= {type(parameter).__name__ for parameter in model.parameters()}
    if sharded := kinds & {"FullyShardedDataParallel", "DTensor"}:
        what = (
            "FSDP"
            if "FullyShardedDataParallel" in sharded
            else "FSDP2 or tensor parallelism (DTensor weights)"
        )
        raise UnsupportedModelError(
            f"got a model sharded over ranks by {what}; needed one that this process can run alone, because the forward "
            "stops early and every rank has other prompts. Load it whole: device_map='auto' spreads it over the GPUs "
            "of one process and offloads the rest, and torchrun shards the prompts."
        )
    if (getattr(model, "tp_size", None) or 1) > 1:
        raise UnsupportedModelError(
            f"got a model with tensor parallelism over {model.tp_size} ranks, whose sites hold parts or unfinished "
            "sums; load it without tp_plan, e.g. with device_map='auto'."
        )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode for a while; afterwards every module is in the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def input_device(model: nn.Module) -> torch.device:
    """Return the device on which a model takes its inputs, also where accelerate has offloaded its weights.

    Raises:
        UnsupportedModelError: the weights were never loaded (meta device without an offload hook).
    """
    # Module order is registration order: the embeddings come first in every family.
    for module in model.modules():
        for hook in _hooks(module):
            device = getattr(hook, "execution_device", None)
            if device is not None and next(module.parameters(recurse=False), None) is not None:
                return torch.device(device)
    parameter = next(model.parameters(), None)
    if parameter is None:
        return torch.device("cpu")
    if parameter.is_meta:
        raise UnsupportedModelError(
            f"the weights of this {type(model).__name__} are on the meta device and no accelerate hook holds them; "
            "load the model first."
        )
    return parameter.device


def stored_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield name and value of every parameter, each tensor once; offloaded ones are read from where they are kept.

    A tied tensor goes by the name that transformers keeps it by in files, whichever of its modules comes first
    (XLM-RoBERTa registers its head before its embeddings). A parameter without values (meta device, no offload hook) is
    yielded as it is.
    """
    # Tied weights are one parameter as long as they are loaded and two once they are offloaded.
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    every = {_plain(name): p for name, p in model.named_parameters(remove_duplicate=False)}
    for name, parameter in model.named_parameters():
        if not parameter.is_meta:
            home = tied.get(_plain(name), name)
            yield (home if every.get(home) is parameter else name), parameter
            continue
        path, _, leaf = name.rpartition(".")
        maps = [
            hook.weights_map
            for hook in _hooks(model.get_submodule(path))
            if getattr(hook, "weights_map", None) is not None
        ]
        if maps and name in tied:
            continue
        yield name, maps[0][leaf] if maps else parameter


def _plain(name: str) -> str:
    """Return a name without the prefix of torch.compile."""
    return name.replace("_orig_mod.", "")


def _hooks(module: nn.Module) -> tuple[Any, ...]:
    """Return accelerate's hooks on a module; several sit in one SequentialHook."""
    hook = getattr(module, "_hf_hook", None)
    return () if hook is None else tuple(getattr(hook, "hooks", (hook,)))
