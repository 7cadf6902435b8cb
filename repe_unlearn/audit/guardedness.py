"""Guardedness: what probes still read at every site, before, after and under a random eraser or edit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn

from repe_unlearn.activations import Rows
from repe_unlearn.architectures import Architecture
from repe_unlearn.errors import UnsupportedArchitectureError, UnsupportedModelError
from repe_unlearn.sites import Site

from . import probes
from .check import Check
from .series import Series

REFIT_ABOVE_CHANCE = 0.10
"""A probe that is trained on unseen prompts may beat chance by at most this."""

PROBE_WORKS = 0.90
"""A probe that finds the concept in the untouched model is right at least this often at its best site."""


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """What the probes found at every site under one condition: predictions on held-out rows, and those rows."""

    transferred: dict[Site, np.ndarray]
    refit: dict[Site, np.ndarray]
    mlp: dict[Site, np.ndarray]
    rbf: dict[Site, np.ndarray]
    rows: dict[Site, Rows]

    @classmethod
    def of(
        cls, fit: dict[Site, Rows], heldout: dict[Site, Rows], labels: probes.Labels, seed: int = 0
    ) -> Found:
        """Train all probes on the rows of one condition."""
        return cls(
            probes.transferred(fit, heldout),
            probes.refit(heldout, labels),
            probes.mlp(heldout, labels, seed=seed),
            probes.rbf(heldout, labels),
            heldout,
        )


def guardedness(
    model: nn.Module,
    found: Mapping[str, Found],
    shuffled: Mapping[Site, np.ndarray],
    labels: probes.Labels,
    sites: tuple[Site, ...],
    seed: int,
    *,
    control: str = "random eraser",
) -> tuple[list[Check], list[Series]]:
    """Return the per-site checks (a), (b), (c) of ``verify``, their controls, and the curves to draw.

    Args:
        model: for grouping sites into panels.
        found: condition -> what its probes found: ``before``, ``after``, and the control.
        shuffled: predictions on the untouched model of probes trained on shuffled labels.
        labels: of the held-out rows.
        sites: where.
        seed: of bootstrap and permutations.
        control: name of the condition in which chance alone was at work.
    """
    conditions = ("before", "after", control)
    checks: list[Check] = []
    curves: dict[tuple[str, str], dict[Site, probes.Accuracy]] = {}
    for kind in ("transferred", "refit", "mlp", "rbf"):
        for name in conditions:
            predictions = getattr(found[name], kind)
            curves[kind, name] = {site: probes.accuracy(predictions[site], labels, seed) for site in sites}
    curves["refit", "shuffled"] = {site: probes.accuracy(shuffled[site], labels, seed) for site in sites}
    pointwise, simultaneous = probes.chance_band(list(found["after"].transferred.values()), labels, seed)
    limit = labels.chance + REFIT_ABOVE_CHANCE

    for site in sites:
        before, after, rand = (curves["transferred", name][site] for name in conditions)
        checks.append(
            Check.within(
                "probe.transferred.linear",
                after.value,
                labels.chance,
                simultaneous,
                control=before.value,
                low=after.low,
                high=after.high,
                site=str(site),
                note=f"trained on fitting prompts, tested on held-out ones; {control} {rand.value:.2f}; pointwise band ± {pointwise:.3f}",
            )
        )
        before, after, rand = (curves["refit", name][site] for name in conditions)
        checks.append(
            Check.at_most(
                "probe.refit.linear",
                after.value,
                limit,
                control=before.value,
                low=after.low,
                high=after.high,
                site=str(site),
                note=f"trained and tested on held-out prompts; {control} {rand.value:.2f}, shuffled labels {curves['refit', 'shuffled'][site].value:.2f}",
            )
        )
        for kind, what in _NETWORKS.items():
            after = curves[kind, "after"][site]
            checks.append(
                Check.information(
                    f"probe.refit.{kind}",
                    after.value,
                    control=curves[kind, "before"][site].value,
                    low=after.low,
                    high=after.high,
                    site=str(site),
                    note=f"{what}, trained and tested on held-out prompts: linear guardedness does not bind it",
                )
            )
    gaps = {
        name: {site: probes.mean_gap(found[name].rows[site], labels) for site in sites} for name in conditions
    }
    for site in sites:
        base = gaps["before"][site]
        floor, high = probes.gap_interval(found["after"].rows[site], labels, seed)
        value = gaps["after"][site] / base if base > 0 else 0.0
        checks.append(
            Check.information(
                "gap.heldout",
                value,
                control=gaps[control][site] / base if base > 0 else 0.0,
                high=max(value, high / base) if base > 0 else 0.0,
                low=0.0,
                site=str(site),
                note=f"distance of held-out class means, share of {base:.3g} before; noise alone gives {floor / base if base > 0 else 0.0:.2f}",
            )
        )
    best = max(a.value for a in curves["refit", "before"].values())
    checks.append(
        Check.at_least(
            "control.probe_works",
            best,
            PROBE_WORKS,
            note="best held-out accuracy on the untouched model: the probe can find the concept at all",
        )
    )
    lost = min(curves["refit", control][s].value - curves["refit", "before"][s].value for s in sites)
    checks.append(
        Check.at_least(
            f"control.{control.replace(' ', '_')}",
            lost,
            -0.05,
            note=f"largest loss of probe accuracy under a {control} of equal rank",
        )
    )
    worst = max(abs(a.value - labels.chance) for a in curves["refit", "shuffled"].values())
    checks.append(
        Check.at_most(
            "control.shuffled_labels",
            worst,
            4
            * 0.5
            / (labels.cluster.max() + 1) ** 0.5,  # a pair is one observation, however many rows it has
            note="largest distance from chance, over sites, of a probe trained on shuffled labels; bound: four standard errors",
        )
    )
    return checks, _curves(model, curves, gaps, labels, sites, control)


_NETWORKS = {"mlp": "one hidden layer of 32", "rbf": "a support vector machine with a Gaussian kernel"}

_FIGURES = {
    "refit": (
        "Linear probe, trained and tested on unseen prompts",
        "The edited model should lie on the dashed line (chance); the random control should lie on the untouched model.",
    ),
    "transferred": (
        "Linear probe, trained on fitting prompts",
        "Tested on held-out content and wording. At chance here alone would say little: an eraser has seen this probe's training set.",
    ),
    "mlp": (
        "MLP probe, trained and tested on unseen prompts",
        "A small network is not bound by linear guardedness. What it still finds above the dashed line is not removed.",
    ),
    "rbf": (
        "RBF probe, trained and tested on unseen prompts",
        "A kernel machine is not bound by linear guardedness either, and sees other shapes than a small network.",
    ),
}


def conclusion(checks: Sequence[Check], chance: float) -> str:
    """Return in words what the checks of ``guardedness`` say."""

    def values(name: str) -> list[float]:
        return [c.value for c in checks if c.name == name]

    refit = [c for c in checks if c.name == "probe.refit.linear"]
    bad = [c.value for c in refit if not c.passed]
    if max(values("control.probe_works")) < PROBE_WORKS:
        head = (
            f"No conclusion: in the untouched model a linear probe finds the concept at no site (best "
            f"{max(values('control.probe_works')):.2f}, needed {PROBE_WORKS:.2f})."
        )
    elif not bad:
        head = f"Linearly guarded on unseen prompts at all {len(refit)} sites (worst {max(c.value for c in refit):.2f}, chance {chance:.2f})."
    else:
        head = f"Still linearly readable on unseen prompts at {len(bad)} of {len(refit)} sites (worst {max(bad):.2f})."
    mlp, rbf = max(values("probe.refit.mlp")), max(values("probe.refit.rbf"))
    return (
        f"{head} An MLP probe reads up to {mlp:.2f}, an RBF probe {rbf:.2f}. Not attacked: this says nothing about "
        "relearning or other tokens."
    )


def _curves(
    model: nn.Module,
    curves: Mapping[tuple[str, str], Mapping[Site, probes.Accuracy]],
    gaps: Mapping[str, Mapping[Site, float]],
    labels: probes.Labels,
    sites: tuple[Site, ...],
    control: str,
) -> list[Series]:
    panels = _panels(model, sites)
    series = []
    for (kind, name), values in curves.items():
        if name == "shuffled":
            continue
        figure, caption = _FIGURES[kind]
        for panel, members in panels.items():
            a = [values[site] for _, site in members]
            series.append(
                Series(
                    figure,
                    name,
                    tuple(float(layer) for layer, _ in members),
                    tuple(v.value for v in a),
                    tuple(v.low for v in a),
                    tuple(v.high for v in a),
                    y_label="accuracy",
                    chance=labels.chance,
                    panel=panel,
                    caption=caption,
                )
            )
    for name in ("after", control):
        for panel, members in panels.items():
            share = [
                gaps[name][s] / gaps["before"][s] if gaps["before"][s] > 0 else float("nan")
                for _, s in members
            ]
            series.append(
                Series(
                    "Distance of held-out class means",
                    name,
                    tuple(float(layer) for layer, _ in members),
                    tuple(share),
                    y_label="share of the untouched model's",
                    panel=panel,
                    caption="1 means nothing was removed. The fitting prompts themselves would show 0 by construction.",
                )
            )
    return series


def _panels(model: nn.Module, sites: tuple[Site, ...]) -> dict[str, list[tuple[int, Site]]]:
    """Group sites by kind for small multiples; models without a row get one panel in order of execution."""
    panels: dict[str, list[tuple[int, Site]]] = {}
    try:
        stacks = Architecture.all_of(model)
    except (UnsupportedArchitectureError, UnsupportedModelError):
        # An unknown family is fine for hooks: plot by order instead.
        return {"sites in order": list(enumerate(sites))}
    for i, site in enumerate(sites):
        kind, layer = next((at for arch in stacks if (at := arch.locate(site))), ("other", i))
        panels.setdefault(kind, []).append((layer, site))
    return panels
