"""Patch a GGUF file: edited tensors are written anew, everything else is copied byte for byte."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

from repe_unlearn.errors import (
    InputError,
    ModelMismatchError,
    NonFiniteError,
    NumericalWarning,
    ShapeError,
    UnsupportedModelError,
)
from repe_unlearn.export.folder import strict_json
from repe_unlearn.export.gguf_file import (
    FLOATS,
    Entry,
    GGUFFile,
    decode,
    encode,
    new_entry,
    new_file,
    read_gguf,
    write_gguf,
)
from repe_unlearn.export.gguf_names import Dialect, Slot, dialect_of
from repe_unlearn.export.gguf_source import check_model, check_values, values_of
from repe_unlearn.patch import Edit, Patch

__all__ = ["gguf"]

_SUFFIX = ".repe_manifest.json"


def gguf(
    source: str | Path,
    patch: Patch,
    out: str | Path,
    *,
    requantise: bool | str = False,
    model: nn.Module | None = None,
    check_fingerprint: bool = True,
    force: bool = False,
) -> Path:
    """Write a copy of a GGUF file with the edits of `patch`; all other tensors and all metadata stay byte for byte.

    The file appears whole or not at all, and one tensor is in memory at a time. Rows of q and k that llama.cpp
    keeps in another order, transposed weights and stacked experts are allowed for. New biases and a head of its own
    are added where llama.cpp reads them (transformers, loading such a file, leaves new biases out). Beside `out`
    comes `<out>.repe_manifest.json`, which holds for every edited tensor how much of its edit the rounding undoes
    (`undone`, a share) and the size of all rounding over that of the edit (`error`).

    Args:
        source: a GGUF file of an architecture that is supported (an error lists them), not split in parts.
        patch: the edits, by the parameter names of the model in transformers.
        out: file to make; missing folders are made too.
        requantise: what to do with edited tensors that are packed (Q4_1, Q6_K ...). False refuses them. The name of
            a type, such as "F16" or "Q8_0", stores them in that type, which llama.cpp mixes with others freely. True
            rounds back to the type they have, which undoes most of a small edit.
        model: the unedited model that the patch was made for. Give it where the file does not hold its very values
            (F16 or packed from another precision): every edited tensor is then held against the model's.
        check_fingerprint: without `model`, refuse a file whose values are not those the patch was made for.
        force: replace an `out` that exists.

    Returns:
        `out`.

    Raises:
        UnsupportedModelError: packed tensors without `requantise`, an unknown architecture, a bias or head that
            llama.cpp would not read, or a patch that keeps the head tied for an adapter.
        ModelMismatchError: the file or `model` is not what the patch was made for.
        NonFiniteError: an edited tensor holds NaN or infinity in the file's type.
        FileFormatError: no GGUF file, or truncated.
        OutputExistsError: `out` exists and `force` is off.
        InputError: `out` is `source`, or no such type.

    Warns:
        NumericalWarning: rounding undoes more than a tenth of an edit.

    Example:
        `export.gguf("SmolLM2-135M-Instruct.Q4_1.gguf", patch, "patched.gguf", requantise="F16")`
    """
    source, out = Path(source), Path(out)
    if source.resolve() == out.resolve():
        raise InputError(f"out and source are one file, {source}; choose another path for out.")
    file = read_gguf(source)
    dialect = dialect_of(file)
    check_model(dialect, patch, model, check_fingerprint)
    work = _Work(file, dialect, patch, model)
    entries = _entries(work, requantise)
    with new_file(_beside(out), force=True) as manifest, new_file(out, force=force) as partial:
        write_gguf(partial, file, list(entries.values()), lambda name: _produce(work, entries[name]))
        manifest.write_text(strict_json(_manifest(work), "manifest"), encoding="utf-8")
    worst = max(work.edited, key=lambda name: work.edited[name]["undone"])
    if (undone := work.edited[worst]["undone"]) > 0.1:
        warnings.warn(
            f"rounding undoes {undone:.0%} of the edit of {worst}; pass requantise='F16' to keep the edits, or patch "
            "an F16 file and quantise that.",
            NumericalWarning,
            stacklevel=2,
        )
    return out


@dataclass(frozen=True, slots=True, eq=False)
class _Work:
    """What is needed while writing."""

    file: GGUFFile
    dialect: Dialect
    patch: Patch
    model: nn.Module | None
    owners: dict[str, str] = field(default_factory=dict)  # GGUF name -> edited parameter
    entries: dict[str, Entry] = field(default_factory=dict)  # as they will be written
    ready: dict[str, bytes] = field(default_factory=dict)  # parts of a parameter that wait for their turn
    edited: dict[str, dict[str, Any]] = field(default_factory=dict)  # parameter -> what the manifest says


def _beside(out: Path) -> Path:
    return out.with_name(out.name + _SUFFIX)


# Deciding what to write


def _entries(work: _Work, requantise: bool | str) -> dict[str, Entry]:
    """Return the tensors of the new file; raises before anything is written."""
    patch, dialect, old = work.patch, work.dialect, work.file.entries
    entries = work.entries
    entries.update(old)
    if patch.adapter:
        raise UnsupportedModelError(
            "the patch was baked with tied='adapter': the file is to keep one tensor for embedding and head, and the edit "
            "belongs in an adapter. Use export.lora, or bake with tied='untie'."
        )
    if patch.tied is not None and "output.weight" not in old:
        dialect.require_head()
        embedding = old["token_embd.weight"]
        entries["output.weight"] = new_entry("output.weight", embedding.kind, embedding.shape)
    for name, shape in patch.new_biases.items():
        slot = dialect.slot(name)
        if slot.names[0] in old:
            raise ModelMismatchError(f"the patch makes {name}, and the file has {slot.names[0]} already.")
        dialect.require_bias(slot)
        entries[slot.names[0]] = new_entry(slot.names[0], "F32", shape)
    packed = []
    for parameter in patch.edits:
        for name in dialect.slot(parameter).names:
            if name not in entries:
                raise ModelMismatchError(
                    f"the patch edits {parameter}, and {work.file.path} has no {name}; use the file of the model that "
                    "the patch was made for."
                )
            work.owners[name] = parameter
            if entries[name].kind not in FLOATS:
                packed.append(name)
    if packed and requantise is False:
        kinds = sorted({entries[name].kind for name in packed})
        raise UnsupportedModelError(
            f"{len(packed)} edited tensors (first {packed[0]}) are packed as {', '.join(kinds)}. Rounding them back "
            "undoes most of a small edit. Pass requantise='F16' to store them in 16 bits, patch an F16 or BF16 file, or "
            "pass requantise=True and read the manifest."
        )
    if isinstance(requantise, str):
        for name in packed:
            entries[name] = new_entry(name, requantise.upper(), entries[name].shape)
    return entries


# Writing


def _produce(work: _Work, entry: Entry) -> bytes | None:
    parameter = work.owners.get(entry.name)
    if parameter is None:
        if entry.name in work.file.entries:
            return None
        return work.file.data(work.file.entries["token_embd.weight"])  # an unedited head that was tied
    if entry.name not in work.ready:
        work.ready.update(_edited(work, parameter, work.patch.edits[parameter]))
    return work.ready.pop(entry.name)


def _edited(work: _Work, parameter: str, edit: Edit) -> dict[str, bytes]:
    """Return the bytes of all tensors of one edited parameter, after measuring what rounding does to the edit."""
    slot = work.dialect.slot(parameter)
    if slot.names[0] in work.file.entries:
        old = values_of(work.file, slot, edit.shape)
        check_values(work.model, work.patch, parameter, old)
    elif parameter in work.patch.new_biases:
        old = torch.zeros(edit.shape)
    else:
        old = values_of(work.file, Slot(("token_embd.weight",)), edit.shape)
    entries = [work.entries[name] for name in slot.names]
    try:
        new = edit.apply(old)
    except ShapeError as error:
        raise ModelMismatchError(f"the edit of {parameter} does not fit the file: {error}") from error
    data = {
        entry.name: encode(part.reshape(entry.shape), entry)
        for entry, part in zip(entries, slot.to_file(new), strict=True)
    }
    stored = (
        slot.from_file([decode(data[entry.name], entry) for entry in entries]).double().reshape(edit.shape)
    )
    if not torch.isfinite(stored).all():
        raise NonFiniteError(
            f"the edit of {parameter} makes NaN or infinite values in {entries[0].kind}; check the patch, or patch a "
            "file in a wider type."
        )
    delta = edit.delta()
    lost = old.double() + delta - stored
    energy = float(delta.square().sum())
    work.edited[parameter] = {
        "tensors": list(slot.names),
        "was": [work.file.entries[name].kind if name in work.file.entries else None for name in slot.names],
        "type": entries[0].kind,
        "rule": edit.rule,
        "rank": edit.rank,
        "undone": float((lost * delta).sum()) / energy if energy else 0.0,
        "error": (float(lost.square().sum()) / energy) ** 0.5 if energy else 0.0,
        "blake2b": hashlib.blake2b(b"".join(data.values()), digest_size=16).hexdigest(),
    }
    return data


def _manifest(work: _Work) -> Mapping[str, object]:
    patch = work.patch
    return {
        "format": 1,
        "tool": "repe_unlearn",
        "version": importlib.metadata.version("repe-unlearn"),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "source": work.file.path.name,
        "architecture": work.file.arch,
        "fingerprint": patch.fingerprint,
        "exactness": dict(patch.exactness),
        "provenance": dict(patch.provenance),
        "untied": patch.untie,
        "added": sorted(set(work.entries) - set(work.file.entries)),
        "edited": work.edited,
        **_previous(work.file.path),
    }


def _previous(source: Path) -> dict[str, object]:
    path = _beside(source)
    return {"previous": json.loads(path.read_text(encoding="utf-8"))} if path.is_file() else {}
