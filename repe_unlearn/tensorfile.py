"""Our own files: one safetensors file whose metadata says what it is; written atomically, never pickled."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor

from .errors import FileFormatError, OutputExistsError

_KEY = "repe_unlearn"


def write_tensors(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    *,
    kind: str,
    version: int,
    header: Mapping[str, object],
    force: bool,
) -> Path:
    """Write tensors and a JSON header to ``path`` through a temporary sibling: all of it or nothing.

    Raises:
        OutputExistsError: the file exists and ``force`` is False.
    """
    text = json.dumps({"kind": kind, "version": version, **header}, allow_nan=False)
    ready = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    with _whole(Path(path), force) as partial:
        mode = partial.stat().st_mode & 0o777
        safetensors.torch.save_file(ready, partial, metadata={_KEY: text})
        os.chmod(partial, mode)  # safetensors makes files that only their owner may read
    return Path(path)


def write_text(path: str | Path, text: str, *, force: bool = False) -> Path:
    """Write a UTF-8 text file through a temporary sibling: all of it or nothing.

    Raises:
        OutputExistsError: the file exists and ``force`` is False.
    """
    with _whole(Path(path), force) as partial:
        partial.write_text(text, encoding="utf-8")
    return Path(path)


@contextmanager
def _whole(path: Path, force: bool) -> Iterator[Path]:
    """Give an empty temporary sibling to write to, which then takes the place of ``path``; after an error nothing is left."""
    if path.exists() and not force:
        raise OutputExistsError(f"{path} exists; choose another path or pass force=True.")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial-{secrets.token_hex(4)}")
    try:
        partial.open("xb").close()
        yield partial
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def read_tensors(
    path: str | Path, *, kind: str, version: int, names: Iterable[str] | None = None
) -> tuple[dict[str, Tensor], dict]:
    """Return the tensors (all, or those named) and the header of a file that ``write_tensors`` made.

    Raises:
        FileFormatError: missing, truncated, foreign, of another kind or of a newer version.
    """
    tensors, header = _read(Path(path), kind, names)
    if header.get("kind") != kind:
        raise FileFormatError(f"{path} holds {header.get('kind')!r}; needed {kind!r}.")
    if not isinstance(header.get("version"), int) or header["version"] > version:
        raise FileFormatError(
            f"{path} has format version {header.get('version')!r}; this release reads up to {version}. "
            "Upgrade repe_unlearn."
        )
    return tensors, header


def kind_of(path: str | Path, *, among: Iterable[str]) -> str:
    """Return which of several kinds a file holds that ``write_tensors`` made.

    Raises:
        FileFormatError: missing, truncated, foreign, or of none of the kinds.
    """
    kinds = tuple(among)
    kind = _read(Path(path), " or ".join(kinds), ())[1].get("kind")
    if kind not in kinds:
        raise FileFormatError(f"{path} holds {kind!r}; needed {' or '.join(map(repr, kinds))}.")
    return kind


def _read(path: Path, wanted: str, names: Iterable[str] | None) -> tuple[dict[str, Tensor], dict]:
    if not path.is_file():
        raise FileFormatError(f"{path} is not a file; needed a {wanted} file written by repe_unlearn.")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in (file.keys() if names is None else names)}
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise FileFormatError(
            f"{path} is not a whole safetensors file ({error}); write or copy it again."
        ) from error
    if _KEY not in metadata:
        raise FileFormatError(
            f"{path} is a safetensors file of something else; needed a {wanted} file written by repe_unlearn."
        )
    try:
        header = json.loads(metadata[_KEY])
    except json.JSONDecodeError as error:
        raise FileFormatError(f"{path} has a damaged header ({error}); write it again.") from error
    if not isinstance(header, dict):
        raise FileFormatError(f"{path} has a damaged header ({metadata[_KEY][:40]!r}); write it again.")
    return tensors, header
