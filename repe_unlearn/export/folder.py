"""Fill a folder that appears whole or not at all, and the strict JSON files in it."""

from __future__ import annotations

import glob
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from repe_unlearn.errors import FileFormatError, InputError, OutputExistsError
from repe_unlearn.export.places import Place, RemotePath, walk

__all__ = [
    "MANIFEST",
    "PROGRESS",
    "check_places",
    "new_folder",
    "other_files",
    "read_json",
    "remote_folder",
    "strict_json",
]

MANIFEST = "repe_manifest.json"
PROGRESS = ".progress"
"""Folder inside an unfinished one for notes on what is done already."""

# Other copies of the weights would carry what an edit removes, so they stay behind.
_WEIGHT_SUFFIXES = (
    ".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".ckpt", ".gguf",
    ".h5", ".msgpack", ".onnx", ".onnx_data", ".ot", ".npz", ".tflite", ".mlmodel",
)  # fmt: skip


def check_places(source: Place, out: Place, force: bool) -> None:
    """Refuse a source that is no model folder, and an `out` that must not be written or replaced."""
    if not (source / "config.json").is_file():
        raise FileFormatError(f"{source} is no checkpoint folder: it has no config.json.")
    here, there = (path.resolve() if isinstance(path, Path) else path for path in (source, out))
    one, other = (str(path).rstrip("/") + "/" for path in (here, there))
    if one.startswith(other) or other.startswith(one):
        raise InputError(f"out ({there}) and source ({here}) must lie apart; choose another folder for out.")
    link = isinstance(out, Path) and out.is_symlink()
    if not (out.exists() or link):
        return
    if not force:
        raise OutputExistsError(f"{out} exists. Choose another folder, or pass force=True to replace it.")
    replaceable = not link and not out.is_file()
    full = replaceable and (isinstance(out, RemotePath) or any(out.iterdir()))
    if not replaceable or (full and not (out / "config.json").is_file()):
        raise OutputExistsError(
            f"{out} is not replaced even with force=True: it is no checkpoint folder (no config.json)."
        )


@contextmanager
def new_folder(out: Path, force: bool, *, key: str | None = None) -> Iterator[Path]:
    """Give a temporary sibling to fill; move it to `out` when all went well, remove it when not.

    Args:
        out: the final folder.
        force: replace it when it exists.
        key: names the work, so that it can be taken up: after the death of the process (not after an error) the next
            call with the same key gives the same folder, and whatever it put into `PROGRESS` there. Unfinished
            folders of other keys are removed.

    Raises:
        OutputExistsError: `out` appeared meanwhile, or another process is at the same work.
    """
    out = Path(os.path.abspath(out))  # "." has no name of its own
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = out.parent / f".{out.name}.partial-{key or secrets.token_hex(4)}"
    with ExitStack() as locks:
        if key is None:
            folder.mkdir()
        else:
            (folder / PROGRESS).mkdir(parents=True, exist_ok=True)
            if not locks.enter_context(_locked(folder)):
                raise OutputExistsError(f"Another process is writing {out} (in {folder}). Wait for it.")
            _remove_stale(folder, out)
        try:
            yield folder
            shutil.rmtree(folder / PROGRESS, ignore_errors=True)
            if force and out.exists():
                _swap(folder, out)
            else:
                try:
                    folder.rename(out)
                except OSError as error:
                    if out.exists():
                        raise OutputExistsError(
                            f"{out} appeared while the checkpoint was written."
                        ) from error
                    raise
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Hold the lock of an unfinished folder; the system releases it when the process ends, however it ends."""
    try:
        import fcntl
    except ImportError:  # Windows: two processes at the same work are not told apart
        yield True
        return
    with (folder / PROGRESS / "lock").open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def _remove_stale(ours: Path, out: Path) -> None:
    for path in out.parent.glob(f".{glob.escape(out.name)}.partial-*"):
        if path != ours and (path / PROGRESS / "lock").is_file():
            with _locked(path) as abandoned:
                if abandoned:
                    shutil.rmtree(path, ignore_errors=True)


@contextmanager
def remote_folder(out: RemotePath, force: bool) -> Iterator[RemotePath]:
    """Give a folder in a store to fill; what it holds is removed when that fails.

    Stores cannot move a folder in one step, so the files get their final names at once. Whoever fills it writes
    `config.json` last: without that no program takes the folder for a model. With `force` the old checkpoint is gone
    from the first moment.
    """
    if force and out.exists():
        out.fs.rm(out.path, recursive=True)
    out.fs.makedirs(out.path, exist_ok=True)
    try:
        yield out
    except BaseException:
        if out.exists():
            out.fs.rm(out.path, recursive=True)
        raise


def _swap(folder: Path, out: Path) -> None:
    old = out.parent / f".{out.name}.old-{secrets.token_hex(4)}"
    out.rename(old)
    try:
        folder.rename(out)
    except BaseException:
        old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def read_json(path: Place) -> dict[str, Any]:
    """Read a JSON object; anything else is a FileFormatError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FileFormatError(f"{path} is no valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise FileFormatError(f"{path} must hold a JSON object, got a {type(content).__name__}.")
    return content


def strict_json(content: Mapping[str, object], what: str) -> str:
    """Return JSON text that every parser accepts; NaN, infinity and foreign objects are an InputError."""
    try:
        return json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    except (TypeError, ValueError) as error:
        raise InputError(f"{what} must be strict JSON (no NaN, no tensors): {error}") from error


def other_files(source: Place, used: set[str], *, own_tokenizer: bool) -> tuple[list[str], list[str]]:
    """Return the files to copy and the further weight files to leave behind, as names relative to `source`.

    Hidden files and folders are skipped, and so are those in `used` (written by the caller).
    """
    copied, left_out = [], []
    for name in walk(source):
        if name in used or (own_tokenizer and name.startswith("tokenizer")):
            continue
        (left_out if name.lower().endswith(_WEIGHT_SUFFIXES) else copied).append(name)
    return copied, left_out
