"""Audit of an erased attribute: what probes still read in any two checkpoints, whoever made the edit."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from repe_unlearn.activations import BATCH_TOKENS, checked, gather
from repe_unlearn.architectures import Architecture
from repe_unlearn.audit import probes
from repe_unlearn.audit.battery import at_most, require_apart, verify
from repe_unlearn.audit.check import Check
from repe_unlearn.audit.controls import EDITED, ORIGINAL, RANDOM, Subject, subjects
from repe_unlearn.audit.guardedness import Found, conclusion, guardedness
from repe_unlearn.audit.neutral import NEUTRAL
from repe_unlearn.audit.report import Report
from repe_unlearn.audit.retention import distance
from repe_unlearn.contrast import Contrast
from repe_unlearn.patch import Patch
from repe_unlearn.plan import ErasurePlan
from repe_unlearn.sites import Site

BLOCKS = 8
"""Blocks behind which the stream is read by default."""
_CONDITIONS = {"before": ORIGINAL, "after": EDITED, RANDOM: RANDOM}


def audit_contrast(
    base: nn.Module,
    edited: nn.Module | Patch | ErasurePlan,
    tokenizer: Any,
    *,
    fit: Contrast,
    heldout: Contrast,
    sites: Iterable[Site] | None = None,
    select: str | None = None,
    neutral: Sequence[str] = NEUTRAL,
    probe_prompts: int = 560,
    batch_tokens: int = BATCH_TOKENS,
    seed: int = 0,
    command: str = "",
    progress: bool = True,
) -> Report:
    """Measure what probes still read of an attribute after any edit, against the original and a random edit.

    What ``verify`` does for a plan at its own sites, for two checkpoints of one shape: at every site, in the original,
    the edited model and a random edit of equal rank and norm, linear probes trained on fitting prompts, and linear, MLP
    and RBF probes trained and tested on halves of the held-out content. The probe has to succeed on the original, or
    nothing is concluded; probes of shuffled labels have to fail. Then KL and log-perplexity on neutral text. A plan is
    handed to ``verify``.

    What is read is what stands at the sites. An eraser that was baked into the weights that *read* the stream
    (``attn_in``, ``mlp_in``) leaves the stream itself as it was, and is found readable there.

    The models are restored bit for bit. Memory: both models, the difference of their edited tensors, and the activations
    of the probe prompts.

    Args:
        base: the original.
        edited: the same model after any edit, by any tool; or a patch; or a plan.
        tokenizer: of both.
        fit: labelled prompts; best those that the edit was made with.
        heldout: prompts with other content and wording (``Contrast.split``), at least two content groups.
        sites: where to look; default ``resid_post`` of up to 8 blocks, evenly spaced, the last among them (for a plan
            its own sites, always).
        select: tokens that the probes see; default ``"last"``, for a plan those that it was fit on.
        neutral: texts for KL and perplexity, 8 or more for a checkpoint or patch.
        probe_prompts: at most this many held-out prompts, and half as many fitting ones, are used.
        batch_tokens: positions per batch.
        seed: of folds, bootstrap, controls, the random edit.
        command: how to run it again, for the report.
        progress: show progress bars.

    Raises:
        InputError: the two models are equal bit for bit, real-valued labels, or held-out prompts that share text with the
            fitting ones.
        ModelMismatchError: edited is no version of the original.
        NotEnoughDataError: too few held-out groups or neutral texts.
        UnsupportedArchitectureError: the family has no row, and no sites were given.
        MissingDependencyError: scikit-learn is missing.

    Example:
        ``fit, heldout = contrast.split()``;
        ``audit_contrast(base, edited, tokenizer, fit=fit, heldout=heldout).save("report")``
    """
    if isinstance(edited, ErasurePlan):
        return verify(
            base,
            tokenizer,
            edited,
            fit=fit,
            heldout=heldout,
            select=select,
            neutral=neutral,
            probe_prompts=probe_prompts,
            batch_tokens=batch_tokens,
            seed=seed,
            progress=progress,
        )
    started = time.perf_counter()
    require_apart(fit, heldout)
    where = _stream(base) if sites is None else checked(sites)
    models = subjects(base, edited, seed=seed)
    fit_part, held_part = at_most(fit, probe_prompts // 2, seed), at_most(heldout, probe_prompts, seed)
    options = {"select": select or "last", "batch_tokens": batch_tokens, "progress": progress}

    found: dict[str, Found] = {}
    labels = None
    for condition, name in _CONDITIONS.items():
        with models[name].enter() as model:
            rows_fit, rows = (
                gather(model, tokenizer, part, where, **options) for part in (fit_part, held_part)
            )
        labels = labels or probes.Labels.of(next(iter(rows.values())), held_part, seed)
        found[condition] = Found.of(rows_fit, rows, labels, seed)
    assert labels is not None
    shuffled = probes.refit(found["before"].rows, labels, shuffle=seed)
    checks, series = guardedness(base, found, shuffled, labels, where, seed, control=RANDOM)
    return Report(
        title=f"{fit.name}: what the edit removed",
        subtitle=f"{len(where)} sites of {type(base).__name__}, two checkpoints",
        checks=(*checks, *_costs(tokenizer, models, neutral, seed)),
        series=tuple(series),
        facts={
            "models": ", ".join(f"{one.name} {one.key[:24]}" for one in models.values()),
            "concept": fit.name,
            "probe prompts": f"{len(fit_part)} fitting, {len(held_part)} held out "
            f"({len(set(held_part.groups))} content groups, {len(set(held_part.templates))} frames)",
            "probe folds": "two, by content group",
            "tokens probed": options["select"],
            "chance": f"{labels.chance:.3f} (the most frequent class)",
            "seed": str(seed),
            "seconds": f"{time.perf_counter() - started:.0f}",
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
            "not attacked": "relearning, quantisation, paraphrase, other languages; tokens other than the selected ones; "
            "sites without a row above",
            **({"command": command} if command else {}),
        },
        verdict=conclusion(checks, labels.chance),
    )


def _stream(model: nn.Module) -> tuple[Site, ...]:
    """Return the stream behind some blocks, evenly spaced, the last among them."""
    arch = Architecture.of(model)
    layers = np.unique(np.linspace(0, arch.n_layers - 1, BLOCKS).round().astype(int)).tolist()
    return arch.sites("resid_post", layers=layers)


def _costs(
    tokenizer: Any, models: dict[str, Subject], neutral: Sequence[str], seed: int
) -> tuple[Check, ...]:
    before = models[ORIGINAL].enter
    edited, control = (
        distance(tokenizer, before, models[name].enter, neutral, name="neutral", seed=seed)
        for name in (EDITED, RANDOM)
    )
    notes = ("nats per token, mean over texts", "rise of log-perplexity, as a share")
    return tuple(
        Check.information(
            f"cost.{one.name}",
            one.value,
            control=other.value,
            low=one.low,
            high=one.high,
            note=f"{note}; control: {RANDOM}",
        )
        for one, other, note in zip(edited, control, notes, strict=True)
    )
