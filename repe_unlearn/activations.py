"""Capture: run a model over a contrast and stream the activations at sites into Moments."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .architectures import Architecture
from .contrast import Contrast
from .encoding import Batch, Batches, batches, encode, longest_text, pad_id_of
from .errors import (
    InputError,
    NonFiniteError,
    NotEnoughDataError,
    ShapeError,
    UnsupportedArchitectureError,
    UnsupportedModelError,
)
from .fingerprints import fingerprint
from .inputs import InputBatch, InputBatches, Inputs, class_count, input_batches
from .moments import Accumulator, Moments
from .placement import input_device, require_whole
from .ranks import rank_and_world, together
from .resume import Progress
from .rows import all_finite
from .shards import Rows, ShardWriter, arrived, on_host
from .sites import Site
from .taps import Tap, tap
from .tokens import Select

# On a CPU about 500 positions fill the caches; more is slower. On a GPU pass more (16384).
BATCH_TOKENS = 512

Data: TypeAlias = Contrast | Sequence[Inputs]
"""What to run a model on: labelled prompts with a tokenizer, or batches of tensors without one."""


class StopForward(Exception):
    """Raised inside a forward once the deepest site has been seen; never leaves this package."""


def capture(
    model: nn.Module,
    tokenizer: Any,
    contrast: Data,
    sites: Iterable[Site],
    *,
    select: Select | str | None = None,
    batch_tokens: int = BATCH_TOKENS,
    target: Site | None = None,
    resume: str | Path | None = None,
    every: int = 200,
    keep: str | Path | None = None,
    keep_dtype: torch.dtype | None = None,
    progress: bool = True,
) -> dict[Site, Moments]:
    """Return the moments of activations and labels at every site, from one pass over the prompts.

    Activations are reduced batch by batch, where the model computed them, and not kept: memory does not grow with
    the number of prompts beyond their token ids. The forward stops after the deepest site, so later blocks and the
    language-model head cost nothing. Whatever happens (an error, Ctrl-C), no hook is left on the model.

    Several processes: under ``torchrun``, with the process group initialised, every rank runs its share of the
    batches and all return the moments of all; every rank has to make the call.

    Args:
        model: a Hugging Face model (any module that takes ``input_ids`` and ``attention_mask``), or with ``Inputs``
            any module at all. Its weights may be spread or offloaded by accelerate.
        tokenizer: its tokenizer; None with ``Inputs``.
        contrast: labelled prompts, or a sequence of ``Inputs``.
        sites: where to look; usually ``Architecture.of(model).sites("attn_in")``.
        select: which tokens count; a ``Select`` or its text form. Default ``"last"``, and ``"all"`` for ``Inputs``
            (which take ``"all"`` and ``"mean"`` only).
        batch_tokens: positions per batch, padding included; ``Inputs`` are batches already.
        target: take the activations at this site, ``[m, d_z]`` reals, as z in place of the labels.
        resume: a file in which the state is saved every ``every`` batches. If it exists the capture goes on from
            there, to the same bits as without the interruption; it is deleted when the capture is complete.
        every: batches between two savings. One saving writes sites × width² float64 numbers.
        keep: a folder into which the selected activations are also written, see ``Shards``.
        keep_dtype: in which dtype; default that of the activations.
        progress: show a progress bar.

    Returns:
        One ``Moments`` per site, in the order given.

    Raises:
        UnknownSiteError: a site names no module.
        UnsupportedModelError: the model is sharded over ranks, wrapped in DDP, or compiled.
        NonFiniteError: NaN or infinity at a site (the message names it).
        InputError: no site, a prompt that is too long, or ``resume`` is of other data, sites or options.
        ModelMismatchError: ``resume`` is of another model.
        OutputExistsError: ``keep`` holds activations already.
        NotEnoughDataError: the selection leaves nothing of a prompt.

    Example:
        ``moments = capture(model, tokenizer, contrast, Architecture.of(model).sites("mlp_in"))``
    """
    sites = checked(sites)
    work = prepare(model, tokenizer, contrast, select, batch_tokens)
    classes = classes_of(contrast)
    sums = {site: Accumulator() for site in sites}
    state = None
    if resume is not None:
        facts = {
            "model": fingerprint(model),
            "dtype": str(next(model.parameters()).dtype),
            "sites": ", ".join(map(str, sites)),
            "target": str(target),
            "keep": f"{keep} {keep_dtype}",
            "data, labels, selection or batch_tokens": work.digest(),
        }
        state = Progress(resume, every, facts)
    done, shards = (0, 0) if state is None else state.load(sums)
    writer = None
    if keep is not None:
        written = None if state is None else shards
        writer = ShardWriter(keep, sites, dtype=keep_dtype, written=written, resumable=state is not None)
    early: list[tuple[Site, Tensor]] = []  # rows of this batch at sites that run before the target
    aim: list[Tensor] = []

    def visit(site: Site, rows: Rows) -> None:
        if writer is not None and site in sums:
            writer.add(site, rows)
        if target is None:
            sums[site].add(rows.x, columns(rows.z, classes), check=False)
            return
        if site == target:
            aim[:] = [rows.x.to(torch.float64)]
        if site in sums:
            early.append((site, rows.x))
        if aim:
            for where, x in early:
                if len(x) != len(aim[0]):
                    raise ShapeError(
                        f"got {len(x)} rows at {where} and {len(aim[0])} at the target {target}; needed sites with the "
                        "same positions."
                    )
                sums[where].add(x, aim[0].to(x.device), check=False)
            early.clear()

    def after(count: int) -> None:
        aim.clear()
        if writer is not None:
            writer.after_batch()
        if state is not None and (done + count) % state.every == 0:
            if writer is not None:
                writer.flush()
            state.save(sums, done + count, 0 if writer is None else writer.written)

    tapped = sites if target is None else checked([*sites, target])
    with writer or nullcontext():
        run(model, work[done:], tapped, visit, progress, "capture", after)
        parts = {site: _moments(a) for site, a in sums.items()}
        result = together(parts, sites)
        if writer is not None:
            writer.finish(
                {
                    "fingerprint": fingerprint(model),
                    "select": str(selection(contrast, select)),
                    "classes": classes,
                    "examples": len(contrast) if isinstance(contrast, Contrast) else sum(map(len, contrast)),
                }
            )
    if state is not None:
        state.remove()
    return result


def gather(
    model: nn.Module,
    tokenizer: Any,
    contrast: Data,
    sites: Iterable[Site],
    *,
    select: Select | str | None = None,
    edits: Mapping[Site, Callable[[Tensor], Tensor]] | None = None,
    batch_tokens: int = BATCH_TOKENS,
    progress: bool = True,
) -> dict[Site, Rows]:
    """Return the selected activations themselves, for probes; same arguments and errors as ``capture``.

    ``edits`` change what the model computes with from a site on; the rows are those from before the edit there.

    Memory grows with prompts × sites × width (600 prompts × 60 sites × 576 in float32: 83 MB); ``capture(keep=)``
    writes them to disk instead. Under ``torchrun`` every rank runs all prompts.
    """
    sites = checked(sites)
    work = prepare(model, tokenizer, contrast, select, batch_tokens, share=False)
    found: dict[Site, list[Rows]] = {site: [] for site in sites}

    def keep(site: Site, rows: Rows) -> None:
        wide = torch.promote_types(rows.x.dtype, torch.float32)
        found[site].append(Rows(on_host(rows.x, wide), on_host(rows.z), on_host(rows.owner)))

    run(model, work, sites, keep, progress, "gather", edits=edits)
    arrived()
    return {site: Rows.joined(parts) for site, parts in found.items()}


def checked(sites: Iterable[Site]) -> tuple[Site, ...]:
    """Return the sites as a tuple without repeats; refuse none at all."""
    result = tuple(dict.fromkeys(sites))
    if not result:
        raise InputError("got no site; needed at least one, e.g. Architecture.of(model).sites('attn_in').")
    for site in result:
        if not isinstance(site, Site):
            raise InputError(f"got {site!r} as a site; needed a Site, e.g. Site.parse('model.layers.0.mlp').")
    return result


def selection(data: Data, select: Select | str | None) -> Select:
    """Return the selection that is meant: the default depends on the data."""
    if select is None:
        return Select("last" if isinstance(data, Contrast) else "all")
    return Select.parse(select) if isinstance(select, str) else select


def classes_of(data: Data) -> int | None:
    """Return the number of classes of some data, None where labels are reals."""
    return (len(data.classes) or None) if isinstance(data, Contrast) else class_count(data)


def columns(z: Tensor, classes: int | None) -> Tensor:
    """Return labels as float64 columns ``[m, k]``, one-hot for class ids; a GPU need not wait for it."""
    if classes is None:
        return z.to(torch.float64)[:, None]
    return (z[:, None] == torch.arange(classes, device=z.device)).to(torch.float64)


def prepare(
    model: nn.Module,
    tokenizer: Any,
    contrast: Data,
    select: Select | str | None,
    batch_tokens: int,
    *,
    share: bool = True,
) -> Batches | InputBatches:
    """Return the batches of some data for one model; under torchrun only those of this rank if ``share``."""
    chosen = selection(contrast, select)
    work: Batches | InputBatches
    if not isinstance(contrast, Contrast):
        if tokenizer is not None:
            raise InputError("got a tokenizer with data that is no Contrast; Inputs go with tokenizer=None.")
        work = input_batches(contrast, chosen)
    else:
        if tokenizer is None:
            raise InputError("got a contrast without a tokenizer; needed the tokenizer of the model.")
        encoded = encode(contrast, tokenizer, chosen, max_length=longest_text(model))
        work = batches(
            encoded,
            batch_tokens=batch_tokens,
            pad_id=pad_id_of(tokenizer),
            # Whatever the tokenizer says: on the left a pad position sees no token at all, and eager attention then
            # gives NaN there in float64, which spreads to the real tokens. On the right it sees the whole prompt.
            side="right",
            pooled=chosen.pooled,
            real=contrast.kind == "reals",
        )
    rank, world = rank_and_world()
    # The batches are sorted by length, so dealing them out one by one gives every rank about the same work.
    return work[rank::world] if share else work


def run(
    model: nn.Module,
    work: Sequence[Batch] | Sequence[InputBatch],
    sites: Sequence[Site],
    visit: Callable[[Site, Rows], None],
    progress: bool,
    label: str,
    after: Callable[[int], None] | None = None,
    edits: Mapping[Site, Callable[[Tensor], Tensor]] | None = None,
) -> None:
    """Run every batch and hand each site's selected rows to ``visit``; the forward stops after the last.

    Rows may hold NaN when they are visited: all sites of a batch are checked at once at its end, since every check
    makes a GPU wait. ``after`` is then called with the number of batches that are done. The model goes on with what
    ``edits`` make of the tensor at a site, after the visit.
    """
    forward, device = body(model, sites), input_device(model)
    finite: dict[Site, Tensor] = {}
    dtypes: dict[Site, torch.dtype] = {}
    current: list[Batch | InputBatch] = []

    def visitor(site: Site) -> Tap:
        edit = None if edits is None else edits.get(site)

        def see(x: Tensor) -> Tensor | None:
            batch = current[0]
            rows = Rows(batch.pick(x), batch.labels(x), batch.owners(x))
            finite[site], dtypes[site] = torch.isfinite(rows.x).all(), rows.x.dtype
            visit(site, rows)
            if len(finite) == len(sites):
                raise StopForward
            return None if edit is None else edit(x)

        return see

    # Not inference_mode: its tensors could neither be added to later nor take part in anyone's gradients.
    with tap(model, {site: visitor(site) for site in sites}), torch.no_grad():
        waste = f", {work.padding:.0%} padding" if isinstance(work, Batches) else ""
        bar = tqdm(work, desc=f"{label}{waste}", unit="batch", disable=not progress, leave=False)
        for count, batch in enumerate(bar, 1):
            current[:] = [batch.to(device)]
            finite.clear()
            try:
                forward(current[0])
            except StopForward:
                pass
            else:
                missing = [str(site) for site in sites if site not in finite]
                raise InputError(
                    f"the forward never reached {', '.join(missing[:3])}; "
                    "it is not part of this model's text path."
                )
            if not bool(torch.stack([flag.to(device) for flag in finite.values()]).all()):
                bad = next(site for site, flag in finite.items() if not flag)
                raise nonfinite(bad, dtypes[bad])
            if after is not None:
                after(count)


def refuse_nonfinite(site: Site, rows: Tensor) -> None:
    """Raise NonFiniteError if the selected activations at a site hold NaN or infinity."""
    if not all_finite(rows):
        raise nonfinite(site, rows.dtype)


def nonfinite(site: Site, dtype: torch.dtype) -> NonFiniteError:
    """Return the error for NaN or infinite activations at a site."""
    return NonFiniteError(
        f"the activations at {site} hold NaN or infinite values; the model's weights or its "
        f"dtype ({dtype}) are at fault, nothing was fitted. Try float32 or bfloat16."
    )


def body(model: nn.Module, sites: Iterable[Site] = ()) -> Callable[[Batch | InputBatch], Any]:
    """Return a function that runs what of a model the sites need, and never its language-model head, on a batch.

    Args:
        model: the model.
        sites: that will be looked at. If all lie in one stack that runs by itself (the encoder of T5, the language
            model of one that sees images too) only that is run.

    Raises:
        UnsupportedModelError: this process holds only a part of the model, or a wrapper of it.
    """
    require_whole(model)
    device = input_device(model)
    paths = [f"{site.path}." for site in sites]
    entries = [e for e in _entries(model) if paths and all(p.startswith(f"{e}.") for p in paths)]
    whole: Any = getattr(model, "base_model", model)
    alone: list[Any] = [model.get_submodule(entry) for entry in entries]
    two_sided = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))

    def forward(batch: Batch | InputBatch) -> Any:
        inputs: dict[str, Any] = {name: t.to(device) for name, t in batch.arguments().items()}
        given = set(inputs) - {"position_ids"}
        stack = next((s for s in alone if given <= set(_accepted(s))), whole)
        if stack is whole and two_sided and "decoder_input_ids" not in inputs:
            raise InputError(
                "got sites of the decoder of an encoder-decoder model and no decoder_input_ids; pass "
                "Inputs({'input_ids': ..., 'attention_mask': ..., 'decoder_input_ids': ...}, z), or sites of the "
                "encoder."
            )
        if "position_ids" not in _accepted(stack):
            inputs.pop("position_ids", None)
        if "use_cache" in _accepted(stack):
            inputs["use_cache"] = False
        return stack(**inputs)

    return forward


def _accepted(module: nn.Module) -> Collection[str]:
    return inspect.signature(module.forward).parameters


def _entries(model: nn.Module) -> list[str]:
    """Return the paths of the model's stacks that run by themselves."""
    try:
        return [arch.entry for arch in Architecture.all_of(model) if arch.entry]
    except (UnsupportedArchitectureError, UnsupportedModelError):
        return []  # capture needs no row


def _moments(sums: Accumulator) -> Moments | None:
    """Return the moments, or None where nothing was added (another rank may have samples)."""
    try:
        return sums.moments()
    except NotEnoughDataError:
        return None
