"""Write steering vectors as the control-vector file that llama.cpp adds to the residual stream."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from repe_unlearn.errors import InputError, NonFiniteError, ShapeError
from repe_unlearn.export.gguf_file import library, new_file

__all__ = ["control_vector"]


def control_vector(
    directions: Mapping[int, Tensor], out: str | Path, *, model_hint: str, force: bool = False
) -> Path:
    """Write vectors that llama.cpp (`--control-vector`) adds to the residual stream, the same for every token.

    Such a file can add and nothing else: an erasure takes away an amount that depends on the token, so a plan or a
    patch is refused.

    Args:
        directions: layer -> vector [d], added to the output of that block times the strength given to llama.cpp.
            Layers count from 0, and llama.cpp cannot reach layer 0 or the embedding.
        out: file to make.
        model_hint: architecture of the model in llama.cpp, e.g. "llama"; for people, llama.cpp does not check it.
        force: replace an `out` that exists.

    Returns:
        `out`.

    Raises:
        InputError: no direction, layer 0 or a negative one, all zeros, or something that is no addition.
        ShapeError: vectors that are no vectors, or of different widths.
        NonFiniteError: NaN or infinity, in float32 too.
        OutputExistsError: `out` exists and `force` is off.
        MissingDependencyError: the package `gguf` is not installed.

    Example:
        `export.control_vector({12: positive_mean - negative_mean}, "calm.gguf", model_hint="llama")`
    """
    vectors = _checked(directions)
    gguf = library()
    with new_file(Path(out), force=force) as partial:
        writer = gguf.GGUFWriter(partial, "controlvector")
        writer.add_string("controlvector.model_hint", model_hint)
        writer.add_uint32("controlvector.layer_count", len(vectors))
        for layer, vector in sorted(vectors.items()):
            writer.add_tensor(f"direction.{layer}", vector.numpy())
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()
    return Path(out)


def _checked(directions: Mapping[int, Tensor]) -> dict[int, Tensor]:
    if not isinstance(directions, Mapping):
        raise InputError(
            f"got a {type(directions).__name__}; needed a mapping of layer -> vector. A control vector adds the same "
            "numbers to every token; an erasure subtracts what each token has of a direction, which no control vector "
            "can. Use export.gguf or export.checkpoint for a patch, and apply() for a plan."
        )
    if not directions:
        raise InputError("got no direction; needed at least one.")
    wrong = [
        layer for layer in directions if isinstance(layer, bool) or not isinstance(layer, int) or layer < 1
    ]
    if wrong:
        raise InputError(
            f"got layer {wrong[0]!r}; needed whole numbers from 1 on: llama.cpp adds after block N counted from 0, and "
            "refuses block 0."
        )
    vectors = {layer: torch.as_tensor(v).detach().to("cpu", torch.float32) for layer, v in directions.items()}
    shapes = {tuple(vector.shape) for vector in vectors.values()}
    if len(shapes) > 1 or len(next(iter(shapes))) != 1:
        raise ShapeError(f"got directions of shapes {sorted(shapes)}; needed vectors of one width.")
    for layer, vector in vectors.items():
        if not torch.isfinite(vector).all():
            raise NonFiniteError(f"the direction of layer {layer} holds NaN or infinite values in float32.")
        if not vector.any():
            raise InputError(f"the direction of layer {layer} is all zeros; leave it out.")
    return {layer: vector.contiguous().clone() for layer, vector in vectors.items()}
