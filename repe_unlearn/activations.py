"""Capture: run a model over a contrast and stream the activations at sites into Moments."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .contrast import Contrast
from .encoding import Batch, batches, encode
from .errors import InputError, NonFiniteError
from .moments import Accumulator, Moments
from .sites import Site
from .taps import tap
from .tokens import Select

# On a CPU about 500 positions fill the caches; more is slower. On a GPU pass more (16384).
BATCH_TOKENS = 512


class StopForward(Exception):
    """Raised inside a forward once the deepest site has been seen; never leaves this package."""


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Raw activations of one site, in the order of the contrast.

    Attributes:
        x: ``[m, d]`` float32 on the CPU (float64 where the model is float64).
        z: ``[m]`` labels.
        owner: ``[m]`` index of the example each row belongs to.
    """

    x: Tensor
    z: Tensor
    owner: Tensor


def capture(
    model: nn.Module,
    tokenizer: Any,
    contrast: Contrast,
    sites: Iterable[Site],
    *,
    select: Select | str = "last",
    batch_tokens: int = BATCH_TOKENS,
    progress: bool = True,
) -> dict[Site, Moments]:
    """Return the moments of activations and labels at every site, from one pass over the prompts.

    Activations are reduced batch by batch and not kept: memory does not grow with the number of prompts. The
    forward stops after the deepest site, so later blocks and the language-model head cost nothing. Whatever
    happens (an error, Ctrl-C), no hook is left on the model.

    Args:
        model: a Hugging Face model (any module that takes ``input_ids`` and ``attention_mask``).
        tokenizer: its tokenizer.
        contrast: labelled prompts.
        sites: where to look; usually ``Architecture.of(model).sites("attn_in")``.
        select: which tokens count; a ``Select`` or its text form.
        batch_tokens: positions per batch, padding included.
        progress: show a progress bar.

    Returns:
        One ``Moments`` per site, in the order given.

    Raises:
        UnknownSiteError: a site names no module.
        NonFiniteError: NaN or infinity at a site (the message names it).
        InputError: no site, a prompt that is too long.
        NotEnoughDataError: the selection leaves nothing of a prompt.

    Example:
        ``moments = capture(model, tokenizer, contrast, Architecture.of(model).sites("mlp_in"))``
    """
    sites = checked(sites)
    work = prepare(model, tokenizer, contrast, select, batch_tokens)
    sums = {site: Accumulator(classes=len(contrast.classes) or None) for site in sites}
    run(model, work, sites, lambda site, batch, rows: sums[site].add(rows, batch.z), progress, "capture")
    return {site: sums[site].moments() for site in sites}


def gather(
    model: nn.Module,
    tokenizer: Any,
    contrast: Contrast,
    sites: Iterable[Site],
    *,
    select: Select | str = "last",
    batch_tokens: int = BATCH_TOKENS,
    progress: bool = True,
) -> dict[Site, Rows]:
    """Return the selected activations themselves, for probes; same arguments and errors as ``capture``.

    Memory grows with prompts × sites × width (600 prompts × 60 sites × 576 in float32: 83 MB).
    """
    sites = checked(sites)
    work = prepare(model, tokenizer, contrast, select, batch_tokens)
    found: dict[Site, list[Tensor]] = {site: [] for site in sites}

    def keep(site: Site, _batch: Batch, rows: Tensor) -> None:
        found[site].append(rows.to("cpu", torch.promote_types(rows.dtype, torch.float32)))

    run(model, work, sites, keep, progress, "gather")
    owner = torch.cat([batch.owner for batch in work])
    order = torch.argsort(owner, stable=True)
    z = torch.cat([batch.z for batch in work])[order]
    return {site: Rows(torch.cat(parts)[order], z, owner[order]) for site, parts in found.items()}


def checked(sites: Iterable[Site]) -> tuple[Site, ...]:
    """Return the sites as a tuple without repeats; refuse none at all."""
    result = tuple(dict.fromkeys(sites))
    if not result:
        raise InputError("got no site; needed at least one, e.g. Architecture.of(model).sites('attn_in').")
    for site in result:
        if not isinstance(site, Site):
            raise InputError(f"got {site!r} as a site; needed a Site, e.g. Site.parse('model.layers.0.mlp').")
    return result


def prepare(
    model: nn.Module, tokenizer: Any, contrast: Contrast, select: Select | str, batch_tokens: int
) -> list[Batch]:
    """Return the batches of a contrast for one model."""
    select = Select.parse(select) if isinstance(select, str) else select
    config = getattr(model, "config", None)
    encoded = encode(contrast, tokenizer, select, max_length=getattr(config, "max_position_embeddings", None))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (tokenizer.eos_token_id or 0)
    return batches(
        encoded,
        batch_tokens=batch_tokens,
        pad_id=pad,
        # Whatever the tokenizer says: on the left a pad position sees no token at all, and eager attention then gives
        # NaN there in float64, which spreads to the real tokens. On the right it sees the whole prompt.
        side="right",
        pooled=select.pooled,
        real=contrast.kind == "reals",
    )


def run(
    model: nn.Module,
    work: Sequence[Batch],
    sites: Sequence[Site],
    visit: Callable[[Site, Batch, Tensor], None],
    progress: bool,
    label: str,
) -> None:
    """Run every batch and hand each site's selected rows to ``visit``; the forward stops after the last."""
    forward = body(model)
    seen: set[Site] = set()
    current: list[Batch] = []

    def visitor(site: Site) -> Callable[[Tensor], None]:
        def see(x: Tensor) -> None:
            batch = current[0]
            rows = batch.pick(x)
            refuse_nonfinite(site, rows)
            visit(site, batch, rows)
            seen.add(site)
            if len(seen) == len(sites):
                raise StopForward

        return see

    # Not inference_mode: its tensors could neither be added to later nor take part in anyone's gradients.
    with tap(model, {site: visitor(site) for site in sites}), torch.no_grad():
        for batch in tqdm(work, desc=label, unit="batch", disable=not progress, leave=False):
            current[:] = [batch]
            seen.clear()
            try:
                forward(batch)
            except StopForward:
                continue
            missing = [str(site) for site in sites if site not in seen]
            raise InputError(
                f"the forward never reached {', '.join(missing[:3])}; "
                "it is not part of this model's text path."
            )


def refuse_nonfinite(site: Site, rows: Tensor) -> None:
    """Raise NonFiniteError if the selected activations at a site hold NaN or infinity."""
    if not bool(torch.isfinite(rows).all()):
        raise NonFiniteError(
            f"the activations at {site} hold NaN or infinite values; the model's weights or its "
            f"dtype ({rows.dtype}) are at fault, nothing was fitted. Try float32 or bfloat16."
        )


def body(model: nn.Module) -> Callable[[Batch], Any]:
    """Return a function that runs the model without its language-model head on a batch."""
    inner = getattr(model, "base_model", model)
    device = next(model.parameters()).device
    accepts = inspect.signature(inner.forward).parameters
    takes_positions, takes_cache = "position_ids" in accepts, "use_cache" in accepts

    def forward(batch: Batch) -> Any:
        inputs: dict[str, Any] = {"input_ids": batch.ids.to(device), "attention_mask": batch.mask.to(device)}
        if takes_positions:
            inputs["position_ids"] = batch.position_ids.to(device)
        if takes_cache:
            inputs["use_cache"] = False
        return inner(**inputs)

    return forward
