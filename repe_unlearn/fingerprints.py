"""A short print that tells one set of weights from another, whatever their dtype or device."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from repe_unlearn.errors import UnsupportedModelError
from repe_unlearn.placement import require_whole, stored_parameters

__all__ = ["fingerprint"]

_SAMPLES = 64


def fingerprint(model: nn.Module) -> str:
    """Return 16 hex characters that depend on the weights, not on the device nor on float32 or bfloat16.

    Every parameter contributes its name, its shape and 64 evenly spaced elements rounded to bfloat16;
    a parameter with two names (tied embeddings) contributes once. Hooks, buffers, train / eval mode and
    `torch.compile` leave the print alone, and so does offloading by accelerate to CPU memory or disk, from
    where the values are read. Only the sampled elements travel to the CPU.

    The print identifies, it does not protect: an edit of a few single elements can miss all samples.
    A float16 copy has the same print only where float16 holds the values exactly.

    Args:
        model: any module with materialised parameters; `model.config.model_type` enters when it exists.

    Raises:
        UnsupportedModelError: a parameter has no values (meta device and not offloaded by accelerate), or the
            model is sharded over ranks or wrapped in DDP.

    Example:
        >>> from torch import nn
        >>> net = nn.Linear(4, 3)
        >>> fingerprint(net) == fingerprint(net.bfloat16())
        True
    """
    config = getattr(model, "config", None)
    require_whole(model)
    return digest(getattr(config, "model_type", ""), (_sampled(n, p) for n, p in stored_parameters(model)))


def digest(model_type: str, samples: Iterable[tuple[str, tuple[int, ...], Tensor]]) -> str:
    """Hash (name, shape, sampled values) in the order of the names; rounds the values to bfloat16.

    Apart from `fingerprint` so that a checkpoint on disk can be held against a print without building it.
    """
    state = hashlib.blake2b(str(model_type).encode(), digest_size=8)
    for name, shape, values in sorted(samples, key=lambda sample: sample[0]):
        state.update(f"\0{name}\0{'x'.join(map(str, shape))}\0".encode())
        state.update(values.to(torch.bfloat16).view(torch.int16).cpu().numpy().astype("<i2").tobytes())
    return state.hexdigest()


def sample_positions(numel: int) -> list[int]:
    """Return the flat positions that enter the print: at most 64, evenly spaced, both ends included."""
    if numel <= _SAMPLES:
        return list(range(numel))
    return [(i * (numel - 1)) // (_SAMPLES - 1) for i in range(_SAMPLES)]


def _sampled(name: str, parameter: Tensor) -> tuple[str, tuple[int, ...], Tensor]:
    if parameter.is_meta:
        raise UnsupportedModelError(
            f"Parameter {name!r} is on the meta device, never loaded or offloaded by other means than accelerate, and "
            "has no values. Load the model with its weights."
        )
    # Coordinates reach 64 elements of any layout; flattening a transposed tensor would copy all of it.
    flat = torch.tensor(sample_positions(parameter.numel()), dtype=torch.int64, device=parameter.device)
    weight = parameter.detach()
    values = weight[torch.unravel_index(flat, weight.shape)] if weight.dim() else weight.reshape(1)
    # torch.compile prefixes every name; the weights are the same.
    return name.replace("_orig_mod.", ""), tuple(parameter.shape), values
