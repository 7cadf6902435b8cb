"""Patch: edits of named parameters that can be applied, taken back, saved and exported."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor, nn

from .edit import Edit
from .errors import FileFormatError, InputError, ModelMismatchError, ShapeError, UnsupportedModelError
from .fingerprints import fingerprint
from .tables import html_table
from .tensorfile import read_tensors, write_tensors

_KIND = "patch"
_VERSION = 1


@dataclass(frozen=True, slots=True, eq=False)
class PatchRow:
    """One line of ``Patch.report()``: norms are Frobenius norms, ``relative`` is change over weight."""

    name: str
    rule: str
    rank: int | None
    norm: float
    relative: float


@dataclass(frozen=True, slots=True, eq=False)
class Patch:
    """An immutable set of weight edits for one model: apply, take back bit for bit, save, export.

    Args:
        edits: parameter name -> edit, names as in ``model.named_parameters()``.
        fingerprint: of the model that the edits were made for.
        new_biases: parameters (name -> shape) that do not exist yet and start as zeros.
        zero_biases: further biases that come into being with ``config_updates`` and stay zero.
        config_updates: config keys that tell plain transformers to expect those biases.
        tied: (embedding, head) parameter names when the head must be untied first, else None.
        adapter: the tie is to be kept in files, where the edit of one of the two belongs in an adapter
            (``export.lora``) and not in a checkpoint. In memory ``apply_`` unties all the same.
        exactness: site -> exactness class of its bake.
        provenance: facts that travel along.

    Raises:
        InputError: no edit.
    """

    edits: Mapping[str, Edit]
    fingerprint: str
    new_biases: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    zero_biases: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    config_updates: Mapping[str, object] = field(default_factory=dict)
    tied: tuple[str, str] | None = None
    exactness: Mapping[str, str] = field(default_factory=dict)
    provenance: Mapping[str, str] = field(default_factory=dict)
    adapter: bool = False

    def __post_init__(self) -> None:
        if not self.edits:
            raise InputError("got a patch without edits; needed at least one.")
        for name in ("edits", "new_biases", "zero_biases", "config_updates", "exactness", "provenance"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))

    @property
    def untie(self) -> bool:
        """True when the head must become a tensor of its own."""
        return self.tied is not None

    def __len__(self) -> int:
        return len(self.edits)

    def __repr__(self) -> str:
        biases = len(self.new_biases)
        return f"Patch({len(self)} edited tensors, {biases} of them new biases, model={self.fingerprint})"

    def _repr_html_(self) -> str:
        largest = sorted(self.report(), key=lambda row: row.norm, reverse=True)[:8]
        rows = [(row.name, row.rule, row.rank or "full", f"{row.norm:.3g}") for row in largest]
        return html_table(repr(self), ("largest edits", "rule", "rank", "norm"), rows, len(self))

    def apply_(self, model: nn.Module) -> Patch:
        """Edit the weights in place; ``revert_`` restores every bit, and so does a failure on the way.

        Memory: a copy of every edited tensor is kept until ``revert_`` or until the model is freed.

        Raises:
            ModelMismatchError: the model is not the one this patch was made for, or is patched already.
            UnsupportedModelError: an edited weight is quantised or not in memory.
        """
        if model in _ORIGINALS:
            raise ModelMismatchError("this model carries a patch already; revert_ that one first.")
        found = fingerprint(model)
        if found != self.fingerprint:
            raise ModelMismatchError(
                f"the patch was made for fingerprint {self.fingerprint}; this model has {found}. Load the "
                "same checkpoint."
            )
        undo = _Undo()
        try:
            self._edit(model, undo)
        except BaseException:
            undo.run(model)
            raise
        _ORIGINALS[model] = (self, undo)
        return self

    def _edit(self, model: nn.Module, undo: _Undo) -> None:
        if self.tied is not None:
            undo.untie(model, *self.tied)
        undo.config(model, {**self.config_updates, **({"tie_word_embeddings": False} if self.untie else {})})
        for name, shape in {**self.zero_biases, **self.new_biases}.items():
            undo.add_bias(model, name, shape)
        for name, edit in self.edits.items():
            parameter = _parameter(model, name)
            new = edit.apply(parameter.data)
            undo.keep(name, parameter)
            parameter.data.copy_(new)

    def revert_(self, model: nn.Module) -> Patch:
        """Put back exactly the weights that ``apply_`` replaced.

        Raises:
            ModelMismatchError: this patch is not active on the model.
        """
        active = _ORIGINALS.get(model)
        if active is None or active[0] is not self:
            raise ModelMismatchError(
                "this patch is not active on the model; apply_ it first (or reload the checkpoint)."
            )
        active[1].run(model)
        del _ORIGINALS[model]  # only now: an interrupted revert can be repeated
        return self

    def report(self, model: nn.Module | None = None) -> tuple[PatchRow, ...]:
        """Return norm and rank of every edit; ``relative`` is NaN without the unpatched model or for zeros."""
        rows = []
        for name, edit in self.edits.items():
            weight = None if model is None or name in self.new_biases else _parameter(model, name)
            size = 0.0 if weight is None else float(weight.double().norm())
            relative = edit.norm() / size if size else float("nan")
            rows.append(PatchRow(name, edit.rule, edit.rank, edit.norm(), relative))
        return tuple(rows)

    def save(self, path: str | Path, *, force: bool = False) -> Path:
        """Write one safetensors file, atomically.

        Raises:
            OutputExistsError: the file exists and ``force`` is False.
        """
        tensors: dict[str, Tensor] = {}
        for i, edit in enumerate(self.edits.values()):
            tensors[f"{i}.left"] = edit.left
            if edit.right is not None:
                tensors[f"{i}.right"] = edit.right
        header = {
            "names": list(self.edits),
            "rules": [edit.rule for edit in self.edits.values()],
            "fingerprint": self.fingerprint,
            "new_biases": {k: list(v) for k, v in self.new_biases.items()},
            "zero_biases": {k: list(v) for k, v in self.zero_biases.items()},
            "config_updates": dict(self.config_updates),
            "tied": self.tied,
            "adapter": self.adapter,
            "exactness": dict(self.exactness),
            "provenance": dict(self.provenance),
        }
        return write_tensors(path, tensors, kind=_KIND, version=_VERSION, header=header, force=force)

    @classmethod
    def load(cls, path: str | Path) -> Patch:
        """Read what ``save`` wrote.

        Raises:
            FileFormatError: truncated, foreign or newer file.
        """
        tensors, header = read_tensors(path, kind=_KIND, version=_VERSION)
        try:
            edits = {
                name: Edit(tensors[f"{i}.left"], tensors.get(f"{i}.right"), rule)
                for i, (name, rule) in enumerate(zip(header["names"], header["rules"], strict=True))
            }
            return cls(
                edits,
                header["fingerprint"],
                {k: tuple(v) for k, v in header["new_biases"].items()},
                {k: tuple(v) for k, v in header["zero_biases"].items()},
                header["config_updates"],
                tuple(header["tied"]) if header["tied"] else None,
                header["exactness"],
                header["provenance"],
                header.get("adapter", False),  # files of 0.1.0 lack it
            )
        except (KeyError, ShapeError, ValueError) as error:
            raise FileFormatError(f"{path} is not a whole patch ({error}); save it again.") from error


class _Undo:
    """What it takes to put a model back exactly."""

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}
        self._biases: list[str] = []
        self._config: dict[str, object] = {}
        self._tie: tuple[str, nn.Parameter] | None = None

    def keep(self, name: str, parameter: nn.Parameter) -> None:
        self._kept[name] = parameter.data.clone()

    def add_bias(self, model: nn.Module, name: str, shape: tuple[int, ...]) -> None:
        module = model.get_submodule(name.rpartition(".")[0])
        if getattr(module, "bias", None) is not None:
            raise ModelMismatchError(f"the patch adds {name}, but the model has that bias already.")
        weight = module.weight
        assert isinstance(weight, Tensor)
        module.bias = nn.Parameter(
            torch.zeros(shape, dtype=weight.dtype, device=weight.device), requires_grad=False
        )
        self._biases.append(name)

    def config(self, model: nn.Module, updates: Mapping[str, object]) -> None:
        for key, value in updates.items():
            self._config[key] = getattr(model.config, key)
            setattr(model.config, key, value)

    def untie(self, model: nn.Module, embedding: str, head: str) -> None:
        module = model.get_submodule(head.rpartition(".")[0])
        weight = module.weight
        assert isinstance(weight, nn.Parameter)
        if weight is not _parameter(model, embedding):
            return  # a model loaded with a head of its own
        self._tie = (head, weight)
        module.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)

    def run(self, model: nn.Module) -> None:
        for name, original in self._kept.items():
            if name not in self._biases:
                _parameter(model, name).data.copy_(original)
        for name in self._biases:
            module = model.get_submodule(name.rpartition(".")[0])
            module.bias = None  # type: ignore[assignment]
        if self._tie is not None:
            model.get_submodule(self._tie[0].rpartition(".")[0]).weight = self._tie[1]
        for key, value in self._config.items():
            setattr(model.config, key, value)


_ORIGINALS: weakref.WeakKeyDictionary[nn.Module, tuple[Patch, _Undo]] = weakref.WeakKeyDictionary()


def is_quantised(weight: Tensor) -> bool:
    """True for integer and one-byte float weights: they mean nothing without their scales."""
    return not weight.is_floating_point() or weight.dtype.itemsize < 2


def _parameter(model: nn.Module, name: str) -> nn.Parameter:
    path, _, leaf = name.rpartition(".")
    try:
        parameter = getattr(model.get_submodule(path), leaf)
    except AttributeError:
        parameter = None
    if parameter is None:
        raise ModelMismatchError(
            f"the patch edits {name}, which this model does not have; it was made for another model."
        )
    if parameter.is_meta:
        raise UnsupportedModelError(
            f"{name} is not in memory (offloaded); patch the checkpoint on disk with "
            "export.checkpoint instead."
        )
    if is_quantised(parameter):
        raise UnsupportedModelError(
            f"{name} is quantised ({parameter.dtype}); bake from the full-precision checkpoint."
        )
    return parameter
