"""Fill a folder that appears whole or not at all, and the strict JSON files in it."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from repe_unlearn.errors import FileFormatError, InputError, OutputExistsError

__all__ = ["MANIFEST", "check_places", "new_folder", "other_files", "read_json", "strict_json"]

MANIFEST = "repe_manifest.json"

# Other copies of the weights would carry what an edit removes, so they stay behind.
_WEIGHT_SUFFIXES = (
    ".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".ckpt", ".gguf",
    ".h5", ".msgpack", ".onnx", ".onnx_data", ".ot", ".npz", ".tflite", ".mlmodel",
)  # fmt: skip


def check_places(source: Path, out: Path, force: bool) -> None:
    """Refuse a source that is no model folder, and an `out` that must not be written or replaced."""
    if not (source / "config.json").is_file():
        raise FileFormatError(f"{source} is no checkpoint folder: it has no config.json.")
    here, there = source.resolve(), out.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise InputError(f"out ({there}) and source ({here}) must lie apart; choose another folder for out.")
    if not (out.exists() or out.is_symlink()):
        return
    if not force:
        raise OutputExistsError(f"{out} exists. Choose another folder, or pass force=True to replace it.")
    replaceable = out.is_dir() and not out.is_symlink()
    if not replaceable or (any(out.iterdir()) and not (out / "config.json").is_file()):
        raise OutputExistsError(
            f"{out} is not replaced even with force=True: it is no checkpoint folder (no config.json)."
        )


@contextmanager
def new_folder(out: Path, force: bool) -> Iterator[Path]:
    """Give a temporary sibling to fill; move it to `out` when all went well, remove it when not."""
    out = Path(os.path.abspath(out))  # "." has no name of its own
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = out.parent / f".{out.name}.partial-{secrets.token_hex(4)}"
    folder.mkdir()
    try:
        yield folder
        if force and out.exists():
            _swap(folder, out)
        else:
            try:
                folder.rename(out)
            except OSError as error:
                if out.exists():
                    raise OutputExistsError(f"{out} appeared while the checkpoint was written.") from error
                raise
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
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


def read_json(path: Path) -> dict[str, Any]:
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


def other_files(source: Path, used: set[str], *, own_tokenizer: bool) -> tuple[list[str], list[str]]:
    """Return the files to copy and the further weight files to leave behind, as names relative to `source`.

    Hidden files and folders are skipped, and so are those in `used` (written by the caller).
    """
    copied, left_out = [], []
    for folder, folders, names in os.walk(source):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(folder) / name
            relative = path.relative_to(source).as_posix()
            ours = relative in used or (own_tokenizer and relative.startswith("tokenizer"))
            if ours or name.startswith(".") or not path.is_file():
                continue
            if name.lower().endswith(_WEIGHT_SUFFIXES):
                left_out.append(relative)
            else:
                copied.append(relative)
    return copied, left_out
