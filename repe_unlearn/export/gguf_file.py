"""Read the table of contents of a GGUF file, decode and encode its tensors, and write it anew tensor by tensor."""

from __future__ import annotations

import importlib
import os
import secrets
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from repe_unlearn.errors import (
    FileFormatError,
    InputError,
    MissingDependencyError,
    OutputExistsError,
    UnsupportedModelError,
)

__all__ = [
    "FLOATS",
    "Entry",
    "GGUFFile",
    "decode",
    "encode",
    "new_entry",
    "new_file",
    "read_gguf",
    "write_gguf",
]

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
_CHUNK = 1 << 24


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a GGUF file.

    Attributes:
        name: as in the file.
        kind: name of its type, e.g. F16 or Q4_1.
        shape: rows first, as torch has it; the file lists it the other way round.
        nbytes: size of its data.
        begin: absolute position of its data in the file that it was read from; None for a new tensor.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    nbytes: int
    begin: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class GGUFFile:
    """Table of contents of a GGUF file.

    Attributes:
        path: of the file.
        version: of the format.
        keys: number of key-value pairs.
        metadata: begin and end of the bytes of those pairs, which are copied as they are.
        alignment: of tensors, bytes.
        values: the short ones among the pairs (no arrays longer than 1000).
        entries: tensors by name, in the order of the file.
    """

    path: Path
    version: int
    keys: int
    metadata: tuple[int, int]
    alignment: int
    values: Mapping[str, Any]
    entries: Mapping[str, Entry]

    @property
    def arch(self) -> str:
        """The value of `general.architecture`."""
        return str(self.values.get("general.architecture", ""))

    def data(self, entry: Entry) -> bytes:
        """Return the bytes of a tensor."""
        assert entry.begin is not None
        with self.path.open("rb") as stream:
            stream.seek(entry.begin)
            data = stream.read(entry.nbytes)
        if len(data) != entry.nbytes:
            raise FileFormatError(f"{self.path} became shorter while it was read.")
        return data


def library() -> Any:
    """Return the package `gguf`.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise MissingDependencyError(
            "GGUF files need one more package. Run: pip install 'repe-unlearn[gguf]'"
        ) from error


def read_gguf(path: Path) -> GGUFFile:
    """Return the table of contents of a GGUF file; no tensor is read.

    Raises:
        FileFormatError: missing, foreign or truncated file, one for other byte order, or one part of several.
    """
    gguf = library()
    if not path.is_file():
        raise FileFormatError(f"{path} is not a file; needed a GGUF file.")
    with path.open("rb") as stream:
        start = stream.read(24)
    if start[:4] != b"GGUF" or len(start) < 24:
        raise FileFormatError(f"{path} is no GGUF file: it starts with {start[:4]!r}, not b'GGUF'.")
    version, tensors, keys = struct.unpack("<IQQ", start[4:])
    if version not in (2, 3):
        raise FileFormatError(
            f"{path} has GGUF version {version}, or is for computers of the other byte order; needed version 2 or 3."
        )
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise FileFormatError(
            f"{path} is truncated or damaged ({error}). Copy or download it again."
        ) from error
    fields = {name: f for name, f in reader.fields.items() if not name.startswith("GGUF.")}
    values = {name: f.contents() for name, f in fields.items() if len(f.data) <= 1000}
    if values.get("split.count", 1) > 1:
        raise FileFormatError(
            f"{path} is one of {values['split.count']} parts; join them first with llama-gguf-split --merge."
        )
    if not reader.tensors:
        raise FileFormatError(f"{path} holds no tensors.")
    entries = {
        t.name: Entry(
            t.name, t.tensor_type.name, tuple(int(n) for n in reversed(t.shape)), t.n_bytes, t.data_offset
        )
        for t in reader.tensors
    }
    size = path.stat().st_size
    if any((e.begin or 0) + e.nbytes > size for e in entries.values()) or len(entries) != tensors:
        raise FileFormatError(f"{path} is truncated. Copy or download it again.")
    infos = min(t.field.offset for t in reader.tensors)
    return GGUFFile(path, version, keys, (24, infos), int(reader.alignment), values, entries)


def new_entry(name: str, kind: str, shape: Sequence[int]) -> Entry:
    """Return a tensor that is yet to be written.

    Raises:
        InputError: no such type.
        UnsupportedModelError: the rows of the tensor are no multiple of the type's block.
    """
    gguf = library()
    if kind not in gguf.GGMLQuantizationType.__members__:
        raise InputError(f"got GGUF type {kind!r}; needed one such as F16, BF16, F32 or Q8_0.")
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    if shape[-1] % block:
        raise UnsupportedModelError(
            f"{name} has rows of {shape[-1]} elements, and {kind} packs {block} at a time; choose F16."
        )
    return Entry(name, kind, tuple(shape), torch.Size(shape).numel() // block * size)


def decode(data: bytes, entry: Entry) -> Tensor:
    """Return the values: float types as they are, packed ones as float32.

    Raises:
        UnsupportedModelError: the package `gguf` cannot unpack the type.
    """
    if entry.kind in FLOATS:
        return torch.frombuffer(bytearray(data), dtype=FLOATS[entry.kind]).reshape(entry.shape)
    import numpy as np

    gguf = library()
    kind = gguf.GGMLQuantizationType[entry.kind]
    try:
        packed = np.frombuffer(data, np.uint8).reshape(
            gguf.quants.quant_shape_to_byte_shape(entry.shape, kind)
        )
        return torch.from_numpy(np.array(gguf.dequantize(packed, kind), np.float32)).reshape(entry.shape)
    except (NotImplementedError, KeyError) as error:
        raise UnsupportedModelError(
            f"{entry.name} is {entry.kind}, which the package gguf cannot unpack ({error}); patch an F16 file."
        ) from error


def encode(values: Tensor, entry: Entry) -> bytes:
    """Return the bytes of a tensor in the type of its entry.

    Raises:
        UnsupportedModelError: the package `gguf` cannot pack into the type.
    """
    if entry.kind in FLOATS:
        plain = values.to(FLOATS[entry.kind]).contiguous()
        return plain.view(-1).view(torch.uint8).numpy().tobytes()
    gguf = library()
    try:
        packed = gguf.quantize(values.float().contiguous().numpy(), gguf.GGMLQuantizationType[entry.kind])
    except NotImplementedError as error:
        raise UnsupportedModelError(
            f"{entry.name} is {entry.kind}, into which the package gguf cannot round; pass requantise='F16' (or "
            "'Q8_0') to store the edited tensors in that type."
        ) from error
    return packed.tobytes()


def write_gguf(
    path: Path, source: GGUFFile, entries: Sequence[Entry], produce: Callable[[str], bytes | None]
) -> None:
    """Write a GGUF file with the metadata of another, one tensor in memory at a time.

    Args:
        path: must not exist yet.
        source: where the metadata come from, byte for byte, and the tensors that are not produced.
        entries: what to write, in this order.
        produce: called once per name; returns the bytes, or None to copy the tensor from the source.

    Raises:
        InputError: the bytes of a tensor are not as many as its entry says.
    """
    gguf = library()
    infos, offset = bytearray(), 0
    for entry in entries:
        name = entry.name.encode()
        kind = int(gguf.GGMLQuantizationType[entry.kind])
        dims = tuple(reversed(entry.shape))
        infos += struct.pack(
            f"<Q{len(name)}sI{len(dims)}QIQ", len(name), name, len(dims), *dims, kind, offset
        )
        offset += entry.nbytes + -entry.nbytes % source.alignment
    begin, end = source.metadata
    with path.open("xb") as stream, source.path.open("rb") as old:
        stream.write(struct.pack("<4sIQQ", b"GGUF", source.version, len(entries), source.keys))
        _copy(old, stream, begin, end - begin)
        stream.write(infos)
        _pad(stream, source.alignment)
        for entry in entries:
            data = produce(entry.name)
            if data is None:
                kept = source.entries[entry.name]
                assert kept.begin is not None
                _copy(old, stream, kept.begin, kept.nbytes)
            elif len(data) == entry.nbytes:
                stream.write(data)
            else:
                raise InputError(f"{entry.name}: {entry.nbytes} bytes were promised, got {len(data)}.")
            _pad(stream, source.alignment)


def _copy(old: BinaryIO, new: BinaryIO, begin: int, length: int) -> None:
    old.seek(begin)
    while length:
        chunk = old.read(min(length, _CHUNK))
        if not chunk:
            raise FileFormatError(f"{old.name} became shorter while it was read.")
        new.write(chunk)
        length -= len(chunk)


def _pad(stream: BinaryIO, alignment: int) -> None:
    stream.write(b"\0" * (-stream.tell() % alignment))


@contextmanager
def new_file(out: Path, *, force: bool) -> Iterator[Path]:
    """Give the path of a temporary sibling to fill; move it to `out` when all went well, remove it when not.

    Raises:
        OutputExistsError: `out` exists and `force` is off, or it is no file.
    """
    if out.exists() and (not force or not out.is_file()):
        raise OutputExistsError(f"{out} exists. Choose another path, or pass force=True to replace a file.")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial-{secrets.token_hex(4)}")
    try:
        yield partial
        os.replace(partial, out)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
