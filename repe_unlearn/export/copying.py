"""Copy bytes from file to file: shared or moved by the kernel where it can, else in small chunks."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from io import FileIO
from typing import IO, Any

from repe_unlearn.errors import FileFormatError
from repe_unlearn.export.places import Place

__all__ = ["FileSlice", "append", "clone", "write_all"]

_CHUNK = 4 << 20
_IN_KERNEL = 256 << 20  # how long Ctrl-C may wait
_FICLONE = 0x40049409  # Linux: two files share their blocks until one of them is written
_NO_KERNEL_COPY = {
    errno.EINVAL,
    errno.ENOSYS,
    errno.EOPNOTSUPP,
    errno.EXDEV,
    errno.EBADF,
    errno.EPERM,
    errno.ENOTTY,
}


@dataclass(frozen=True, slots=True)
class FileSlice:
    """Bytes `begin:end` of a file, to be copied without passing through memory as a whole."""

    path: Place
    begin: int
    end: int


def clone(source: Place, stream: IO[bytes]) -> bool:
    """Make an empty file share all blocks of another one; return whether the file system can do that.

    XFS and Btrfs can: what is not rewritten afterwards costs neither time nor space.
    """
    try:
        import fcntl

        with source.open("rb", buffering=0) as origin:
            if not isinstance(origin, FileIO) or not isinstance(stream, FileIO):
                return False
            fcntl.ioctl(stream.fileno(), _FICLONE, origin.fileno())
    except ImportError:
        return False  # Windows
    except OSError as error:
        if error.errno in _NO_KERNEL_COPY:
            return False
        raise
    return True


def append(source: FileSlice, stream: IO[bytes]) -> None:
    """Write a slice of a file at the current place of a stream.

    Raises:
        FileFormatError: the source is shorter than the slice.
    """
    position = source.begin
    with source.path.open("rb", buffering=0) as origin:
        if isinstance(origin, FileIO) and isinstance(stream, FileIO):
            position = _in_kernel(origin, stream, position, source.end)
        origin.seek(position)
        buffer = memoryview(bytearray(min(_CHUNK, source.end - position)))
        while position < source.end:
            chunk: Any = origin
            got = chunk.readinto(buffer[: source.end - position])
            if not got:
                raise FileFormatError(f"{source.path} became shorter while it was read.")
            write_all(stream, buffer[:got])
            position += got


def _in_kernel(origin: FileIO, stream: FileIO, position: int, end: int) -> int:
    """Copy as much as the kernel does and return where it stopped."""
    while position < end and hasattr(os, "copy_file_range"):
        try:
            size = min(end - position, _IN_KERNEL)
            copied = os.copy_file_range(origin.fileno(), stream.fileno(), size, position)
        except OSError as error:
            if error.errno in _NO_KERNEL_COPY:
                break
            raise
        if not copied:
            break
        position += copied
    return position


def write_all(stream: IO[bytes], data: bytes | memoryview) -> None:
    """Write all bytes, however many pieces the system takes them in."""
    view = memoryview(data).cast("B")
    while view:
        view = view[stream.write(view) or 0 :]
