"""Bring a patched checkpoint back to its original bits, from a file that holds the replaced tensors."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from .errors import FileFormatError, InputError, ModelMismatchError, OutputExistsError
from .export.folder import MANIFEST, check_places, new_folder, other_files
from .export.places import Place, place
from .export.safetensors_io import FileSlice, Header, TensorSpec, headers, read_header, write_stream
from .tensorfile import read_tensors

__all__ = ["keep_originals", "revert"]

_KIND = "originals"
_VERSION = 1
_INDEX = "model.safetensors.index.json"


def keep_originals(base: str | Path, edited: str | Path, path: str | Path, *, force: bool = False) -> Path:
    """Write the tensors of ``base`` that ``edited`` replaced, so that ``revert`` can do without ``base``.

    An edit cannot be subtracted again without rounding; only the original bits bring the original back. The file
    holds them, in their own dtype, and is as large as the tensors that were edited.

    Args:
        base: checkpoint folder with safetensors, by path or URL.
        edited: the patched folder, likewise.
        path: file to write, whole or not at all.
        force: replace it.

    Raises:
        OutputExistsError: the file exists and ``force`` is off.
        InputError: the two folders hold the same tensors.
        FileFormatError: a folder without safetensors, or damaged.
    """
    path = Path(path)
    if path.exists() and not force:
        raise OutputExistsError(f"{path} exists; choose another path or pass force=True.")
    old, new = _tensors(place(base)), _tensors(place(edited))
    prints = {name: _hash(header, name) for name, header in new.items()}
    changed = [n for n, header in old.items() if n not in new or _hash(header, n) != prints[n]]
    added = sorted(set(new) - set(old))
    if not changed and not added:
        raise InputError(f"{base} and {edited} hold the same tensors; there is nothing to keep.")
    header = {
        "kind": _KIND,
        "version": _VERSION,
        "edited": {name: prints[name] for name in (*changed, *added) if name in prints},
        "originals": {name: _hash(old[name], name) for name in changed},
        "added": added,
        "config": (place(base) / "config.json").read_text("utf-8"),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)
    specs = [old[name].specs[name] for name in changed]
    write_stream(partial, specs, lambda name: old[name].slices[name], {"repe_unlearn": json.dumps(header)})
    partial.replace(path)
    return path


def revert(edited: str | Path, originals: str | Path, out: str | Path, *, force: bool = False) -> Path:
    """Write a copy of a patched checkpoint with the original bits of every tensor and the original ``config.json``.

    Args:
        edited: the patched folder; checked by hash against the file, tensor by tensor.
        originals: file from ``keep_originals``.
        out: folder to make; appears whole or not at all.
        force: replace an ``out`` that is a checkpoint.

    Raises:
        ModelMismatchError: ``edited`` is not the checkpoint that the file was made for.
        FileFormatError: damaged files, or originals whose bits changed.
        OutputExistsError, InputError: as for ``export.checkpoint``.
    """
    edited, originals, out = Path(edited), Path(originals), Path(out)
    _, facts = read_tensors(originals, kind=_KIND, version=_VERSION, names=())
    check_places(edited, out, force)
    held, kept = _tensors(edited), read_header(originals)
    for name, wanted in facts["edited"].items():
        if name not in held or _hash(held[name], name) != wanted:
            raise ModelMismatchError(
                f"{edited} is not the checkpoint that {originals} was made for: {name} differs. Use the folder that "
                "'diff --keep-originals' compared."
            )
    for name, wanted in facts["originals"].items():
        if name not in kept.specs or _hash(kept, name) != wanted:
            raise FileFormatError(f"{originals} is damaged: {name} does not have its hash any more.")
    homes = {name: header.path.name for name, header in held.items() if name not in facts["added"]}
    first = min(header.path.name for header in held.values())
    homes |= {name: homes.get(name, first) for name in kept.specs}
    sources = {name: kept if name in kept.specs else held[name] for name in homes}
    files, _ = other_files(edited, {*homes.values(), _INDEX, "config.json", MANIFEST}, own_tokenizer=False)
    with new_folder(out, force) as folder:
        for name in files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((edited / name).read_bytes())
        (folder / "config.json").write_text(facts["config"], "utf-8")
        for file in sorted(set(homes.values())):
            names = [name for name, home in homes.items() if home == file]
            write_stream(
                folder / file, [_spec(sources, n) for n in names], lambda name: _slice(sources, name)
            )
        if (edited / _INDEX).is_file():
            size = sum(_spec(sources, name).nbytes for name in homes)
            table = {"metadata": {"total_size": size}, "weight_map": dict(sorted(homes.items()))}
            (folder / _INDEX).write_text(json.dumps(table, indent=2) + "\n", "utf-8")
    return out


def _tensors(folder: Place) -> dict[str, Header]:
    found = headers(folder)
    return {name: header for header in found.values() for name in header.specs}


def _spec(sources: dict[str, Header], name: str) -> TensorSpec:
    return sources[name].specs[name]


def _slice(sources: dict[str, Header], name: str) -> FileSlice:
    return sources[name].slices[name]


def _hash(header: Header, name: str) -> str:
    where, spec = header.slices[name], header.specs[name]
    state = hashlib.sha256(f"{spec.dtype}{spec.shape}".encode())
    with where.path.open("rb") as stream:
        stream.seek(where.begin)
        for begin in range(where.begin, where.end, 1 << 22):
            state.update(stream.read(min(1 << 22, where.end - begin)))
    return state.hexdigest()
