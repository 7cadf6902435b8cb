"""Write a patched copy of a safetensors checkpoint, tensor by tensor, without building the model."""

from __future__ import annotations

import hashlib
import importlib.metadata
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from repe_unlearn.errors import (
    InputError,
    ModelMismatchError,
    NonFiniteError,
    ShapeError,
    UnsupportedModelError,
)
from repe_unlearn.export.folder import MANIFEST, check_places, new_folder, other_files, read_json, strict_json
from repe_unlearn.export.safetensors_io import (
    FileSlice,
    Header,
    TensorSpec,
    index,
    read_header,
    read_tensor,
    tensor_bytes,
    write_stream,
)
from repe_unlearn.fingerprints import digest, sample_positions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["checkpoint"]

_INDEX = "model.safetensors.index.json"
_EDITABLE = ("F64", "F32", "F16", "BF16")


class Edit(Protocol):
    """What this module needs of one edit: a pure map from the old to the new tensor, same shape and dtype."""

    def apply(self, weight: Tensor) -> Tensor: ...


class PatchLike(Protocol):
    """What this module needs of a patch; `repe_unlearn.patch.Patch` has it."""

    @property
    def edits(self) -> Mapping[str, Any]: ...
    @property
    def new_biases(self) -> Mapping[str, tuple[int, ...]]: ...
    @property
    def zero_biases(self) -> Mapping[str, tuple[int, ...]]: ...
    @property
    def config_updates(self) -> Mapping[str, object]: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def untie(self) -> bool: ...
    @property
    def tied(self) -> tuple[str, str] | None: ...


@dataclass(frozen=True, slots=True)
class _Plan:
    """Everything that will be written, decided before the first byte is."""

    shards: dict[str, list[TensorSpec]]  # file name -> tensors
    origin: dict[str, tuple[Header, str] | None]  # tensor -> where its old value lies; None: zeros
    edits: Mapping[str, Edit]
    config: dict[str, Any]
    edited: dict[str, dict[str, object]] = field(default_factory=dict)  # filled while writing
    added: dict[str, dict[str, object]] = field(default_factory=dict)


def checkpoint(
    source: Path,
    patch: PatchLike,
    out: Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    force: bool = False,
    manifest: Mapping[str, object] | None = None,
    check_fingerprint: bool = True,
    progress: bool = True,
) -> Path:
    """Copy a checkpoint to `out` with the edits of `patch` applied; every other tensor stays byte for byte.

    The folder appears whole or not at all. Peak memory is what one edit needs for its tensor. Shards and
    all files that are no weights are kept; other copies of the weights (pickles, GGUF) are left behind, as
    they still hold what the edit removes. `repe_manifest.json` lists what was done.

    Args:
        source: folder with `config.json` and `model.safetensors` or its shards.
        patch: the edits, by the parameter names of the checkpoint.
        out: folder to make; missing parents are made too.
        tokenizer: written over the tokenizer files of `source` when given.
        force: replace an `out` that exists and is a checkpoint (or empty).
        manifest: more entries for the manifest; strict JSON (no NaN), no key of our own.
        check_fingerprint: refuse a source whose weights are not those the patch was made for. Turn it off to
            patch the full-precision checkpoint of a model that was fitted in 4 or 8 bits.
        progress: show a progress bar.

    Returns:
        `out`.

    Raises:
        OutputExistsError: `out` exists and `force` is off, or it holds something else than a checkpoint.
        ModelMismatchError: the patch names tensors that the source lacks, or has other shapes or fingerprint.
        UnsupportedModelError: an edited tensor is stored quantised.
        NonFiniteError: an edit produced NaN or infinity.
        FileFormatError: the source is truncated or no safetensors checkpoint.
        InputError: `out` and `source` lie in each other, or the manifest is no strict JSON.

    Example:
        >>> checkpoint(loaded.source, patch, Path("smollm2-without-gender"))  # doctest: +SKIP
    """
    source, out = Path(source), Path(out)
    check_places(source, out, force)
    headers = {file: read_header(file) for file in sorted(set(index(source).values()))}
    config = read_json(source / "config.json")
    if check_fingerprint and patch.fingerprint:
        _check_print(patch, config, headers)
    plan = _plan(patch, config, headers)
    report = _manifest(source, patch, config, manifest or {})
    used = {*plan.shards, _INDEX, "config.json", MANIFEST}
    files, left_out = other_files(source, used, own_tokenizer=tokenizer is not None)

    with new_folder(out, force) as folder:
        for name in files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, folder / name)
        _write_json(folder / "config.json", plan.config)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        _write_weights(folder, plan, headers, progress)
        _write_index(source, folder, plan)
        report |= {"edited": plan.edited, "added": plan.added, "left_out": left_out}
        _write_json(folder / MANIFEST, report)
    return out


# Deciding what to write


def _plan(patch: PatchLike, config: dict[str, Any], headers: Mapping[Path, Header]) -> _Plan:
    """Match the patch with the checkpoint; raises before anything is written."""
    home = {name: file for file, header in headers.items() for name in header.specs}
    shards = {file.name: list(header.specs.values()) for file, header in headers.items()}
    origin: dict[str, tuple[Header, str] | None] = {n: (headers[file], n) for n, file in home.items()}
    updates = dict(patch.config_updates)

    if patch.untie and patch.tied:
        embedding, head = patch.tied
        _require(home, [embedding])
        _check_tied(config, headers, home, embedding, head)
        spec = headers[home[embedding]].specs[embedding]
        if head not in home:
            shards[home[embedding].name].append(TensorSpec(head, spec.dtype, spec.shape))
            home[head] = home[embedding]
        origin[head] = (headers[home[embedding]], embedding)
        updates["tie_word_embeddings"] = False

    for name, shape in {**patch.zero_biases, **patch.new_biases}.items():
        if name in home:
            raise ModelMismatchError(
                f"The patch creates {name}, which the checkpoint has already: it is for another model."
            )
        weight = _weight_beside(name, home)
        spec = headers[home[weight]].specs[weight]
        if not shape or shape[-1] not in spec.shape:
            raise ModelMismatchError(f"Bias {name} {list(shape)} does not fit {weight} {list(spec.shape)}.")
        _require_plain(spec)
        shards[home[weight].name].append(TensorSpec(name, spec.dtype, tuple(shape)))
        origin[name] = None

    _require(origin, patch.edits)
    for specs in shards.values():
        for spec in specs:
            if spec.name in patch.edits:
                _require_plain(spec)
    return _Plan(shards, origin, patch.edits, _updated(config, updates))


def _require(held: Mapping[str, object], names: Mapping[str, object] | list[str]) -> None:
    missing = sorted(set(names) - set(held))
    if missing:
        raise ModelMismatchError(
            f"The checkpoint lacks {len(missing)} tensors that the patch names: {', '.join(missing[:8])}"
            f"{', ...' if len(missing) > 8 else ''}. It holds for example {', '.join(sorted(held)[:3])}. "
            "Use the checkpoint of the model the patch was made for; if its files use other names than the "
            "model, save it once with model.save_pretrained(folder) and patch that."
        )


def _require_plain(spec: TensorSpec) -> None:
    if spec.dtype not in _EDITABLE:
        raise UnsupportedModelError(
            f"{spec.name} is stored as {spec.dtype}, and quantised weights are never edited in place. "
            "Patch the full-precision checkpoint (check_fingerprint=False if it was fitted quantised)."
        )


def _weight_beside(bias: str, home: Mapping[str, Path]) -> str:
    stem = bias.removesuffix("_bias").removesuffix(".bias")
    for candidate in (f"{stem}.weight", stem):
        if candidate in home:
            return candidate
    raise ModelMismatchError(f"The patch creates {bias}, but there is no {stem}.weight.")


def _check_tied(
    config: Mapping[str, Any],
    headers: Mapping[Path, Header],
    home: Mapping[str, Path],
    embedding: str,
    head: str,
) -> None:
    """Untying copies the embedding over the head: that is right only where both are one matrix."""
    tie = config.get("tie_word_embeddings")
    if head not in home and tie is not False:
        return
    if head in home and tie is True:
        return  # transformers ignores a stored head then
    if head in home and _digest_slice(headers[home[head]], head) == _digest_slice(
        headers[home[embedding]], embedding
    ):
        return
    raise ModelMismatchError(
        f"The patch unties {head} from {embedding}, but this checkpoint has them apart already. "
        "Use the checkpoint of the model the patch was made for."
    )


def _digest_slice(header: Header, name: str) -> bytes:
    state = hashlib.blake2b()
    where = header.slices[name]
    with where.path.open("rb") as stream:
        stream.seek(where.begin)
        for begin in range(where.begin, where.end, 1 << 22):
            state.update(stream.read(min(1 << 22, where.end - begin)))
    return state.digest()


def _check_print(patch: PatchLike, config: Mapping[str, Any], headers: Mapping[Path, Header]) -> None:
    """Compare the fingerprint of the files with that of the patch."""
    names = {name: header for header in headers.values() for name in header.specs}
    if patch.untie and patch.tied:
        names.pop(patch.tied[1], None)  # one parameter under two names counts once
    got = digest(
        str(config.get("model_type", "")), (_sampled(h, n) for n, h in names.items() if _counts(h, n))
    )
    if got != patch.fingerprint:
        raise ModelMismatchError(
            f"The patch was made for weights with fingerprint {patch.fingerprint}, the source has {got}. Use "
            "the checkpoint the model was loaded from. If you know that it is the right one (it was fitted "
            "in 4 or 8 bits, or its files use other names than the model), pass check_fingerprint=False."
        )


def _counts(header: Header, name: str) -> bool:
    # Old checkpoints store these buffers; the fingerprint of a model knows parameters only.
    return header.specs[name].torch_dtype is not None and not name.endswith(
        (".inv_freq", ".attn.masked_bias")
    )


def _sampled(header: Header, name: str) -> tuple[str, tuple[int, ...], Tensor]:
    spec, where = header.specs[name], header.slices[name]
    dtype = spec.torch_dtype or torch.uint8
    positions = sample_positions(spec.nbytes // dtype.itemsize)
    data = bytearray()
    with header.path.open("rb") as stream:
        for position in positions:
            stream.seek(where.begin + position * dtype.itemsize)
            data += stream.read(dtype.itemsize)
    values = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
    return name, spec.shape, values


def _updated(config: Mapping[str, Any], updates: Mapping[str, object]) -> dict[str, Any]:
    new = {**config, **updates}
    # A composite config keeps the switches of its language model one level down, where the model reads them.
    if isinstance(text := config.get("text_config"), dict):
        new["text_config"] = {**text, **updates}
    strict_json(new, "config_updates")
    return new


def _manifest(
    source: Path, patch: PatchLike, config: Mapping[str, Any], more: Mapping[str, object]
) -> dict[str, object]:
    report: dict[str, object] = {
        "format": 1,
        "tool": "repe_unlearn",
        "version": _version(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "model_type": config.get("model_type"),
        "fingerprint": patch.fingerprint,
        "config_updates": dict(patch.config_updates),
        "untied": bool(patch.untie),
    }
    if (source / MANIFEST).is_file():
        report["previous"] = read_json(source / MANIFEST)
    clash = sorted({*report, "edited", "added", "left_out"} & set(more))
    if clash:
        raise InputError(
            f"The manifest entries {', '.join(clash)} are written by checkpoint(); rename yours."
        )
    report |= dict(more)
    strict_json(report, "manifest")
    return report


def _version() -> str:
    try:
        return importlib.metadata.version("repe-unlearn")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


# Writing


def _write_weights(folder: Path, plan: _Plan, headers: Mapping[Path, Header], progress: bool) -> None:
    from tqdm import tqdm

    metadata = {file.name: {**header.metadata, "format": "pt"} for file, header in headers.items()}
    total = sum(spec.nbytes for specs in plan.shards.values() for spec in specs)
    with tqdm(
        total=total, unit="B", unit_scale=True, desc="patched checkpoint", disable=not progress, leave=False
    ) as bar:
        for shard, specs in plan.shards.items():
            by_name = {spec.name: spec for spec in specs}
            produce = partial(_produce, plan, shard, by_name, bar.update)
            write_stream(folder / shard, specs, produce, metadata[shard])


def _produce(
    plan: _Plan, shard: str, specs: Mapping[str, TensorSpec], advance: Callable[[float], object], name: str
) -> Tensor | FileSlice:
    spec, origin = specs[name], plan.origin[name]
    edit = plan.edits.get(name)
    advance(spec.nbytes)
    is_new = origin is None or origin[1] != name
    if is_new:
        plan.added[name] = {"dtype": spec.dtype, "shape": list(spec.shape), "file": shard}
    if edit is None:
        return (
            torch.zeros(spec.shape, dtype=spec.torch_dtype) if origin is None else origin[0].slices[origin[1]]
        )
    old = torch.zeros(spec.shape, dtype=spec.torch_dtype) if origin is None else read_tensor(*origin)
    new = _applied(name, edit, old)
    plan.edited[name] = {
        "rule": str(getattr(edit, "rule", type(edit).__name__)),
        "rank": getattr(edit, "rank", None),
        "file": shard,
        "blake2b": hashlib.blake2b(tensor_bytes(new), digest_size=16).hexdigest(),
    }
    return new


def _applied(name: str, edit: Edit, old: Tensor) -> Tensor:
    """Return the new tensor on the CPU, contiguous, after holding the edit to its promise."""
    shape, dtype = old.shape, old.dtype
    try:
        new = edit.apply(old).detach().cpu().contiguous()
    except (RuntimeError, ShapeError) as error:
        raise ModelMismatchError(
            f"The edit of {name} does not fit the checkpoint's tensor {list(shape)}: {error}"
        ) from error
    if new.shape != shape or new.dtype != dtype:
        raise ModelMismatchError(
            f"The edit of {name} returned {new.dtype} {list(new.shape)}; needed {dtype} {list(shape)}."
        )
    if not torch.isfinite(new).all():
        raise NonFiniteError(
            f"The edit of {name} produced NaN or infinite values in {dtype}. Check the patch, or patch a "
            "checkpoint in a wider dtype."
        )
    return new


def _write_index(source: Path, folder: Path, plan: _Plan) -> None:
    if not (source / _INDEX).is_file() or set(plan.shards) == {"model.safetensors"}:
        return
    table = read_json(source / _INDEX)
    listed = [(spec, shard) for shard, specs in plan.shards.items() for spec in specs]
    table["weight_map"] = {spec.name: shard for spec, shard in sorted(listed, key=lambda pair: pair[0].name)}
    sizes = {"total_size": sum(spec.nbytes for spec, _ in listed)}
    if "total_parameters" in table.get("metadata", {}):
        sizes["total_parameters"] = sum(torch.Size(spec.shape).numel() for spec, _ in listed)
    table["metadata"] = {**table.get("metadata", {}), **sizes}
    _write_json(folder / _INDEX, table)


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(strict_json(content, path.name), encoding="utf-8")
