"""Verify: the quick battery. What is removed at every site, what it cost, and whether all forms of the edit agree."""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from repe_unlearn.activations import BATCH_TOKENS, Rows, gather
from repe_unlearn.contrast import Contrast
from repe_unlearn.eraser import Eraser
from repe_unlearn.errors import (
    InputError,
    NotBakeableError,
    UnsupportedArchitectureError,
    UnsupportedModelError,
)
from repe_unlearn.hooks import apply
from repe_unlearn.plan import ErasurePlan
from repe_unlearn.sites import Site

from . import probes
from .check import Check
from .equivalence import hooked_and_baked, reloaded
from .guardedness import Found, conclusion, guardedness
from .learning import learning_curve
from .neutral import NEUTRAL
from .preservation import Cost, costs
from .report import Report
from .series import Series

HOOK_BAKE_LOGITS = 1e-4
RESIDUAL_COVARIANCE = 1e-10


def verify(
    model: nn.Module,
    tokenizer: Any,
    plan: ErasurePlan,
    *,
    fit: Contrast,
    heldout: Contrast,
    select: str | None = None,
    others: Mapping[str, ErasurePlan] | None = None,
    exported: str | Path | None = None,
    neutral: Sequence[str] = NEUTRAL,
    probe_prompts: int = 560,
    batch_tokens: int = BATCH_TOKENS,
    seed: int = 0,
    progress: bool = True,
) -> Report:
    """Measure what a plan removes at every site, what it costs, and that hook, bake and export are one function.

    Nothing is concluded from the prompts that the erasers were fit on. At every site, for the untouched model, the
    erased one and one with random erasers of the same rank:
    (a) a linear probe trained on fitting prompts, tested on held-out content and wording;
    (b) linear, MLP and RBF probes trained *and* tested on held-out prompts, which the eraser never saw;
    (c) the distance of the held-out class means.
    The control of (b) is the same probe with shuffled training labels. Then KL and perplexity on neutral text, hook
    against baked weights and, if ``exported`` is given, against the reloaded folder.

    This is linear guardedness at the selected tokens of the plan's sites. It is not removal: see the MLP and RBF probes, and
    nothing was attacked (no relearning, no quantisation, no paraphrase).

    Args:
        model: the untouched model; it is restored bit for bit.
        tokenizer: its tokenizer.
        plan: the plan to verify.
        fit: the prompts that it was fit on.
        heldout: prompts with other content and wording (``Contrast.split``), at least two content groups.
        select: tokens that the probes see; default those that the plan was fit on.
        others: further plans for the cost table and the trade-off figure, e.g. ``{"mean difference": plan2}``.
        exported: folder that ``export.checkpoint`` wrote for this plan.
        neutral: texts for KL and perplexity.
        probe_prompts: at most this many held-out prompts, and half as many fitting ones, are used for probes.
        batch_tokens: positions per batch.
        seed: of folds, bootstrap, controls.
        progress: show progress bars.

    Returns:
        A report; ``report.raise_if_failed()`` for use in scripts.

    Raises:
        ModelMismatchError: plan of another model.
        InputError: real-valued labels, held-out prompts that share text with the fitting ones, or ``exported`` is no
            folder.
        NotEnoughDataError: too few held-out groups, or fewer than 12 fitting pairs among ``probe_prompts``.
        MissingDependencyError: scikit-learn is missing.
    """
    started = time.perf_counter()
    plan.require(model)
    select = select or plan.provenance.get("select", "last")
    require_apart(fit, heldout)
    if exported is not None and not Path(exported).is_dir():
        raise InputError(
            f"got exported={str(exported)!r}, which is no folder; needed what export.checkpoint wrote."
        )
    control = random_plan(plan, seed)
    fit_part, held_part = at_most(fit, probe_prompts // 2, seed), at_most(heldout, probe_prompts, seed)
    sites = plan.sites
    options = {"select": select, "batch_tokens": batch_tokens, "progress": progress}

    found: dict[str, Found] = {}
    labels, curve = None, None
    for name, active in (("before", None), ("after", plan), ("random eraser", control)):
        rows_fit, rows = _gather(model, tokenizer, fit_part, held_part, sites, active, options)
        labels = labels or probes.Labels.of(next(iter(rows.values())), held_part, seed)
        if name == "before":
            curve = learning_curve(rows_fit, rows, fit_part, labels, seed=seed)
        found[name] = Found.of(rows_fit, rows, labels, seed)
    assert labels is not None
    assert curve is not None
    shuffled = probes.refit(found["before"].rows, labels, shuffle=seed)
    checks, series = guardedness(model, found, shuffled, labels, sites, seed)

    checks += _residual(plan)

    plans = {"this plan": plan, **(others or {}), "random eraser": control}
    cost = costs(
        model, tokenizer, neutral, {name: (lambda p=p: apply(model, p)) for name, p in plans.items()}
    )
    checks += _cost_checks(cost)
    refits = {"untouched": found["before"].refit, "this plan": found["after"].refit}
    for name, other in (others or {}).items():
        with apply(model, other):
            refits[name] = probes.refit(gather(model, tokenizer, held_part, sites, **options), labels)
    refits["random eraser"] = found["random eraser"].refit
    series += [_trade_off(cost, refits, labels), curve]
    checks += _equivalence(model, tokenizer, plan, neutral, exported)

    seconds = time.perf_counter() - started
    return Report(
        title=f"{plan.provenance.get('concept', 'concept')}: what the eraser removed",
        subtitle=f"{len(sites)} sites of {type(model).__name__}, quick battery",
        checks=tuple(checks),
        series=tuple(series),
        facts=_facts(model, plan, fit_part, held_part, labels, select, seed, seconds),
        verdict=conclusion(checks, labels.chance),
    )


def random_plan(plan: ErasurePlan, seed: int = 0) -> ErasurePlan:
    """Return the control: at every site an orthogonal eraser of the same rank and shift in a random direction."""
    generator = torch.Generator().manual_seed(seed)
    erasers = {}
    for site, e in plan.erasers.items():
        basis, _ = torch.linalg.qr(torch.randn(e.dim, e.rank, generator=generator, dtype=torch.float64))
        erasers[site] = Eraser(basis, basis.T, e.shift.cpu())
    return plan.replace(erasers)


def require_apart(fit: Contrast, heldout: Contrast) -> None:
    """Refuse held-out prompts that are also fitting prompts.

    Raises:
        InputError: there are such prompts.
    """
    if leak := set(fit.texts) & set(heldout.texts):
        raise InputError(
            f"{len(leak)} held-out prompts are also fitting prompts, e.g. {min(leak)[:60]!r}; use Contrast.split."
        )


def at_most(contrast: Contrast, prompts: int, seed: int = 0) -> Contrast:
    """Return a contrast of at most so many prompts, pairs whole and classes balanced."""
    if len(contrast) <= prompts:
        return contrast
    most, size = contrast.units()
    return contrast.sample(max(1, min(most, int(prompts / size))), seed)


def _gather(
    model: nn.Module,
    tokenizer: Any,
    fit: Contrast,
    heldout: Contrast,
    sites: tuple[Site, ...],
    plan: ErasurePlan | None,
    options: dict,
) -> tuple[dict[Site, Rows], dict[Site, Rows]]:
    with nullcontext() if plan is None else apply(model, plan):
        rows_fit = gather(model, tokenizer, fit, sites, **options)
        return rows_fit, gather(model, tokenizer, heldout, sites, **options)


def _residual(plan: ErasurePlan) -> list[Check]:
    """What the fit itself recorded: how much of Σxz its erasers leave on the fitting moments, in float64."""
    if "residual" not in plan.provenance:
        return []
    value = float(plan.provenance["residual"])
    note = "worst |P Σxz| / |Σxz| over sites on the fitting moments: the algebra is right; it says nothing about other prompts"
    return [Check.at_most("fit.residual", value, RESIDUAL_COVARIANCE, control=1.0, note=note)]


def _cost_checks(cost: Mapping[str, Cost]) -> list[Check]:
    checks = []
    for name, c in cost.items():
        slug = name.replace(" ", "_")
        checks += [
            Check.information(
                f"cost.kl_mean.{slug}",
                c.kl_mean,
                control=cost["random eraser"].kl_mean,
                note=f"nats per token over {c.tokens} neutral tokens",
            ),
            Check.information(
                f"cost.kl_p95.{slug}",
                c.kl_p95,
                control=cost["random eraser"].kl_p95,
                note="95th percentile over tokens",
            ),
            Check.information(
                f"cost.perplexity.{slug}",
                c.perplexity,
                control=c.base_perplexity,
                note=f"control: untouched model; same top token at {c.top1:.1%}",
            ),
        ]
    return checks


def _trade_off(
    cost: Mapping[str, Cost], refits: Mapping[str, Mapping[Site, np.ndarray]], labels: probes.Labels
) -> Series:
    """One point per plan: what its worst site still shows to a linear probe, against what it changes elsewhere."""
    worst = [max(float((p == labels.z).mean()) for p in found.values()) for found in refits.values()]
    return Series(
        "Removal against cost",
        "one plan each",
        tuple(cost[name].kl_mean if name in cost else 0.0 for name in refits),
        tuple(worst),
        x_label="mean KL to the untouched model on neutral text (nats per token)",
        y_label="worst site, refit probe accuracy",
        chance=labels.chance,
        marker_only=True,
        point_labels=tuple(refits),
        caption="Down and left is better: nothing readable at the worst site, no change elsewhere.",
    )


def _equivalence(
    model: nn.Module, tokenizer: Any, plan: ErasurePlan, neutral: Sequence[str], exported: str | Path | None
) -> list[Check]:
    prompts = [tokenizer(text)["input_ids"] for text in neutral[:4]]
    # A short opening, so that the 64 generated tokens depend on the edit.
    prompts = [prompts[0][:12], *prompts]
    try:
        base, hooked, baked = hooked_and_baked(model, plan, prompts)
    except (NotBakeableError, UnsupportedArchitectureError, UnsupportedModelError) as error:
        rows = [Check.information("bake.possible", 0.0, note=str(error))]
        if exported is not None:  # asked for and not measured: that must not look like a pass
            note = "not measured: there are no baked weights to hold the export against"
            rows.append(Check.at_least("export.equals_bake.bits", float("nan"), 1.0, note=note))
        return rows
    effect = hooked.far_from(base)
    checks = [
        Check.at_most(
            "bake.equals_hook.logits",
            hooked.far_from(baked),
            HOOK_BAKE_LOGITS,
            control=effect,
            note="largest difference; control: hook against untouched",
        ),
        Check.at_least(
            "bake.equals_hook.tokens",
            float(hooked.tokens == baked.tokens),
            1.0,
            note=f"{len(baked.tokens)} greedy tokens, key-value cache on",
        ),
    ]
    if exported is not None:
        again = reloaded(exported, prompts)
        checks += [
            Check.at_least(
                "export.equals_bake.bits",
                float(again.same_bits(baked)),
                1.0,
                control=float(again.same_bits(base)),
                note=f"reloaded by plain transformers in a fresh process; largest difference {again.far_from(baked):.1e}",
            ),
            Check.at_least(
                "export.equals_bake.tokens",
                float(again.tokens == baked.tokens),
                1.0,
                note=f"{len(again.tokens)} greedy tokens",
            ),
        ]
    return checks


def _facts(
    model: nn.Module,
    plan: ErasurePlan,
    fit: Contrast,
    heldout: Contrast,
    labels: probes.Labels,
    select: str,
    seed: int,
    seconds: float,
) -> dict[str, str]:
    import transformers

    name = getattr(getattr(model, "config", None), "_name_or_path", "")
    return {
        "model": f"{type(model).__name__} {Path(name).name}, fingerprint {plan.fingerprint}",
        **plan.provenance,
        "probe prompts": f"{len(fit)} fitting, {len(heldout)} held out ({len(set(heldout.groups))} content groups, {len(set(heldout.templates))} frames)",
        "probe folds": "two, by content group",
        "tokens probed": select,
        "chance": f"{labels.chance:.3f}",
        "seed": str(seed),
        "seconds": f"{seconds:.0f}",
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {model.device if hasattr(model, 'device') else 'cpu'}",
        "versions": f"python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}",
        "not attacked": "relearning, quantisation, paraphrase, other languages, sampling; tokens other than the selected ones; sites not in the plan",
    }
