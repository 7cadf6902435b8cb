"""Write a patch as the LoRA adapter that llama.cpp adds to a GGUF file at run time, packed or not."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from repe_unlearn.errors import InputError, ModelMismatchError, UnsupportedModelError
from repe_unlearn.export.gguf_file import GGUFFile, library, new_file, read_gguf
from repe_unlearn.export.gguf_names import Slot, dialect_of
from repe_unlearn.export.gguf_source import check_model, check_values, values_of
from repe_unlearn.export.lora_tensors import Factors, factors, refuse_biases
from repe_unlearn.patch import Patch

__all__ = ["gguf_lora"]

_EMBEDDING = "token_embd.weight"
# llama.cpp looks these up without asking whether an adapter has something to add.
_NEVER_ADAPTED = ("position_embd.weight", "token_types.weight")


def gguf_lora(
    source: str | Path,
    patch: Patch,
    out: str | Path,
    *,
    max_rank: int | None = None,
    dtype: torch.dtype = torch.float32,
    model: nn.Module | None = None,
    check_fingerprint: bool = True,
    force: bool = False,
) -> Path:
    """Write the edits of `patch` as a GGUF adapter for `source`, which stays as it is; whole or not at all.

    llama.cpp (`--lora`, `Llama(lora_path=)`) adds the adapter's products to the outputs of the weights, so the edits hold
    in full on packed files too (Q4_1, Q6_K ...), where `gguf` would have to round them.

    Args:
        source: GGUF file of the unedited model, of an architecture that `gguf` supports.
        patch: edits of weights, experts too; no biases.
        out: file to make.
        max_rank: cut edits of higher rank, dense ones too, to their best approximation of this rank. None: dense
            edits are refused, no other is cut.
        dtype: of the adapter, float32 or float16.
        model: the unedited model. Give it where the file does not hold its very values (packed, or rounded to F16):
            every edited tensor is then held against the model's.
        check_fingerprint: without `model`, refuse a file whose values are not those the patch was made for.
        force: replace an `out` that exists.

    Returns:
        `out`.

    Raises:
        InputError: biases, vectors, a dense edit without `max_rank`, another dtype.
        UnsupportedModelError: an unknown architecture, an embedding that is tied to the head, or an edit of a table
            that llama.cpp reads without asking for adapters.
        ModelMismatchError: the file or `model` is not what the patch was made for.
        FileFormatError, OutputExistsError, MissingDependencyError: as for `gguf`.

    Example:
        `export.gguf_lora("SmolLM2.Q4_1.gguf", patch, "no-gender.gguf", model=model)`
    """
    if dtype not in (torch.float32, torch.float16):
        raise InputError(f"got dtype {dtype}; needed torch.float32 or torch.float16.")
    refuse_biases(patch)
    if vectors := sorted(name for name, edit in patch.edits.items() if len(edit.shape) < 2):
        raise InputError(f"the patch edits the vector {vectors[0]}, which no adapter can; use export.gguf.")
    file = read_gguf(Path(source))
    dialect = dialect_of(file)
    check_model(dialect, patch, model, check_fingerprint)
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for name, edit in patch.edits.items():
        slot = dialect.slot(name)
        _require(file, name, slot)
        if model is not None:
            check_values(model, patch, name, values_of(file, slot, edit.shape))
        for tensor, down, up in _pairs(slot, factors(name, edit, max_rank), edit.shape):
            _fits(file, tensor, down, up)
            pairs[tensor] = (down, up)
    rank = max(1, *(down.shape[-2] for down, _ in pairs.values()))
    gguf = library()
    with new_file(Path(out), force=force) as partial:
        writer = gguf.GGUFWriter(partial, file.arch)
        writer.add_string("general.type", "adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", float(rank))  # divided by the rank of the tensors
        writer.add_string("repe_unlearn.version", importlib.metadata.version("repe-unlearn"))
        writer.add_string("repe_unlearn.fingerprint", patch.fingerprint)
        writer.add_string("repe_unlearn.exactness", json.dumps(dict(patch.exactness)))
        for name, (down, up) in pairs.items():
            a = nn.functional.pad(down, (0, 0, 0, rank - down.shape[-2]))
            b = nn.functional.pad(up, (0, rank - up.shape[-1]))
            a = a.T if name == _EMBEDDING else a  # looked up by token, row by row
            writer.add_tensor(f"{name}.lora_a", a.to(dtype).contiguous().numpy())
            writer.add_tensor(f"{name}.lora_b", b.to(dtype).contiguous().numpy())
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()
    return Path(out)


def _require(file: GGUFFile, parameter: str, slot: Slot) -> None:
    name = slot.names[0]
    if name in _NEVER_ADAPTED:
        raise UnsupportedModelError(
            f"the patch edits {parameter}, and llama.cpp reads {name} without asking whether an adapter has something to "
            "add. Use export.gguf."
        )
    if name in (_EMBEDDING, "output.weight") and "output.weight" not in file.entries:
        raise UnsupportedModelError(
            f"the patch edits {parameter}, and {file.path} has one tensor for embedding and head, where llama.cpp cannot "
            "adapt one of the two. Use export.gguf, which gives the head a tensor of its own, or leave out that site."
        )
    if lacking := [name for name in slot.names if name not in file.entries]:
        raise ModelMismatchError(
            f"the patch edits {parameter}, and {file.path} has no {lacking[0]}; use the file of the model that the patch "
            "was made for."
        )


def _pairs(slot: Slot, product: Factors, shape: tuple[int, ...]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield (tensor of the file, A [..., r, in], B [..., out, r]) for one edited parameter."""
    # A factor without a leading axis is shared by all experts.
    left, right = (side.expand(*shape[:-2], *side.shape[-2:]) for side in (product.left, product.right))
    if slot.names[0] == _EMBEDDING:  # its rows are inputs, not outputs
        yield _EMBEDDING, left.mT, right.mT
        return
    down, whole = (left.mT, right) if slot.transposed else (right, left)
    for name, up in zip(slot.names, slot.to_file(whole), strict=True):
        yield name, down, up


def _fits(file: GGUFFile, name: str, down: Tensor, up: Tensor) -> None:
    added = (up.shape[-2], down.shape[-1]) if name != _EMBEDDING else (down.shape[-1], up.shape[-2])
    held = file.entries[name].shape
    if (*up.shape[:-2], *added) != (held if len(held) > 1 else (1, *held)):
        raise ModelMismatchError(
            f"the edit of {name} is for shape {[*up.shape[:-2], *added]}; {file.path} has {list(held)}."
        )
