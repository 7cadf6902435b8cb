"""Read and write safetensors files with at most one tensor in memory."""

from __future__ import annotations

import errno
import json
import math
import os
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from repe_unlearn.errors import FileFormatError, InputError, ShapeError

__all__ = [
    "FileSlice",
    "Header",
    "TensorSpec",
    "index",
    "read_header",
    "read_tensor",
    "tensor_bytes",
    "write_stream",
]

_MAX_HEADER = 100_000_000  # the limit of the reference reader
_CHUNK = 4 << 20
_NO_SENDFILE = {errno.EINVAL, errno.ENOSYS, errno.ENOTSOCK, errno.EOPNOTSUPP, errno.EBADF}

# Bits per element of every dtype of the format, and the torch dtype where torch has one.
_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "I8", "U8"), 8),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
_TORCH = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, dtype and shape of one tensor; `dtype` is the name that the format uses, such as "BF16"."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes that the data take."""
        return math.prod(self.shape) * _BITS[self.dtype] // 8

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """The torch dtype, or None where torch has no plain one (packed 4- and 6-bit floats and the like)."""
        return _TORCH.get(self.dtype)


@dataclass(frozen=True, slots=True)
class FileSlice:
    """Bytes `begin:end` of a file, to be copied without passing through memory as a whole."""

    path: Path
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    """Table of contents of one safetensors file, checked against the size of the file.

    Attributes:
        path: the file.
        specs: name -> spec, in the order of the data.
        slices: name -> where the bytes lie (absolute positions).
        metadata: the free text entries of the header.
    """

    path: Path
    specs: Mapping[str, TensorSpec]
    slices: Mapping[str, FileSlice]
    metadata: Mapping[str, str]


def read_header(path: Path) -> Header:
    """Read the table of contents of a safetensors file; it is checked against the size of the file.

    Raises:
        FileFormatError: the file is missing, truncated or foreign, or its tensors overlap or leave holes.

    Example:
        >>> import tempfile, torch
        >>> from safetensors.torch import save_file
        >>> path = Path(tempfile.mkdtemp()) / "model.safetensors"
        >>> save_file({"w": torch.zeros(2, 3)}, path)
        >>> read_header(path).specs["w"]
        TensorSpec(name='w', dtype='F32', shape=(2, 3))
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            prefix = stream.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 2 <= length <= min(_MAX_HEADER, size - 8):
                raise FileFormatError(
                    f"{path} is no safetensors file, or truncated: {size} bytes, header length {length}."
                )
            raw = json.loads(stream.read(length))
    except OSError as error:
        raise FileFormatError(f"{path} cannot be read: {error.strerror or error}.") from error
    except ValueError as error:
        raise FileFormatError(f"{path} is no safetensors file: its header is no JSON ({error}).") from error
    if not isinstance(raw, dict):
        raise FileFormatError(f"{path} is no safetensors file: its header is no JSON object.")
    metadata = raw.pop("__metadata__", None) or {}
    try:
        entries = [
            (TensorSpec(name, e["dtype"], tuple(e["shape"])), *e["data_offsets"]) for name, e in raw.items()
        ]
        entries.sort(key=lambda entry: entry[1:])
        _check_layout(path, entries, size - 8 - length)
    except (KeyError, TypeError, ValueError) as error:
        raise FileFormatError(f"{path} has a damaged safetensors header ({error!r}).") from error
    start = 8 + length
    specs = {spec.name: spec for spec, _, _ in entries}
    slices = {spec.name: FileSlice(path, start + begin, start + end) for spec, begin, end in entries}
    return Header(path, specs, slices, metadata)


def index(folder: Path) -> dict[str, Path]:
    """Map the name of every tensor of a checkpoint folder to the file that holds it, single or sharded.

    `model.safetensors` wins over `model.safetensors.index.json`, as it does in transformers.

    Raises:
        FileFormatError: no safetensors; a shard missing, truncated or foreign; an index that is wrong.
    """
    single, table = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return dict.fromkeys(read_header(single).specs, single)
    if not table.is_file():
        raise FileFormatError(
            f"{folder} holds neither model.safetensors nor model.safetensors.index.json. "
            "Save the model as safetensors first: model.save_pretrained(folder)."
        )
    try:
        listed: dict[str, str] = dict(json.loads(table.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise FileFormatError(
            f"{table} is damaged ({error!r}). Download or save the checkpoint again."
        ) from error
    found: dict[str, Path] = {}
    for shard in sorted(set(listed.values())):
        if Path(shard).name != shard:
            raise FileFormatError(f"{table} points outside its folder: {shard!r}.")
        found.update(dict.fromkeys(read_header(folder / shard).specs, folder / shard))
    wrong = sorted(name for name, shard in listed.items() if found.get(name) != folder / shard)
    if wrong:
        raise FileFormatError(f"{table} lists {len(wrong)} tensors that its shards lack, first {wrong[0]}.")
    return found


def read_tensor(header: Header, name: str) -> Tensor:
    """Read one tensor into fresh CPU memory.

    Raises:
        InputError: torch has no plain dtype for this tensor.
    """
    spec, where = header.specs[name], header.slices[name]
    if spec.torch_dtype is None:
        raise InputError(f"{name} in {header.path} has dtype {spec.dtype}, which torch cannot hold plainly.")
    if not spec.nbytes:
        return torch.empty(spec.shape, dtype=spec.torch_dtype)
    data = bytearray(where.end - where.begin)
    with header.path.open("rb") as stream:
        stream.seek(where.begin)
        if stream.readinto(data) != len(data):
            raise FileFormatError(f"{header.path} became shorter while it was read.")
    return torch.frombuffer(data, dtype=spec.torch_dtype).reshape(spec.shape)


def write_stream(
    path: Path,
    entries: Sequence[TensorSpec],
    produce: Callable[[str], Tensor | memoryview | FileSlice],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file that every reader accepts, asking for one tensor at a time.

    The header is written first, so shapes and dtypes are promised before any tensor exists; each tensor is
    held to its promise. Wide elements come first, which keeps every tensor aligned; otherwise the given
    order holds.

    Args:
        path: must not exist yet. On failure the unfinished file is removed and the error passed on.
        entries: what will be written; names are unique.
        produce: called once per name, in the order of the file; returns the tensor (any device), its raw
            bytes, or a slice of a file to copy in small chunks.
        metadata: free text for the header; None writes {"format": "pt"}.

    Raises:
        FileExistsError: `path` exists.
        InputError: two tensors share a name, or an unknown dtype.
        ShapeError: `produce` returned another shape, dtype or number of bytes than promised.

    Example:
        >>> import tempfile, torch
        >>> path = Path(tempfile.mkdtemp()) / "model.safetensors"
        >>> write_stream(path, [TensorSpec("w", "F32", (2, 3))], lambda name: torch.ones(2, 3))
        >>> read_tensor(read_header(path), "w").sum().item()
        6.0
    """
    ordered = sorted(entries, key=lambda spec: -_bits(spec))
    table: dict[str, object] = {"__metadata__": dict(metadata or {"format": "pt"})}
    position = 0
    for spec in ordered:
        if spec.name in table:
            raise InputError(f"Two tensors are named {spec.name!r}; names in one file must differ.")
        end = position + spec.nbytes
        table[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [position, end]}
        position = end
    header = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    # Unbuffered: a full disk shows at the write that hits it, and kernel copies keep their place.
    with path.open("xb", buffering=0) as stream:
        try:
            _write_all(stream, struct.pack("<Q", len(header)) + header)
            for spec in ordered:
                _write_one(stream, spec, produce(spec.name))
        except BaseException:
            path.unlink()
            raise


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor in row order; a view where it lies contiguous on the CPU.

    Example:
        >>> tensor_bytes(torch.zeros(2, dtype=torch.float64)).nbytes
        16
    """
    array: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


def _write_one(stream: FileIO, spec: TensorSpec, data: Tensor | memoryview | FileSlice) -> None:
    if isinstance(data, FileSlice):
        got = data.end - data.begin
    elif isinstance(data, Tensor):
        if tuple(data.shape) != spec.shape or data.dtype != spec.torch_dtype:
            raise ShapeError(
                f"{spec.name}: {spec.dtype} {list(spec.shape)} was promised, got {data.dtype} {[*data.shape]}"
            )
        data = tensor_bytes(data)
        got = data.nbytes
    else:
        got = data.nbytes
    if got != spec.nbytes:
        raise ShapeError(f"{spec.name}: {spec.nbytes} bytes were promised, got {got}.")
    if isinstance(data, FileSlice):
        _copy(data, stream)
    else:
        _write_all(stream, data)


def _copy(source: FileSlice, stream: FileIO) -> None:
    """Append a slice of a file, inside the kernel where that works between files (Linux)."""
    position = source.begin
    with source.path.open("rb", buffering=0) as origin:
        while position < source.end and hasattr(os, "sendfile"):
            try:
                sent = os.sendfile(stream.fileno(), origin.fileno(), position, source.end - position)
            except OSError as error:
                if error.errno in _NO_SENDFILE:
                    break
                raise
            position += _progressed(source, sent)
        origin.seek(position)
        buffer = memoryview(bytearray(min(_CHUNK, source.end - position)))
        while position < source.end:
            got = _progressed(source, origin.readinto(buffer[: source.end - position]))
            _write_all(stream, buffer[:got])
            position += got


def _progressed(source: FileSlice, count: int | None) -> int:
    if not count:
        raise FileFormatError(f"{source.path} became shorter while it was read.")
    return count


def _write_all(stream: FileIO, data: bytes | memoryview) -> None:
    view = memoryview(data).cast("B")
    while view:
        view = view[stream.write(view) or 0 :]


def _bits(spec: TensorSpec) -> int:
    if spec.dtype not in _BITS:
        raise InputError(f"{spec.name}: {spec.dtype!r} is no dtype of the safetensors format.")
    return _BITS[spec.dtype]


def _check_layout(path: Path, entries: Sequence[tuple[TensorSpec, int, int]], data_size: int) -> None:
    """Tensors must fill the data section without holes or overlaps, each as its shape asks for."""
    position = 0
    for spec, begin, end in entries:
        if any(type(extent) is not int or extent < 0 for extent in spec.shape):
            raise FileFormatError(f"{path}: {spec.name} has the impossible shape {list(spec.shape)}.")
        if begin != position or end - begin != spec.nbytes:
            raise FileFormatError(
                f"{path}: {spec.name} ({spec.dtype} {list(spec.shape)}) lies at bytes {begin}:{end}, "
                f"expected {position}:{position + spec.nbytes}."
            )
        position = end
    if position != data_size:
        state = "truncated" if position > data_size else "longer than its header says"
        raise FileFormatError(
            f"{path} is {state}: its header lists {position} bytes of tensors, it holds {data_size}. "
            "Copy or download it again."
        )
