"""Named tensors of a model in memory or of a checkpoint folder, read one by one under the names of the model."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from .errors import FileFormatError, UnsupportedModelError
from .export.folder import read_json
from .export.places import Place, place
from .export.safetensors_io import headers, read_tensor
from .families import FAMILIES, Index, Read, disk_names
from .fingerprints import fingerprint
from .patch import is_quantised

__all__ = ["Weights", "weights_of"]


@dataclass(frozen=True, slots=True)
class Weights:
    """What both a folder and a model are: named tensors to be read one by one."""

    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], Tensor]
    config: Mapping[str, Any]
    model_type: str
    tie: tuple[str, str] | None
    print: str = ""


def weights_of(source: str | Path | nn.Module) -> Weights:
    """Return the tensors of a folder (or URL) with config.json and safetensors, or of a model in memory.

    Raises:
        FileFormatError: no such folder, or damaged.
        UnsupportedModelError: a weight is quantised or offloaded.
    """
    return _of_model(source) if isinstance(source, nn.Module) else _of_folder(place(source))


def _of_model(model: nn.Module) -> Weights:
    parameters: dict[str, Tensor] = {}
    first: dict[int, str] = {}
    tie = None
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.is_meta or is_quantised(parameter):
            raise UnsupportedModelError(
                f"{name} is quantised or not in memory; compare the full-precision folders instead."
            )
        if id(parameter) in first:
            tie = (first[id(parameter)], name)
        else:
            first[id(parameter)] = name
            parameters[name] = parameter.detach()
    config: Any = getattr(model, "config", None)
    facts = {} if config is None else config.to_dict()
    shapes = {name: tuple(p.shape) for name, p in parameters.items()}
    if tie is not None:
        parameters[tie[1]] = parameters[tie[0]]
    return Weights(
        shapes,
        lambda name: parameters[name].cpu(),
        facts,
        facts.get("model_type", ""),
        tie,
        fingerprint(model),
    )


def _of_folder(folder: Place) -> Weights:
    if not (folder / "config.json").is_file():
        raise FileFormatError(f"{folder} is no checkpoint folder: it has no config.json.")
    config = read_json(folder / "config.json")
    model_type = str(config.get("model_type", ""))
    found = headers(folder)
    home = {name: header for header in found.values() for name in header.specs}
    for name in [name for name in home if name.endswith((".inv_freq", ".attn.masked_bias"))]:
        del home[name]  # buffers that old checkpoints hold

    def read(name: str) -> Tensor:
        tensor = read_tensor(home[name], name)
        if is_quantised(tensor):
            raise UnsupportedModelError(
                f"{name} in {folder} is quantised ({tensor.dtype}); compare the full-precision folders instead."
            )
        return tensor

    shapes, pieces = _in_memory(model_type, {name: header.specs[name].shape for name, header in home.items()})

    def whole(name: str) -> Tensor:
        name = tie[0] if tie is not None and name == tie[1] else name
        if len(pieces[name]) == 1:
            return read(pieces[name][0][0])
        parts = [(read(piece), where) for piece, where in pieces[name]]
        stack = torch.empty(shapes[name], dtype=parts[0][0].dtype)
        for part, where in parts:
            stack[where] = part
        return stack

    tie = None
    tie = _tie(model_type, config, shapes, whole)
    if tie is not None:
        shapes.pop(tie[1], None)  # one parameter under two names counts once
    return Weights(shapes, whole, config, model_type, tie)


_Pieces: TypeAlias = dict[str, tuple[tuple[str, Index], ...]]


def _in_memory(
    model_type: str, stored: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, tuple[int, ...]], _Pieces]:
    """Return shapes and pieces by the parameter names of the model, where checkpoints have names of their own."""
    shapes: dict[str, tuple[int, ...]] = {}
    pieces: _Pieces = {}
    for name, shape in _candidates(model_type, stored).items():
        parts = disk_names(model_type, name, shape)
        # Not so in a file that was saved with the names of the model.
        if name not in stored and all(part in stored for part, _ in parts):
            shapes[name], pieces[name] = shape, parts
    mapped = {part for parts in pieces.values() for part, _ in parts}
    for name in sorted(set(stored) - mapped):
        shapes[name], pieces[name] = stored[name], ((name, ()),)
    return shapes, pieces


def _candidates(model_type: str, stored: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Return the parameters that tensors of a file may be, with their shapes."""
    row = next((row for row in FAMILIES if model_type in row.model_types), None)
    if row is None:
        return {}
    stacks = {path: stack for layout in row.layouts for stack in layout.experts() for path in stack.disk}
    found: dict[str, tuple[int, ...]] = {}
    for disk, shape in stored.items():
        name = disk
        for old, new in reversed(list(row.disk.items())):
            name = f".{name}".replace(f".{new}.", f".{old}.", 1).removeprefix(".")
        for path, stack in stacks.items():
            expert = re.fullmatch(r"(.*\.)" + re.escape(f"{path}.weight").replace(r"\{e\}", r"(\d+)"), name)
            if expert is not None:
                name = expert[1] + stack.path
                count = max(int(expert[2]) + 1, *found.get(name, (0,))[:1])
                shape = (count, len(stack.disk) * shape[0], shape[1])
                break
        found[name] = shape
    return found


def _tie(
    model_type: str, config: Mapping[str, Any], stored: Mapping[str, object], read: Callable[[str], Tensor]
) -> tuple[str, str] | None:
    """Return (embedding, head) where they are one parameter: a head that is not stored, or stored twice."""
    for row in FAMILIES:
        if model_type in row.model_types and isinstance(row.final, Read) and row.final.readers:
            pair = f"{row.embeddings[0]}.weight", f"{row.final.readers[0]}.weight"
            if pair[0] not in stored or config.get("tie_word_embeddings") is False:
                continue
            if pair[1] not in stored or torch.equal(read(pair[0]), read(pair[1])):
                return pair
    return None
