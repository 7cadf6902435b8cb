"""Read and write safetensors files with at most one tensor in memory."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from repe_unlearn.errors import FileFormatError, InputError, ShapeError
from repe_unlearn.export.copying import FileSlice, append, clone, write_all
from repe_unlearn.export.places import P, Place, size_of

__all__ = [
    "FileSlice",
    "Header",
    "TensorSpec",
    "dtype_name",
    "headers",
    "index",
    "read_header",
    "read_tensor",
    "tensor_bytes",
    "tensor_reader",
    "write_stream",
]

_MAX_HEADER = 100_000_000  # the limit of the reference reader

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
class Header:
    """Table of contents of one file of a checkpoint.

    Attributes:
        path: the file.
        specs: name -> spec, in the order of the data.
        slices: name -> where the bytes lie (absolute positions).
        metadata: the free text entries of the header.
        start: where the data begin.
        tensors: the tensors themselves where the file is a pickle, mapped into memory; it has no slices.
    """

    path: Place
    specs: Mapping[str, TensorSpec]
    slices: Mapping[str, FileSlice]
    metadata: Mapping[str, str]
    start: int = 0
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name that the format uses for a torch dtype.

    Raises:
        InputError: it has none.
    """
    for name, known in _TORCH.items():
        if known == dtype:
            return name
    raise InputError(f"{dtype} has no name in the safetensors format.")


def read_header(path: Place) -> Header:
    """Read the table of contents of a file of weights; it is checked against the size of the file.

    Args:
        path: a safetensors file, or a pickle of tensors (``.bin``), which is mapped into memory and never runs code.

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
    if path.suffix == ".bin":
        return _read_pickle(path)
    try:
        size = size_of(path)
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
    return Header(path, specs, slices, metadata, start)


def _read_pickle(path: Place) -> Header:
    if not isinstance(path, Path):
        raise FileFormatError(
            f"{path}: pickles are read from the local disk only. Download the folder first."
        )
    try:
        loaded = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # whatever a damaged or hostile pickle raises
        raise FileFormatError(
            f"{path} cannot be read as a pickle of tensors: {error}. Download it again, or save the model as "
            "safetensors: model.save_pretrained(folder)."
        ) from error
    if not isinstance(loaded, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in loaded.items()
    ):
        raise FileFormatError(f"{path} is no table of tensors.")
    specs = {n: TensorSpec(n, dtype_name(t.dtype), tuple(t.shape)) for n, t in loaded.items()}
    return Header(path, specs, {}, {}, tensors=loaded)


_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


def index(folder: P) -> dict[str, P]:
    """Map the name of every tensor of a checkpoint folder to the file that holds it, single or sharded.

    As in transformers, safetensors win over pickles and one file over shards.

    Raises:
        FileFormatError: no weights; a shard missing, truncated or foreign; an index that is wrong.
    """
    for single in _WEIGHTS:
        if (folder / single).is_file():
            return dict.fromkeys(read_header(folder / single).specs, folder / single)
        if (folder / f"{single}.index.json").is_file():
            return _sharded(folder, folder / f"{single}.index.json")
    raise FileFormatError(
        f"{folder} holds neither model.safetensors nor model.safetensors.index.json, nor pytorch_model.bin in one file "
        "or shards. Save the model as safetensors first: model.save_pretrained(folder)."
    )


def headers(folder: Any) -> dict[Any, Header]:
    """Return the tables of contents of all files of weights of a checkpoint folder (a `Place`), by file.

    Raises:
        FileFormatError: as `index`.
    """
    return {file: read_header(file) for file in sorted(set(index(folder).values()), key=str)}


def _sharded(folder: P, table: P) -> dict[str, P]:
    try:
        listed: dict[str, str] = dict(json.loads(table.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise FileFormatError(
            f"{table} is damaged ({error!r}). Download or save the checkpoint again."
        ) from error
    found: dict[str, P] = {}
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
        FileFormatError: the file became shorter.
    """
    spec = header.specs[name]
    with tensor_reader(header, name) as read:
        return read(torch.empty(spec.shape, dtype=spec.torch_dtype))


@contextmanager
def tensor_reader(header: Header, name: str) -> Iterator[Callable[[Tensor], Tensor]]:
    """Give a function that fills a contiguous CPU tensor with the next elements of one on disk, and returns it.

    Raises:
        InputError: torch has no plain dtype for this tensor.
        FileFormatError: the file became shorter.

    Example:
        ``with tensor_reader(header, "w") as read: first, rest = read(torch.empty(10)), read(torch.empty(90))``
    """
    spec, dtype = header.specs[name], header.specs[name].torch_dtype
    if dtype is None:
        raise InputError(f"{name} in {header.path} has dtype {spec.dtype}, which torch cannot hold plainly.")
    if name in header.tensors:
        # One after the other: a mapped tensor stays on disk until its elements are asked for.
        flat, position = header.tensors[name].reshape(-1), 0

        def copy_into(target: Tensor) -> Tensor:
            nonlocal position
            position += target.numel()
            return target.copy_(flat[position - target.numel() : position].view_as(target))

        yield copy_into
        return
    with header.path.open("rb", buffering=0) as stream:
        stream.seek(header.slices[name].begin)

        def read_into(target: Tensor) -> Tensor:
            view, origin = tensor_bytes(target), stream
            while view:
                got = origin.readinto(view)  # type: ignore[attr-defined]
                if not got:
                    raise FileFormatError(f"{header.path} became shorter while it was read.")
                view = view[got:]
            return target

        yield read_into


Content = Tensor | memoryview | FileSlice | Iterator[memoryview]


def write_stream(
    path: Place,
    entries: Sequence[TensorSpec],
    produce: Callable[[str], Content],
    metadata: Mapping[str, str] | None = None,
    *,
    like: Header | None = None,
) -> None:
    """Write a safetensors file that every reader accepts, asking for one tensor at a time.

    The header is written first, so shapes and dtypes are promised before any tensor exists; each tensor is
    held to its promise. Wide elements come first, which keeps every tensor aligned; otherwise the given
    order holds.

    Args:
        path: must not exist yet. On failure the unfinished file is removed and the error passed on.
        entries: what will be written; names are unique.
        produce: called once per name, in the order of the file; returns the tensor (any device), its raw
            bytes in one or several pieces, or a slice of a file to copy without reading it.
        metadata: free text for the header; None writes {"format": "pt"}.
        like: the file that this one is an edited copy of. With the same tensors and metadata the header stays as it
            is, and where the file system can share blocks, slices of `like` are shared instead of copied.

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
    metadata = dict(metadata or {"format": "pt"})
    same = like is not None and list(entries) == list(like.specs.values()) and metadata == dict(like.metadata)
    ordered = list(entries) if same else sorted(entries, key=lambda spec: -_bits(spec))
    header = b"" if same else _header(ordered, metadata)
    # Unbuffered: a full disk shows at the write that hits it, and kernel copies keep their place.
    with path.open("xb", buffering=0) as stream:
        try:
            shared = same and like is not None and clone(like.path, stream)
            if same and like is not None:
                append(FileSlice(like.path, 0, like.start), stream)
            else:
                write_all(stream, header)
            for spec in ordered:
                content = produce(spec.name)
                if shared and like is not None and content == like.slices[spec.name]:
                    stream.seek(spec.nbytes, 1)
                else:
                    _write_one(stream, spec, content)
        except BaseException:
            path.unlink()
            raise


def _header(ordered: Sequence[TensorSpec], metadata: Mapping[str, str]) -> bytes:
    table: dict[str, object] = {"__metadata__": dict(metadata)}
    position = 0
    for spec in ordered:
        if spec.name in table:
            raise InputError(f"Two tensors are named {spec.name!r}; names in one file must differ.")
        end = position + spec.nbytes
        table[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor in row order; a view where it lies contiguous on the CPU.

    Example:
        >>> tensor_bytes(torch.zeros(2, dtype=torch.float64)).nbytes
        16
    """
    array: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


def _write_one(stream: IO[bytes], spec: TensorSpec, content: Content) -> None:
    if isinstance(content, Tensor):
        if tuple(content.shape) != spec.shape or content.dtype != spec.torch_dtype:
            raise ShapeError(
                f"{spec.name}: {spec.dtype} {list(spec.shape)} was promised, "
                f"got {content.dtype} {[*content.shape]}"
            )
        content = tensor_bytes(content)
    if isinstance(content, FileSlice):
        _require_size(spec, content.end - content.begin)
        append(content, stream)
        return
    if isinstance(content, memoryview):
        _require_size(spec, content.nbytes)
        write_all(stream, content)
        return
    written = 0
    for piece in content:
        write_all(stream, piece)
        written += piece.nbytes
    _require_size(spec, written)


def _require_size(spec: TensorSpec, got: int) -> None:
    if got != spec.nbytes:
        raise ShapeError(f"{spec.name}: {spec.nbytes} bytes were promised, got {got}.")


def _bits(spec: TensorSpec) -> int:
    if spec.dtype not in _BITS:
        raise InputError(f"{spec.name}: {spec.dtype!r} is no dtype of the safetensors format.")
    return _BITS[spec.dtype]


def _check_layout(path: Place, entries: Sequence[tuple[TensorSpec, int, int]], data_size: int) -> None:
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
