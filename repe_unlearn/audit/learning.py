"""Learning curve: how much of the held-out class gap is left, by the number of fitting prompts."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from repe_unlearn.activations import Rows
from repe_unlearn.contrast import Contrast
from repe_unlearn.errors import NoConceptWarning, NotEnoughDataError, NumericalWarning
from repe_unlearn.moments import Moments
from repe_unlearn.plan import Solver
from repe_unlearn.sites import Site
from repe_unlearn.solvers.leace import leace

from .probes import Labels, mean_gap
from .series import Series


def learning_curve(
    fit: Mapping[Site, Rows],
    heldout: Mapping[Site, Rows],
    fit_contrast: Contrast,
    labels: Labels,
    *,
    solver: Solver = leace,
    sizes: Sequence[int] | None = None,
    most_sites: int = 12,
    seed: int = 0,
) -> Series:
    """Return the share of the held-out class-mean gap that is left when n fitting pairs are used.

    One eraser per site on activations of the untouched model (no sequential fit). The line is the median over sites,
    the band their quartiles. On its own fitting prompts every eraser would leave 0: the height of this curve is what
    an eraser fit on so few prompts does *not* remove.

    Args:
        fit: rows of the fitting prompts, from ``gather`` on the untouched model.
        heldout: rows of the held-out prompts.
        fit_contrast: the contrast behind ``fit``.
        labels: of the held-out rows.
        solver: to fit with.
        sizes: numbers of pairs; default about eight from 12 up to all, doubling.
        most_sites: at most this many sites, evenly spaced.
        seed: of the order in which pairs are taken.

    Raises:
        NotEnoughDataError: fewer than 12 pairs and no sizes given.
    """
    sites = [site for site in fit if mean_gap(heldout[site], labels) > 0]
    sites = [
        sites[i] for i in np.unique(np.linspace(0, len(sites) - 1, min(most_sites, len(sites))).astype(int))
    ]
    names = sorted(set(fit_contrast.pairs))
    order = np.random.default_rng(seed).permutation(len(names))
    rank = {names[i]: place for place, i in enumerate(order)}
    owner = next(iter(fit.values())).owner.numpy()
    place = torch.from_numpy(np.array([rank[pair] for pair in fit_contrast.pairs])[owner])
    if sizes is None:
        sizes = [n for n in (12 * 2**i for i in range(20)) if n < len(names)] + [len(names)]
        if len(names) < 12:
            raise NotEnoughDataError(f"got {len(names)} pairs; a learning curve needs at least 12.")
    classes = len(fit_contrast.classes)
    left = np.empty((len(sizes), len(sites)))
    with warnings.catch_warnings():
        # A site without the concept, or fewer prompts than dimensions, is what this curve is about.
        warnings.simplefilter("ignore", NoConceptWarning)
        warnings.simplefilter("ignore", NumericalWarning)
        for i, n in enumerate(sizes):
            for j, site in enumerate(sites):
                rows = fit[site]
                use = place < n
                eraser = solver(Moments.of(rows.x[use], rows.z[use], classes=classes))
                erased = Rows(eraser(heldout[site].x), heldout[site].z, heldout[site].owner)
                left[i, j] = mean_gap(erased, labels) / mean_gap(heldout[site], labels)
    low, middle, high = np.quantile(left, [0.25, 0.5, 0.75], axis=1)
    return Series(
        "Learning curve: gap left against number of fitting pairs",
        f"median of {len(sites)} sites",
        tuple(float(n) for n in sizes),
        tuple(middle.tolist()),
        tuple(low.tolist()),
        tuple(high.tolist()),
        x_label="fitting pairs",
        y_label="share of the held-out class gap left",
        log_x=True,
        log_y=True,
        band="quartiles over sites",
        caption="One eraser per site, untouched activations, held-out content and wording. "
        "If the curve has not flattened, more prompts will remove more.",
    )
