"""Leakage: what a plan leaves of the concept in prompts that it was not fit on, site by site."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from repe_unlearn.activations import BATCH_TOKENS, gather
from repe_unlearn.contrast import Contrast
from repe_unlearn.diagnostics import Diagnosis, diagnose, warn_weak
from repe_unlearn.errors import NumericalWarning
from repe_unlearn.hooks import fused
from repe_unlearn.plan import ErasurePlan
from repe_unlearn.sites import Site
from repe_unlearn.tokens import Select


def diagnose_plan(
    model: nn.Module,
    tokenizer: Any,
    plan: ErasurePlan,
    heldout: Contrast,
    *,
    select: Select | str | None = None,
    batch_tokens: int = BATCH_TOKENS,
    seed: int = 0,
    permutations: int = 199,
    progress: bool = True,
) -> dict[Site, Diagnosis]:
    """Return, for every site of a plan, what ``diagnose`` finds of its eraser on held-out prompts; one pass.

    "Before" is what the eraser was made for. In a plan of ``fit_sequential`` that is the activations at a site with
    all earlier sites erased and this one not: what is left there is little where an early site erased it for all.
    In a plan of ``solve`` it is the activations of the untouched model, so that each eraser is judged by itself;
    nothing is said about the plan as a whole, for which use ``verify``.

    Labels are shuffled inside pairs where the contrast has pairs, else content groups are kept together, so that the
    p-values hold for prompts that share their content.

    Args:
        model: that the plan was fit on.
        tokenizer: its tokenizer.
        plan: what to judge.
        heldout: labelled prompts that the plan was not fit on; on others the correlation after is too small.
        select: which tokens count; default those that the plan says it was fit on, else ``"last"``.
        batch_tokens: positions per batch.
        seed: as ``diagnose``.
        permutations: as ``diagnose``.
        progress: show a progress bar.

    Returns:
        One ``Diagnosis`` per site, in the order of the plan.

    Raises:
        ModelMismatchError: the plan was fit on another model.
        NotEnoughDataError: fewer than 4 clusters, or a half in which the label is constant.
        as ``capture``.

    Warns:
        NumericalWarning: as ``diagnose``, once per kind with the number of sites.

    Example:
        ``print(diagnose_plan(model, tokenizer, plan, heldout)[plan.sites[0]])``
    """
    plan.require(model)
    select = select or plan.provenance.get("select", "last")
    together = plan.provenance.get("fit") == "sequential"
    edits = {site: fused(eraser) for site, eraser in plan.erasers.items() if eraser.rank and together}
    rows = gather(
        model,
        tokenizer,
        heldout,
        plan.sites,
        select=select,
        edits=edits,
        batch_tokens=batch_tokens,
        progress=progress,
    )
    names = [example.pair or example.group or example.text for example in heldout]
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NumericalWarning)  # said below, once for all sites
        for site, eraser in plan.erasers.items():
            clusters = [names[i] for i in rows[site].owner.tolist()]
            options = {"clusters": clusters, "seed": seed, "permutations": permutations}
            found[site] = diagnose(eraser, rows[site].x, rows[site].z, **options)
    warn_weak(found)
    return found
