"""Where checkpoints are read and written: folders on disk, or anything that fsspec opens by a URL."""

from __future__ import annotations

import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeAlias, TypeVar

from repe_unlearn.errors import InputError, MissingDependencyError

__all__ = ["P", "Place", "RemotePath", "place", "read_ranges", "size_of", "version_of", "walk"]


@dataclass(frozen=True, slots=True)
class RemotePath:
    """A file or folder in an fsspec file system, with the part of `pathlib.Path` that exports use.

    Attributes:
        fs: the file system.
        path: in it.
    """

    fs: Any
    path: str

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(self.fs, f"{self.path.rstrip('/')}/{name}")

    def __str__(self) -> str:
        return str(self.fs.unstrip_protocol(self.path))

    @property
    def name(self) -> str:
        """Last part of the path."""
        return self.path.rstrip("/").rpartition("/")[2]

    @property
    def suffix(self) -> str:
        """Ending of the name, with its dot."""
        return Path(self.name).suffix

    def open(self, mode: str = "r", buffering: int = -1) -> IO[Any]:
        """Open for reading or writing; an exclusive mode refuses what exists."""
        if "x" in mode:
            if self.exists():
                raise FileExistsError(f"{self} exists.")
            mode = mode.replace("x", "w")
        return self.fs.open(self.path, mode)

    def size(self) -> int:
        """Bytes of the file."""
        return int(self.fs.size(self.path))

    def exists(self) -> bool:
        """True for a file and for a folder."""
        return bool(self.fs.exists(self.path))

    def is_file(self) -> bool:
        """True for a file."""
        return bool(self.fs.isfile(self.path))

    def read_text(self, encoding: str = "utf-8") -> str:
        """Return the whole file as text."""
        return self.fs.cat_file(self.path).decode(encoding)

    def write_text(self, text: str, encoding: str = "utf-8") -> None:
        """Replace the whole file."""
        self.fs.pipe_file(self.path, text.encode(encoding))

    def unlink(self) -> None:
        """Delete the file."""
        self.fs.rm_file(self.path)


Place: TypeAlias = Path | RemotePath
P = TypeVar("P", Path, RemotePath)


def place(where: str | Path) -> Place:
    """Return the place that a path or a URL (`s3://bucket/model`, `memory://model`, `file:///model`) names.

    Raises:
        MissingDependencyError: fsspec, or its driver for this protocol, is not installed.
        InputError: no file system has this protocol.
    """
    if isinstance(where, Path) or "://" not in where:
        return Path(where)
    try:
        from fsspec.core import url_to_fs
    except ImportError as error:
        raise MissingDependencyError(f"{where} needs fsspec: pip install fsspec") from error
    try:
        fs, path = url_to_fs(where)
    except ImportError as error:
        raise MissingDependencyError(f"{where}: {error}") from error
    except ValueError as error:
        raise InputError(f"{where}: {error}") from error
    local = "file" in (fs.protocol if isinstance(fs.protocol, tuple | list) else (fs.protocol,))
    return Path(path) if local else RemotePath(fs, path)


def size_of(path: Place) -> int:
    """Return the bytes of a file."""
    return path.size() if isinstance(path, RemotePath) else path.stat().st_size


def version_of(path: Place) -> str:
    """Return a text that changes when the file does."""
    if isinstance(path, RemotePath):
        return repr(sorted((key, str(value)) for key, value in path.fs.info(path.path).items()))
    facts = path.stat()
    return f"{path.resolve()} {facts.st_size} {facts.st_mtime_ns}"


def read_ranges(path: Place, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
    """Return many small parts of a file; from a store in parallel where its driver can."""
    if isinstance(path, RemotePath):
        starts, ends = zip(*ranges, strict=True) if ranges else ((), ())
        return list(path.fs.cat_ranges([path.path] * len(ranges), list(starts), list(ends)))
    with path.open("rb") as stream:
        found = []
        for begin, end in ranges:
            stream.seek(begin)
            found.append(stream.read(end - begin))
        return found


def walk(folder: Place) -> Iterator[str]:
    """Yield all files below a folder by their names relative to it, without hidden ones and links to nowhere."""
    if isinstance(folder, RemotePath):
        root = folder.path.rstrip("/")
        names = (found.removeprefix(root).lstrip("/") for found in folder.fs.find(root))
    else:
        names = (path.relative_to(folder).as_posix() for path in _local_files(folder))
    yield from sorted(name for name in names if not any(part.startswith(".") for part in name.split("/")))


def _local_files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir() and not path.is_symlink():
            yield from _local_files(path)
        elif path.exists() and stat.S_ISREG(path.stat().st_mode):
            yield path
