"""What the tensors of a checkpoint are called in the model, and which part of a parameter each of them holds."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from repe_unlearn.errors import ModelMismatchError
from repe_unlearn.export.safetensors_io import TensorSpec
from repe_unlearn.families import FAMILIES, Experts, Family, Index, disk_names

__all__ = ["Parameter", "Piece", "parameters"]


@dataclass(frozen=True, slots=True)
class Piece:
    """One tensor of a checkpoint and the part of a parameter that it holds.

    Attributes:
        spec: of the tensor on disk.
        index: cuts it out of the parameter.
    """

    spec: TensorSpec
    index: Index = ()


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of the model and where its values lie on disk.

    Attributes:
        shape: in the model.
        pieces: together they are the parameter, in the order of its elements.
    """

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    def locate(self, position: int) -> tuple[Piece, int]:
        """Return the piece that holds an element of the flattened parameter, and the element's place in it."""
        for piece in self.pieces:
            size = math.prod(piece.spec.shape)
            if position < size:
                return piece, position
            position -= size
        raise IndexError(position)


def parameters(model_type: str, specs: Mapping[str, TensorSpec]) -> dict[str, Parameter]:
    """Return the parameters of a model by their names in memory, given the tensors of its checkpoint.

    Names of unknown families, and of what no row names, are those of the checkpoint.

    Args:
        model_type: of the config.
        specs: the tensors on disk by name.

    Raises:
        ModelMismatchError: an expert or a part of one is missing.

    Example:
        >>> spec = TensorSpec("embed_out.weight", "F32", (9, 4))
        >>> list(parameters("gpt_neox", {spec.name: spec}))
        ['lm_head.weight']
    """
    rows = [row for row in FAMILIES if model_type in row.model_types]
    stacks = {e.path: e for row in rows for layout in row.layouts for e in layout.experts() if e.disk}
    found: dict[str, Parameter] = {}
    apart: dict[str, dict[tuple[int, int], TensorSpec]] = {}
    for spec in specs.values():
        name = _in_memory(spec.name, rows)
        for stack, base, expert, part in _in_stack(name, stacks):
            apart.setdefault(base + stack.path, {})[expert, part] = spec
            break
        else:
            # A name that goes to another tensor as well is none of ours.
            known = name if name == spec.name or name not in specs else spec.name
            found[known] = Parameter(spec.shape, (Piece(spec),))
    for name, parts in apart.items():
        stack = next(stack for path, stack in stacks.items() if name.endswith(path))
        found[name] = _stacked(name, len(stack.disk), parts)
    return found


def _in_memory(name: str, rows: list[Family]) -> str:
    for row in rows:
        turned = name
        for memory, disk in row.disk.items():
            turned = f".{turned}".replace(f".{disk}.", f".{memory}.", 1).removeprefix(".")
        if turned != name and disk_names(row.model_types[0], turned)[0][0] == name:
            return turned
    return name


def _in_stack(name: str, stacks: Mapping[str, Experts]) -> Iterator[tuple[Experts, str, int, int]]:
    for stack in stacks.values():
        for part, module in enumerate(stack.disk):
            before, after = map(re.escape, module.split("{e}"))
            if match := re.fullmatch(rf"(?P<base>.*\.){before}(?P<e>\d+){after}\.weight", name):
                yield stack, match["base"], int(match["e"]), part


def _stacked(name: str, count: int, parts: Mapping[tuple[int, int], TensorSpec]) -> Parameter:
    experts = 1 + max(expert for expert, _ in parts)
    first = next(iter(parts.values()))
    missing = [(e, p) for e in range(experts) for p in range(count) if (e, p) not in parts]
    odd = [spec for spec in parts.values() if spec.shape != first.shape or len(spec.shape) != 2]
    if missing or odd:
        what = (
            f"part {missing[0][1]} of expert {missing[0][0]} is missing"
            if missing
            else f"{odd[0].name} is {list(odd[0].shape)}, {first.name} {list(first.shape)}"
        )
        raise ModelMismatchError(f"The checkpoint does not hold {name} as a whole: {what}.")
    rows, columns = first.shape
    pieces = tuple(
        Piece(parts[e, p], (e,) if count == 1 else (e, slice(p * rows, (p + 1) * rows)))
        for e in range(experts)
        for p in range(count)
    )
    return Parameter((experts, count * rows, columns), pieces)
