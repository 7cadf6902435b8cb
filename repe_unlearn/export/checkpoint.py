"""Write a patched copy of a checkpoint, tensor by tensor, without building the model."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, CancelledError, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from threading import Event, Lock
from typing import TYPE_CHECKING, Any, overload

import torch

from repe_unlearn.errors import FileFormatError, InputError
from repe_unlearn.export.copying import FileSlice, append
from repe_unlearn.export.folder import (
    MANIFEST,
    PROGRESS,
    check_places,
    new_folder,
    other_files,
    read_json,
    remote_folder,
    strict_json,
)
from repe_unlearn.export.matching import (
    Draft,
    PatchLike,
    Target,
    check_print,
    draft,
    resume_key,
    slice_digest,
)
from repe_unlearn.export.places import Place, RemotePath, place, size_of
from repe_unlearn.export.rewrite import new_values
from repe_unlearn.export.safetensors_io import Content, headers, read_header, write_stream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["checkpoint"]

_INDEX = "model.safetensors.index.json"


@overload
def checkpoint(
    source: str | Path,
    patch: PatchLike,
    out: Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    force: bool = False,
    manifest: Mapping[str, object] | None = None,
    card: str = "",
    check_fingerprint: bool = True,
    workers: int | None = None,
    verify: bool = False,
    progress: bool = True,
) -> Path: ...
@overload
def checkpoint(
    source: str | Path,
    patch: PatchLike,
    out: str,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    force: bool = False,
    manifest: Mapping[str, object] | None = None,
    card: str = "",
    check_fingerprint: bool = True,
    workers: int | None = None,
    verify: bool = False,
    progress: bool = True,
) -> Path | str: ...
def checkpoint(
    source: str | Path,
    patch: PatchLike,
    out: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    force: bool = False,
    manifest: Mapping[str, object] | None = None,
    card: str = "",
    check_fingerprint: bool = True,
    workers: int | None = None,
    verify: bool = False,
    progress: bool = True,
) -> Path | str:
    """Copy a checkpoint to `out` with the edits of `patch` applied; every other tensor stays byte for byte.

    The folder appears whole or not at all. Peak memory is a few megabytes per worker, however large the tensors are.
    Shards and all files that are no weights are kept; other copies of the weights (pickles, GGUF) are left behind, as
    they still hold what the edit removes. `repe_manifest.json` lists what was done.

    A process that is killed on the way leaves a hidden folder beside `out`; the same call goes on where it stopped,
    and a call with another patch or source removes it. An error or Ctrl-C removes it at once.

    Args:
        source: folder with `config.json` and the weights: safetensors or pickles (`.bin`, local only), in one file or
            in shards. A path, or a URL that fsspec opens. Names of tensors are those of the model's parameters, or
            those that the family has on disk (experts apart, older names).
        patch: the edits, by the names of the parameters.
        out: folder to make, always with safetensors; missing parents are made too. A URL is written to directly,
            `config.json` last, as stores cannot move a folder in one step, and cannot be taken up again.
        tokenizer: written over the tokenizer files of `source` when given.
        force: replace an `out` that exists and is a checkpoint (or empty).
        manifest: more entries for the manifest; strict JSON (no NaN), no key of our own.
        card: Markdown to put behind the model card (README.md), for example ``audit.card(report)``.
        check_fingerprint: refuse a source whose weights are not those the patch was made for. Turn it off to
            patch the full-precision checkpoint of a model that was fitted in 4 or 8 bits.
        workers: files that are written at the same time, >= 1; default one per CPU core, at most 4.
        verify: read everything back: untouched tensors are held against the source, edited ones against the hash
            of what was computed, and the manifest gets the hash of every file of weights.
        progress: show a progress bar.

    Returns:
        `out`.

    Raises:
        OutputExistsError: `out` exists and `force` is off, or it holds something else than a checkpoint, or another
            process is writing it.
        ModelMismatchError: the patch names tensors that the source lacks, or has other shapes or fingerprint.
        UnsupportedModelError: an edited tensor is stored quantised.
        NonFiniteError: an edit produced NaN or infinity.
        FileFormatError: the source is truncated or no checkpoint, or `verify` found other bytes than were written.
        InputError: `out` and `source` lie in each other, the manifest is no strict JSON, `workers` is below 1.
        MissingDependencyError: a URL whose file system is not installed.

    Example:
        >>> checkpoint(loaded.source, patch, Path("smollm2-without-gender"))  # doctest: +SKIP
    """
    if workers is not None and workers < 1:
        raise InputError(f"got workers={workers}; needed at least 1.")
    origin, target = place(source), place(out)
    check_places(origin, target, force)
    found = headers(origin)
    config = read_json(origin / "config.json")
    if check_fingerprint and patch.fingerprint:
        check_print(patch, config, found)
    plan = draft(patch, config, found)
    report = _manifest(origin, patch, config, manifest or {})
    used = {*plan.files, *(file.name for file in found), _INDEX, "config.json", MANIFEST}
    files, left_out = other_files(origin, used, own_tokenizer=tokenizer is not None)
    workers = workers or min(4, os.cpu_count() or 1)

    with _folder(target, force, partial(resume_key, plan, patch)) as folder:
        for name in files:
            _copy(origin / name, folder / name)
        if card:
            _add_to_card(folder / "README.md", card)
        if tokenizer is not None:
            _save_tokenizer(tokenizer, folder)
        edited, added = _write_weights(folder, plan, workers, progress)
        _write_index(origin, folder, plan)
        if verify:
            report["files"] = _verify(folder, plan, edited, workers)
        report |= {"edited": edited, "added": added, "left_out": left_out}
        _write_json(folder / MANIFEST, report)
        _write_json(folder / "config.json", plan.config)
    return str(target) if isinstance(target, RemotePath) else target


def _folder(out: Place, force: bool, key: Callable[[], str]) -> AbstractContextManager[Place]:
    if isinstance(out, RemotePath):
        return remote_folder(out, force)
    return new_folder(out, force, key=key())


def _manifest(
    source: Place, patch: PatchLike, config: Mapping[str, Any], more: Mapping[str, object]
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
    clash = sorted({*report, "edited", "added", "left_out", "files"} & set(more))
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


def _copy(source: Place, target: Place) -> None:
    if isinstance(target, Path):
        target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("wb", buffering=0) as stream:
        append(FileSlice(source, 0, size_of(source)), stream)


def _add_to_card(readme: Place, section: str) -> None:
    """Put a section behind what the copied model card says; its front matter stays at the top."""
    before = ""
    if readme.is_file():
        with readme.open("rb") as stream:
            before = stream.read().decode("utf-8", "replace").rstrip() + "\n\n"
    readme.write_text(before + section.rstrip() + "\n", encoding="utf-8")


def _save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Place) -> None:
    if isinstance(folder, Path):
        tokenizer.save_pretrained(folder)
        return
    with tempfile.TemporaryDirectory() as here:
        tokenizer.save_pretrained(here)
        for path in Path(here).iterdir():
            _copy(path, folder / path.name)


_Notes = dict[str, dict[str, object]]


def _write_weights(folder: Place, plan: Draft, workers: int, progress: bool) -> tuple[_Notes, _Notes]:
    """Write all files of weights; return what was edited and what was added, by name on disk."""
    from tqdm import tqdm

    total = sum(target.spec.nbytes for targets in plan.files.values() for target in targets.values())
    lock, bar = (
        Lock(),
        tqdm(total=total, unit="B", unit_scale=True, desc="checkpoint", disable=not progress, leave=False),
    )

    def advance(count: int) -> None:
        with lock:
            bar.update(count)

    with bar, _one_thread_each():
        notes = _in_parallel(
            [partial(_write_file, folder, name, plan, advance) for name in plan.files], workers
        )
    edited, added = ({k: v for note in notes for k, v in note[part].items()} for part in ("edited", "added"))
    return edited, added


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Keep torch from splitting the small products of a worker: waiting for the other half costs more than the work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _in_parallel(jobs: list[Callable[[Event], Any]], workers: int) -> list[Any]:
    """Run jobs in threads; the first error, and Ctrl-C, ends the others soon. Results in the order of the jobs."""
    stop = Event()
    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(job, stop) for job in jobs]
        try:
            done, waiting = wait(futures, return_when=FIRST_EXCEPTION)
            errors = [error for future in done if (error := future.exception()) is not None]
            if waiting or errors:
                stop.set()
                raise next(error for error in errors if not isinstance(error, CancelledError))
        finally:
            stop.set()
            for future in futures:
                future.cancel()
    return [future.result() for future in futures]


def _write_file(
    folder: Place, name: str, plan: Draft, advance: Callable[[int], None], stop: Event
) -> dict[str, _Notes]:
    """Write one file of weights, unless notes say that an earlier run did."""
    targets, source = plan.files[name], plan.sources[name]
    path, note = folder / name, folder / PROGRESS / f"{name}.json"
    if isinstance(path, Path) and path.exists():
        if note.is_file() and (notes := read_json(note)).pop("size") == path.stat().st_size:
            advance(sum(target.spec.nbytes for target in targets.values()))
            return notes
        path.unlink()
    notes: dict[str, Any] = {"edited": {}, "added": {}}

    def produce(tensor: str) -> Content:
        if stop.is_set():
            raise CancelledError
        target = targets[tensor]
        advance(target.spec.nbytes)
        if target.is_new:
            shape = list(target.spec.shape)
            notes["added"][tensor] = {"dtype": target.spec.dtype, "shape": shape, "file": name}
        if target.edit is None:
            return _old(target)
        return _new(target, name, notes["edited"])

    metadata = {**source.metadata, "format": "pt"}
    specs = [target.spec for target in targets.values()]
    write_stream(path, specs, produce, metadata, like=source if source.slices else None)
    if isinstance(path, Path) and isinstance(note, Path):
        fresh = note.with_suffix(".new")
        fresh.write_text(json.dumps({**notes, "size": path.stat().st_size}))
        fresh.replace(note)
    return notes


def _old(target: Target) -> Content:
    if target.origin is None:
        return torch.zeros(target.spec.shape, dtype=target.spec.torch_dtype)
    header, name = target.origin
    return header.tensors[name] if name in header.tensors else header.slices[name]


def _new(target: Target, file: str, edited: _Notes) -> Iterator[memoryview]:
    edit, spec = target.own_edit(), target.spec
    assert edit is not None
    state = hashlib.sha256()
    for block in new_values(edit, spec, target.origin):
        state.update(block)
        yield block
    edited[spec.name] = {
        **({} if target.parameter == spec.name else {"parameter": target.parameter}),
        "rule": str(getattr(edit, "rule", type(edit).__name__)),
        "rank": getattr(edit, "rank", None),
        "file": file,
        "sha256": state.hexdigest(),
    }


def _verify(folder: Place, plan: Draft, edited: _Notes, workers: int) -> dict[str, object]:
    """Hold everything that was written against what should be there; return the hash of every file."""

    def check(name: str, stop: Event) -> str:
        written = read_header(folder / name)
        for tensor, target in plan.files[name].items():
            if stop.is_set():
                raise CancelledError
            if target.edit is not None:
                wanted = edited[tensor]["sha256"]
            elif target.origin is not None:
                wanted = slice_digest(*target.origin)
            else:
                wanted = hashlib.sha256(bytes(target.spec.nbytes)).hexdigest()
            if slice_digest(written, tensor) != wanted:
                raise FileFormatError(
                    f"{tensor} in {folder / name} does not read back as it was written. Check the disk."
                )
        state = hashlib.sha256()
        with (folder / name).open("rb") as stream:
            while block := stream.read(1 << 22):
                state.update(block)
        return state.hexdigest()

    hashes = _in_parallel([partial(check, name) for name in plan.files], workers)
    return {name: {"sha256": found} for name, found in zip(plan.files, hashes, strict=True)}


def _write_index(source: Place, folder: Place, plan: Draft) -> None:
    listing = next(
        (
            path
            for path in (source / _INDEX, source / "pytorch_model.bin.index.json")
            if path.is_file() and set(plan.files) != {"model.safetensors"}
        ),
        None,
    )
    if listing is None:
        return
    table = read_json(listing)
    listed = [(target.spec, file) for file, targets in plan.files.items() for target in targets.values()]
    table["weight_map"] = {spec.name: file for spec, file in sorted(listed, key=lambda pair: pair[0].name)}
    sizes = {"total_size": sum(spec.nbytes for spec, _ in listed)}
    if "total_parameters" in table.get("metadata", {}):
        sizes["total_parameters"] = sum(torch.Size(spec.shape).numel() for spec, _ in listed)
    table["metadata"] = {**table.get("metadata", {}), **sizes}
    _write_json(folder / _INDEX, table)


def _write_json(path: Place, content: Mapping[str, object]) -> None:
    path.write_text(strict_json(content, path.name), encoding="utf-8")
