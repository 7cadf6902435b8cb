"""Guardedness: what probes still read at every site, before, after and under a random eraser."""

from __future__ import annotations

from collections.abc import Mapping
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

CONDITIONS = ("before", "after", "random eraser")


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """What the probes found at every site under one condition: predictions on held-out rows, and those rows."""

    transferred: dict[Site, np.ndarray]
    refit: dict[Site, np.ndarray]
    mlp: dict[Site, np.ndarray]
    rows: dict[Site, Rows]


def guardedness(
    model: nn.Module,
    found: Mapping[str, Found],
    shuffled: Mapping[Site, np.ndarray],
    labels: probes.Labels,
    sites: tuple[Site, ...],
    seed: int,
) -> tuple[list[Check], list[Series]]:
    """Return the per-site checks (a), (b), (c) of ``verify``, their controls, and the curves to draw.

    Args:
        model: for grouping sites into panels.
        found: condition -> what its probes found, for each of ``CONDITIONS``.
        shuffled: predictions on the untouched model of probes trained on shuffled labels.
        labels: of the held-out rows.
        sites: the plan's sites.
        seed: of bootstrap and permutations.
    """
    checks: list[Check] = []
    curves: dict[tuple[str, str], dict[Site, probes.Accuracy]] = {}
    for kind in ("transferred", "refit", "mlp"):
        for name in CONDITIONS:
            predictions = getattr(found[name], kind)
            curves[kind, name] = {site: probes.accuracy(predictions[site], labels, seed) for site in sites}
    curves["refit", "shuffled"] = {site: probes.accuracy(shuffled[site], labels, seed) for site in sites}
    pointwise, simultaneous = probes.chance_band(list(found["after"].transferred.values()), labels, seed)
    limit = labels.chance + REFIT_ABOVE_CHANCE

    for site in sites:
        before, after, rand = (curves["transferred", name][site] for name in CONDITIONS)
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
                note=f"trained on fitting prompts, tested on held-out ones; random eraser {rand.value:.2f}; pointwise band ± {pointwise:.3f}",
            )
        )
        before, after, rand = (curves["refit", name][site] for name in CONDITIONS)
        checks.append(
            Check.at_most(
                "probe.refit.linear",
                after.value,
                limit,
                control=before.value,
                low=after.low,
                high=after.high,
                site=str(site),
                note=f"trained and tested on held-out prompts; random eraser {rand.value:.2f}, shuffled labels {curves['refit', 'shuffled'][site].value:.2f}",
            )
        )
        after = curves["mlp", "after"][site]
        checks.append(
            Check.information(
                "probe.refit.mlp",
                after.value,
                control=curves["mlp", "before"][site].value,
                low=after.low,
                high=after.high,
                site=str(site),
                note="one hidden layer of 32, trained and tested on held-out prompts: linear guardedness does not bind it",
            )
        )
    gaps = {
        name: {site: probes.mean_gap(found[name].rows[site], labels) for site in sites} for name in CONDITIONS
    }
    for site in sites:
        base = gaps["before"][site]
        floor, high = probes.gap_interval(found["after"].rows[site], labels, seed)
        value = gaps["after"][site] / base if base > 0 else 0.0
        checks.append(
            Check.information(
                "gap.heldout",
                value,
                control=gaps["random eraser"][site] / base if base > 0 else 0.0,
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
            0.90,
            note="best held-out accuracy on the untouched model: the probe can find the concept at all",
        )
    )
    lost = min(curves["refit", "random eraser"][s].value - curves["refit", "before"][s].value for s in sites)
    checks.append(
        Check.at_least(
            "control.random_eraser",
            lost,
            -0.05,
            note="largest loss of probe accuracy under a random eraser of equal rank",
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
    return checks, _curves(model, curves, gaps, labels, sites)


_FIGURES = {
    "refit": (
        "Linear probe, trained and tested on unseen prompts",
        "The erased model should lie on the dashed line (chance); the random eraser should lie on the untouched model.",
    ),
    "transferred": (
        "Linear probe, trained on fitting prompts",
        "Tested on held-out content and wording. At chance here alone would say little: the eraser has seen this probe's training set.",
    ),
    "mlp": (
        "MLP probe, trained and tested on unseen prompts",
        "A small network is not bound by linear guardedness. What it still finds above the dashed line is not removed.",
    ),
}


def _curves(
    model: nn.Module,
    curves: Mapping[tuple[str, str], Mapping[Site, probes.Accuracy]],
    gaps: Mapping[str, Mapping[Site, float]],
    labels: probes.Labels,
    sites: tuple[Site, ...],
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
    for name in ("after", "random eraser"):
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
