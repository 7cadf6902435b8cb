"""Write a patch as a LoRA adapter, in the one layout that PEFT, vLLM and llama.cpp read alike."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from repe_unlearn.errors import InputError, ModelMismatchError, OutputExistsError, UnsupportedModelError
from repe_unlearn.export.folder import MANIFEST, new_folder, read_json, strict_json
from repe_unlearn.export.lora_card import card
from repe_unlearn.export.lora_tensors import (
    Factors,
    Pair,
    factors,
    named_tensors,
    pairs_of,
    refuse_biases,
    rounding,
)
from repe_unlearn.export.peft_check import check_with_peft
from repe_unlearn.export.safetensors_io import TensorSpec, write_stream
from repe_unlearn.fingerprints import fingerprint
from repe_unlearn.patch import Edit, Patch

__all__ = ["lora"]

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_VLLM_RANK = 16


def lora(
    source: nn.Module | str | Path,
    patch: Patch,
    out: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    max_rank: int | None = None,
    base: str | None = None,
    verify: bool | None = None,
    inputs: Mapping[str, Tensor] | None = None,
    force: bool = False,
) -> Path:
    """Write the edits of `patch` as a LoRA adapter for the unedited model, checked with PEFT; whole or not at all.

    The layout is the only one that PEFT, vLLM and llama.cpp read as the same numbers: one rank for all tensors
    (smaller ones padded with zeros), `lora_alpha` equal to it, no patterns, every module named, experts one by one
    under the names that the checkpoint has for them. What such an adapter cannot hold is refused. Tied embeddings
    stay tied: an adapter edits the lookup or the head, not both.

    Args:
        source: the model that the patch was made for, or its folder, which is then not loaded unless `verify` is True.
        patch: edits of weights of linear modules, embeddings and experts; no biases.
        out: folder to make, with adapter_config.json, adapter_model.safetensors, repe_manifest.json and README.md.
        dtype: of the adapter: float32, float16 or bfloat16. The manifest holds the rounding of every edit.
        max_rank: cut edits of higher rank, dense ones too, to their best approximation of this rank. The manifest
            holds what is lost, as a share of the edit's norm. None: dense edits are refused, no other is cut.
        base: name of the unedited model for readers of the adapter; default the name that it was loaded by.
        verify: hold the adapter, loaded by PEFT, against the patched model. None: with PEFT installed, that every
            tensor is used, and with a model that the outputs agree. True: both or an error. False: neither.
        inputs: keyword arguments of one forward pass to compare on; default token ids.
        force: replace an `out` that is an adapter folder (or empty).

    Returns:
        `out`.

    Raises:
        InputError: biases, a dense edit without `max_rank`, an unusable dtype or rank.
        ModelMismatchError: the patch was made for another model.
        UnsupportedModelError: weights that have no common LoRA layout, or that the installed PEFT cannot load.
        MissingDependencyError: `verify` is True and PEFT is not installed.
        VerificationError: the adapter in PEFT differs from the patched model.
        OutputExistsError: `out` exists and `force` is off, or it holds something else than an adapter.

    Example:
        `export.lora(model, bake(model, plan), "no-gender-lora")`
    """
    out = Path(out)
    _check_out(out, force)
    if dtype not in _DTYPES:
        raise InputError(f"got dtype {dtype}; needed one of {', '.join(map(str, _DTYPES))}.")
    if max_rank is not None and max_rank < 1:
        raise InputError(f"got max_rank={max_rank}; needed 1 or more, or None.")
    refuse_biases(patch)
    model = source if isinstance(source, nn.Module) else _from_folder(Path(source), weights=verify is True)
    _check_print(model, patch)
    products = {name: factors(name, edit, max_rank) for name, edit in patch.edits.items()}
    pairs = tuple(pairs_of(model, patch, products))
    rank = max(pair.rank for pair in pairs)
    if rank > _VLLM_RANK:
        warnings.warn(
            f"the adapter has rank {rank}: vLLM refuses ranks above {_VLLM_RANK} unless started with "
            f"--max-lora-rank {rank}.",
            stacklevel=2,
        )
    tensors = named_tensors(pairs, rank, dtype)
    specs = [TensorSpec(name, _DTYPES[dtype], tuple(tensor.shape)) for name, tensor in tensors.items()]
    base = base or str(getattr(getattr(model, "config", None), "_name_or_path", ""))
    config = _config(model, pairs, rank, base)
    manifest = _manifest(model, patch, products, rounding(pairs, dtype), rank, dtype)
    with new_folder(out, force) as folder:
        write_stream(folder / _WEIGHTS, specs, tensors.__getitem__)
        (folder / _CONFIG).write_text(strict_json(config, _CONFIG), encoding="utf-8")
        if verify or (verify is None and importlib.util.find_spec("peft")):
            check = check_with_peft(model, _written(patch, products), folder, dtype=dtype, inputs=inputs)
            manifest["verified"] = asdict(check)
        (folder / MANIFEST).write_text(strict_json(manifest, MANIFEST), encoding="utf-8")
        (folder / "README.md").write_text(card(base, config, manifest), encoding="utf-8")
    return out


def _written(patch: Patch, products: Mapping[str, Factors]) -> Patch:
    """Return the patch as it is written: with what was cut off left out."""
    cut = {name: product for name, product in products.items() if product.lost}
    dense = {name: Edit(p.left @ p.right, None, patch.edits[name].rule) for name, p in cut.items()}
    return replace(patch, edits={**patch.edits, **dense})


def _check_print(model: nn.Module, patch: Patch) -> None:
    if any(p.is_meta for p in model.parameters()):
        return  # a folder that is not loaded: the shapes of all edited weights are compared
    if (found := fingerprint(model)) != patch.fingerprint:
        raise ModelMismatchError(
            f"the patch was made for fingerprint {patch.fingerprint}; this model has {found}. Load the same "
            "checkpoint, without the patch."
        )


def _config(model: nn.Module, pairs: Iterable[Pair], rank: int, base: str) -> dict[str, Any]:
    targets = sorted({pair.target for pair in pairs})
    return {
        "peft_type": "LORA",
        "task_type": _task(model),
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "target_modules": targets,
        "fan_in_fan_out": any(type(m).__name__ == "Conv1D" for n, m in model.named_modules() if n in targets),
        "bias": "none",
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
    }


def _task(model: nn.Module) -> str | None:
    name = type(model).__name__
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return "SEQ_2_SEQ_LM" if name.endswith("ForConditionalGeneration") else None
    return "CAUSAL_LM" if name.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")) else None


def _manifest(
    model: nn.Module,
    patch: Patch,
    products: Mapping[str, Factors],
    rounded: Mapping[str, float],
    rank: int,
    dtype: torch.dtype,
) -> dict[str, Any]:
    edited = {
        name: {
            "rule": patch.edits[name].rule,
            "rank": product.rank,
            "cut": product.lost,
            "rounding": rounded[name],
        }
        for name, product in products.items()
    }
    return {
        "format": 1,
        "tool": "repe_unlearn",
        "version": importlib.metadata.version("repe-unlearn"),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "model_type": getattr(getattr(model, "config", None), "model_type", None),
        "fingerprint": patch.fingerprint,
        "rank": rank,
        "dtype": str(dtype).removeprefix("torch."),
        "exactness": dict(patch.exactness),
        "provenance": dict(patch.provenance),
        "edited": edited,
        "verified": None,
    }


def _from_folder(folder: Path, *, weights: bool) -> nn.Module:
    """Return the model of a folder, without weights (meta device) unless asked for."""
    import transformers

    names = read_json(folder / "config.json").get("architectures") or ["none"]
    kind: Any = getattr(transformers, str(names[0]), None)
    if kind is None:
        raise UnsupportedModelError(
            f"{folder / 'config.json'} names the class {names[0]}, which transformers lacks; pass the loaded model."
        )
    if weights:
        return kind.from_pretrained(folder).eval()
    config = transformers.AutoConfig.from_pretrained(folder)
    config._name_or_path = str(folder)
    with torch.device("meta"):
        return kind(config).eval()


def _check_out(out: Path, force: bool) -> None:
    if not (out.exists() or out.is_symlink()):
        return
    if not force:
        raise OutputExistsError(f"{out} exists. Choose another folder, or pass force=True to replace it.")
    replaceable = out.is_dir() and not out.is_symlink()
    if not replaceable or (any(out.iterdir()) and not (out / _CONFIG).is_file()):
        raise OutputExistsError(
            f"{out} is not replaced even with force=True: it is no adapter folder (no {_CONFIG})."
        )
