"""How GGUF names and lays out the parameters of a model, per architecture of llama.cpp."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from repe_unlearn.errors import ModelMismatchError, UnsupportedModelError
from repe_unlearn.export.gguf_file import GGUFFile, library

__all__ = ["Dialect", "Slot", "dialect_of"]

_QKV = ("attn_q", "attn_k", "attn_v")
_LLAMA_BIASES = (*_QKV, "attn_output", "ffn_gate", "ffn_up", "ffn_down")


@dataclass(frozen=True, slots=True)
class _Row:
    """What is special about one architecture of llama.cpp.

    Attributes:
        rotated: rows of q and k are reordered, so that pairs of rotary dimensions are neighbours.
        norm_offset: what the file's norm weights have more than the model's.
        transposed: the model stores weights in blocks [in, out] (Conv1D), the file [out, in].
        biases: tensors that may have a bias; a bias elsewhere makes llama.cpp refuse the file.
        head: the file may hold a head of its own.
        twins: further values of `config.model_type` that are one architecture to llama.cpp.
    """

    rotated: bool = False
    norm_offset: float = 0.0
    transposed: bool = False
    biases: tuple[str, ...] = _QKV
    head: bool = True
    twins: tuple[str, ...] = ()


# One row per architecture whose layout a test compares with a model that transformers loads from the file.
_ROWS: dict[str, _Row] = {
    "llama": _Row(rotated=True, biases=_LLAMA_BIASES, twins=("mistral",)),
    "qwen2": _Row(),
    "qwen2moe": _Row(),
    "qwen3": _Row(),
    "qwen3moe": _Row(),
    "gemma2": _Row(norm_offset=1.0, head=False),
    "gemma3": _Row(norm_offset=1.0),
    "phi3": _Row(biases=()),
    "starcoder2": _Row(biases=()),
    "stablelm": _Row(),
    "gpt2": _Row(transposed=True, biases=()),
}


@dataclass(frozen=True, slots=True)
class Slot:
    """Where a parameter lies in a GGUF file.

    Attributes:
        names: of its tensors: one, or several that the model keeps as one, along axis 1.
        heads: of q or k with reordered rows; 0 where rows stay in place.
        transposed: the file holds the transpose.
        offset: what the file's values have more than the model's.
    """

    names: tuple[str, ...]
    heads: int = 0
    transposed: bool = False
    offset: float = 0.0

    def from_file(self, parts: Sequence[Tensor]) -> Tensor:
        """Return the parameter as the model has it."""
        whole = torch.cat(tuple(parts), dim=1) if len(parts) > 1 else parts[0]
        if self.heads:
            whole = _swapped(whole, self.heads, -1, 2)
        if self.offset:
            whole = whole - self.offset
        return whole.T if self.transposed else whole

    def to_file(self, whole: Tensor) -> tuple[Tensor, ...]:
        """Return what the file holds of the parameter: undoes `from_file`."""
        whole = whole.T if self.transposed else whole
        if self.offset:
            whole = whole + self.offset
        if self.heads:
            whole = _swapped(whole, self.heads, 2, -1)
        return tuple(whole.chunk(len(self.names), dim=1)) if len(self.names) > 1 else (whole,)


def _swapped(rows: Tensor, heads: int, outer: Literal[-1, 2], inner: Literal[-1, 2]) -> Tensor:
    """Reorder the rows of every head: the model has two halves, the file has pairs."""
    return rows.unflatten(0, (heads, outer, inner)).transpose(1, 2).reshape(rows.shape)


@dataclass(frozen=True, slots=True, eq=False)
class Dialect:
    """The names and layouts of one GGUF file."""

    file: GGUFFile
    row: _Row
    names: Any

    def slot(self, parameter: str) -> Slot:
        """Return where a parameter lies.

        Raises:
            ModelMismatchError: this architecture has no such tensor.
        """
        path, _, leaf = parameter.rpartition(".")
        suffix = f".{leaf}" if leaf in ("weight", "bias") else ""
        if fused := re.fullmatch(r"(.*\.experts)\.gate_up_proj", parameter):
            found = [self.names.get_name(f"{fused[1]}.{name}_proj") for name in ("gate", "up")]
            suffix = ".weight"
        elif suffix:
            found = [self.names.get_name(path)]
        else:  # stacked experts are a parameter without a suffix of its own
            found, suffix = [self.names.get_name(parameter)], ".weight"
        if None in found:
            raise ModelMismatchError(
                f"the patch edits {parameter}, and a GGUF file of architecture {self.file.arch!r} has no tensor for "
                "it; use the file of the model that the patch was made for."
            )
        last = found[0].rpartition(".")[2]
        return Slot(
            tuple(f"{name}{suffix}" for name in found),
            heads=self._heads(last) if self.row.rotated else 0,
            transposed=self.row.transposed
            and found[0].startswith("blk.")
            and suffix == ".weight"
            and "norm" not in last,
            offset=self.row.norm_offset if last.endswith("norm") and suffix == ".weight" else 0.0,
        )

    def _heads(self, last: str) -> int:
        key = {"attn_q": "head_count", "attn_k": "head_count_kv"}.get(last)
        if key is None:
            return 0
        values, prefix = self.file.values, f"{self.file.arch}.attention."
        heads = values.get(prefix + key, values.get(f"{prefix}head_count"))
        if not isinstance(heads, int):
            raise UnsupportedModelError(
                f"{self.file.path} has {prefix}{key} = {heads!r}; needed one number for all layers, because the rows "
                "of q and k are reordered head by head."
            )
        return heads

    def require_bias(self, slot: Slot) -> None:
        """Refuse a new bias that llama.cpp would not read."""
        (name,) = slot.names
        if name.split(".")[-2] not in self.row.biases:
            raise UnsupportedModelError(
                f"the patch makes {name}, and llama.cpp reads no such bias for architecture {self.file.arch!r}. Fit with "
                "functools.partial(leace, affine=False), which needs no bias."
            )

    def require_head(self) -> None:
        """Refuse a head of its own where llama.cpp always uses the embedding."""
        if not self.row.head:
            raise UnsupportedModelError(
                f"the patch edits the embedding or the head, which are one tensor, and llama.cpp ties them for architecture "
                f"{self.file.arch!r}: a head of its own would not be read. Leave out the site that edits it."
            )


def dialect_of(file: GGUFFile) -> Dialect:
    """Return the names and layouts of a GGUF file.

    Raises:
        UnsupportedModelError: an architecture whose layout is not known here.
        FileFormatError: the metadata lack the number of blocks.
    """
    gguf = library()
    blocks = file.values.get(f"{file.arch}.block_count")
    row = _ROWS.get(file.arch)
    if row is None or not isinstance(blocks, int):
        raise UnsupportedModelError(
            f"{file.path} has general.architecture {file.arch!r} and {blocks} blocks; supported: "
            f"{', '.join(sorted(_ROWS))}. Use export.checkpoint and convert its folder with llama.cpp's "
            "convert_hf_to_gguf.py."
        )
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == file.arch)
    return Dialect(file, row, gguf.get_tensor_name_map(arch, blocks))
