"""Match a patch with the files of a checkpoint: what will be written, decided before the first byte is."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from repe_unlearn.errors import InputError, ModelMismatchError, UnsupportedModelError
from repe_unlearn.export.folder import strict_json
from repe_unlearn.export.names import Parameter, Piece, parameters
from repe_unlearn.export.places import Place, read_ranges, version_of
from repe_unlearn.export.rewrite import AnyEdit
from repe_unlearn.export.safetensors_io import Header, TensorSpec, tensor_bytes
from repe_unlearn.families import Index, disk_names
from repe_unlearn.fingerprints import digest, sample_positions
from repe_unlearn.patch import Edit

__all__ = ["Draft", "Target", "check_print", "draft", "resume_key", "slice_digest"]

_EDITABLE = ("F64", "F32", "F16", "BF16")
_BUFFERS = (".inv_freq", ".attn.masked_bias", ".gate.e_score_correction_bias")


class PatchLike(Protocol):
    """What exports need of a patch; `repe_unlearn.patch.Patch` has it."""

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
class Target:
    """One tensor to write.

    Attributes:
        spec: name, dtype and shape on disk.
        origin: the file and the name there of its old value; None for zeros.
        parameter: name in the model.
        edit: of the parameter, if it is edited.
        index: cuts this tensor out of the parameter.
    """

    spec: TensorSpec
    origin: tuple[Header, str] | None
    parameter: str
    edit: AnyEdit | None = None
    index: Index = ()

    def own_edit(self) -> AnyEdit | None:
        """Return the edit of this tensor."""
        return self.edit.part(self.index) if isinstance(self.edit, Edit) else self.edit

    @property
    def is_new(self) -> bool:
        """True when the source has no such tensor."""
        return self.origin is None or self.origin[1] != self.spec.name


@dataclass(frozen=True, slots=True)
class Draft:
    """Everything that will be written.

    Attributes:
        files: name of the file -> the tensors in it by name, in order.
        sources: name of the file -> the one of the source that it is made of.
        config: the new config.
    """

    files: Mapping[str, Mapping[str, Target]]
    sources: Mapping[str, Header]
    config: dict[str, Any]


def draft(patch: PatchLike, config: dict[str, Any], headers: Mapping[Any, Header]) -> Draft:
    """Match the patch with the checkpoint.

    Raises:
        ModelMismatchError: the patch names tensors that the checkpoint lacks, or has other shapes.
        UnsupportedModelError: an edited tensor is stored quantised.
        InputError: the patch keeps a tie that no checkpoint can hold.
    """
    if getattr(patch, "adapter", False):
        raise InputError(
            'the patch keeps embedding and head tied (tied="adapter"), which a checkpoint cannot hold together with '
            'the edit of one of them. Write it with export.lora, or bake with tied="untie".'
        )
    model_type = str(config.get("model_type", ""))
    home = {name: header for header in headers.values() for name in _kept(header, config)}
    targets = {name: Target(h.specs[name], (h, name), name) for name, h in home.items()}
    known = parameters(model_type, {name: header.specs[name] for name, header in home.items()})
    updates = dict(patch.config_updates)

    if patch.untie and patch.tied:
        embedding, head = patch.tied
        _require(known, [embedding])
        source = known[embedding].pieces[0].spec
        stored = known[head].pieces[0].spec.name if head in known else disk_names(model_type, head)[0][0]
        _check_tied(config, home, source.name, stored)
        spec = TensorSpec(stored, source.dtype, source.shape)
        targets[stored] = Target(spec, (home[source.name], source.name), head)
        home.setdefault(stored, home[source.name])
        known[head] = Parameter(spec.shape, (Piece(spec),))
        updates["tie_word_embeddings"] = False

    for bias, shape in {**patch.zero_biases, **patch.new_biases}.items():
        if bias in known:
            raise ModelMismatchError(
                f"The patch creates {bias}, which the checkpoint has already: it is for another model."
            )
        weight = _weight_beside(bias, known)
        if not shape or shape[-1] not in weight.shape:
            raise ModelMismatchError(
                f"Bias {bias} {list(shape)} does not fit {weight.name} {list(weight.shape)}."
            )
        _require_plain(weight)
        stored = f"{weight.name.removesuffix('.weight')}{'_' if bias.endswith('_bias') else '.'}bias"
        spec = TensorSpec(stored, weight.dtype, tuple(shape))
        targets[stored], home[stored] = Target(spec, None, bias), home[weight.name]
        known[bias] = Parameter(spec.shape, (Piece(spec),))

    _require(known, patch.edits)
    for name, edit in patch.edits.items():
        if isinstance(edit, Edit) and edit.shape != known[name].shape:
            raise ModelMismatchError(
                f"The edit of {name} is for shape {list(edit.shape)}; the checkpoint has {list(known[name].shape)}."
            )
        if len(known[name].pieces) > 1 and not isinstance(edit, Edit):
            raise InputError(
                f"{name} lies in {len(known[name].pieces)} tensors on disk, and its edit is no patch.Edit."
            )
        for piece in known[name].pieces:
            _require_plain(piece.spec)
            old = targets[piece.spec.name]
            targets[piece.spec.name] = Target(old.spec, old.origin, name, edit, piece.index)

    files = {_file(header): {} for header in headers.values()}
    for name, target in targets.items():
        files[_file(home[name])][name] = target
    return Draft(files, {_file(h): h for h in headers.values()}, _updated(config, updates))


def _file(header: Header) -> str:
    """Return the name of the new file: that of the old one, or what it is called among safetensors."""
    name = header.path.name
    if name.endswith(".bin"):
        return f"{name.removesuffix('.bin').replace('pytorch_model', 'model')}.safetensors"
    return name


def _kept(header: Header, config: Mapping[str, Any]) -> Iterator[str]:
    """Yield the tensors that go into the new file: a pickle holds tied ones under all of their names."""
    seen = set()
    for name in header.specs:
        tensor = header.tensors.get(name)
        place = (
            None if tensor is None or not tensor.numel() else (tensor.data_ptr(), tensor.shape, tensor.dtype)
        )
        if place is not None and place in seen and config.get("tie_word_embeddings") is not False:
            continue
        seen.add(place)
        yield name


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


def _weight_beside(bias: str, known: Mapping[str, Parameter]) -> TensorSpec:
    stem = bias.removesuffix("_bias").removesuffix(".bias")
    for candidate in (f"{stem}.weight", stem):
        if candidate in known:
            return known[candidate].pieces[0].spec
    raise ModelMismatchError(f"The patch creates {bias}, but there is no {stem}.weight.")


def _check_tied(config: Mapping[str, Any], home: Mapping[str, Header], embedding: str, head: str) -> None:
    """Untying copies the embedding over the head: that is right only where both are one matrix."""
    tie = config.get("tie_word_embeddings")
    if head not in home and tie is not False:
        return
    if head in home and tie is True:
        return  # transformers ignores a stored head then
    if head in home and slice_digest(home[head], head) == slice_digest(home[embedding], embedding):
        return
    raise ModelMismatchError(
        f"The patch unties {head} from {embedding}, but this checkpoint has them apart already. "
        "Use the checkpoint of the model the patch was made for."
    )


def slice_digest(header: Header, name: str) -> str:
    """Return the hash of the bytes of one tensor, read in small chunks."""
    state = hashlib.sha256()
    if name in header.tensors:
        for block in header.tensors[name].reshape(-1).split(1 << 22):
            state.update(tensor_bytes(block))
        return state.hexdigest()
    where = header.slices[name]
    with where.path.open("rb") as stream:
        stream.seek(where.begin)
        for begin in range(where.begin, where.end, 1 << 22):
            state.update(stream.read(min(1 << 22, where.end - begin)))
    return state.hexdigest()


def check_print(patch: PatchLike, config: Mapping[str, Any], headers: Mapping[Any, Header]) -> None:
    """Raise ModelMismatchError where the weights in the files are not those that the patch was made for."""
    home = {name: header for header in headers.values() for name in _kept(header, config)}
    specs = {n: header.specs[n] for n, header in home.items() if _counts(header, n)}
    model_type = str(config.get("model_type", ""))
    known = parameters(model_type, specs)
    if patch.untie and patch.tied:
        known.pop(patch.tied[1], None)  # one parameter under two names counts once
    samples = _Samples(known, home)
    got = digest(model_type, ((name, known[name].shape, samples.of(name)) for name in known))
    if got != patch.fingerprint:
        raise ModelMismatchError(
            f"The patch was made for weights with fingerprint {patch.fingerprint}, the source has {got}. Use "
            "the checkpoint the model was loaded from. If you know that it is the right one (it was fitted "
            "in 4 or 8 bits, or its files use other names than the model), pass check_fingerprint=False in Python."
        )


def _counts(header: Header, name: str) -> bool:
    # Buffers, the first two in old checkpoints only; the fingerprint of a model knows parameters.
    return header.specs[name].torch_dtype is not None and not name.endswith(_BUFFERS)


class _Samples:
    """The sampled elements of every parameter, read with one request per file."""

    def __init__(self, known: Mapping[str, Parameter], home: Mapping[str, Header]) -> None:
        self._known = known
        wanted: dict[Place, dict[tuple[int, int], bytes]] = {}
        self._where: dict[str, list[tuple[Header, str, int]]] = {}
        for name, parameter in known.items():
            spots = [parameter.locate(p) for p in sample_positions(torch.Size(parameter.shape).numel())]
            self._where[name] = [(home[piece.spec.name], piece.spec.name, place) for piece, place in spots]
            for header, stored, place in self._where[name]:
                if not header.tensors:
                    wanted.setdefault(header.path, {})[self._range(header, stored, place)] = b""
        self._read = {
            path: dict(zip(ranges, read_ranges(path, list(ranges)), strict=True))
            for path, ranges in wanted.items()
        }

    @staticmethod
    def _range(header: Header, name: str, place: int) -> tuple[int, int]:
        size = _dtype(header, name).itemsize
        begin = header.slices[name].begin + place * size
        return begin, begin + size

    def of(self, name: str) -> Tensor:
        """Return the sampled values of one parameter."""
        parts = self._where[name]
        if not parts:
            return torch.empty(0)
        if parts[0][0].tensors:
            values = [header.tensors[stored].reshape(-1)[place] for header, stored, place in parts]
            return torch.stack(values)
        data = b"".join(self._read[h.path][self._range(h, stored, place)] for h, stored, place in parts)
        return torch.frombuffer(bytearray(data), dtype=_dtype(parts[0][0], parts[0][1]))


def _dtype(header: Header, name: str) -> torch.dtype:
    return header.specs[name].torch_dtype or torch.uint8


def _updated(config: Mapping[str, Any], updates: Mapping[str, object]) -> dict[str, Any]:
    new = {**config, **updates}
    # A composite config keeps the switches of its language model one level down, where the model reads them.
    if isinstance(text := config.get("text_config"), dict):
        new["text_config"] = {**text, **updates}
    strict_json(new, "config_updates")
    return new


def resume_key(plan: Draft, patch: PatchLike) -> str:
    """Return a name for the work: the same only for the same source, patch, release and run of the system."""
    edits = patch.edits
    if not all(isinstance(edit, Edit) for edit in edits.values()):
        return secrets.token_hex(8)  # nothing is known about what such an edit does
    state = hashlib.blake2b(digest_size=8)
    boot = Path("/proc/sys/kernel/random/boot_id")
    # After a crash of the machine, what a note calls finished may not be on the disk.
    state.update(boot.read_bytes() if boot.is_file() else b"")
    for header in plan.sources.values():
        state.update(f"{header.path} {version_of(header.path)} {header.start}".encode())
    facts = (patch.new_biases, patch.zero_biases, patch.tied, plan.config)
    state.update(repr([dict(f) if isinstance(f, Mapping) else f for f in facts]).encode())
    for name, edit in edits.items():
        state.update(f"\0{name}\0{edit.rule}\0{edit.shape}".encode())
        for factor in (edit.left, edit.right):
            state.update(b"-" if factor is None else tensor_bytes(factor))
    return state.hexdigest()
