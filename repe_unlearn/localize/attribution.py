"""Attribution: what patching every place would do, estimated from gradients."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from repe_unlearn.errors import InputError
from repe_unlearn.localize.maps import Map
from repe_unlearn.localize.pairs import Pair
from repe_unlearn.localize.parts import Part
from repe_unlearn.localize.patching import Bounds, Job, prepare
from repe_unlearn.localize.runs import Group, Metric, Noise

Path = Literal["point", "inputs", "layers"]


def attribute(
    model: nn.Module,
    tokenizer: Any,
    pairs: Iterable[Pair],
    sites: str,
    *,
    positions: str | None = None,
    metric: Metric = "logit_difference",
    noise: Noise | None = None,
    path: Path = "point",
    steps: int = 8,
    layers: Iterable[int] | None = None,
    units: Iterable[int] | None = None,
    progress: bool = True,
) -> Map:
    """Return the first-order estimate of ``patch_activations``: gradient · (clean - corrupt), all places at once.

    It is exact where the metric is linear in the activation. Elsewhere it is an estimate: check it against patching
    (``Map.correlation``) on a few pairs before you rely on it.

    Args:
        model: a decoder of a family with a row, in eval mode.
        tokenizer: its tokenizer.
        pairs: clean and corrupt prompts.
        sites: a kind of site, ``heads`` or ``neurons``.
        positions: ``each``, ``groups``, ``all`` or one of ``GROUPS``; the same defaults as for patching.
        metric: ``logit_difference`` or ``log_probability``.
        noise: corrupt the subject's embeddings in place of the prompt.
        path: where the gradient is taken. ``point``: in the corrupt run, one forward and one backward pass in all
            (attribution patching). ``inputs``: averaged over runs whose embeddings go from corrupt to clean in
            ``steps`` steps, one pass each. ``layers``: integrated gradients layer by layer, each layer's own
            activations going from corrupt to clean, ``steps`` passes per layer; the places of one layer then add up to
            the effect of patching them together.
        steps: of the two averaged paths, at midpoints.
        layers: block numbers; default all.
        units: heads or neurons; default all.
        progress: show a progress bar.

    Returns:
        A map as of ``patch_activations``, in the same units.

    Raises:
        as ``patch_activations``; InputError for an averaged path with ``positions="last"`` and prompts of two lengths.

    Example:
        ``attribute(model, tokenizer, pairs, "heads", path="layers").top(5)``
    """
    if path not in ("point", "inputs", "layers"):
        raise InputError(f"got path={path!r}; needed point, inputs or layers.")
    if steps < 1:
        raise InputError(f"got steps={steps}; needed at least 1.")
    job = prepare(model, tokenizer, pairs, sites, positions, metric, noise, layers, units)
    if path != "point" and any(group.clean.shape != group.corrupt.shape for group in job.groups):
        raise InputError(
            f"got path={path!r} and prompts of two lengths, between which there is no path; use path='point', or pairs "
            "that line up."
        )
    passes = {"point": 1, "inputs": steps, "layers": steps * len(job.parts)}[path]
    with tqdm(total=passes * len(job.groups), desc="attribute", disable=not progress, leave=False) as bar:
        for group in job.groups:
            bounds = Bounds.of(job, group)
            for part, gradient in _gradients(job, group, bounds, path, steps, bar).items():
                _add(job, group, bounds, part, gradient)
    method = "attribution" if path == "point" else f"attribution ({path}, {steps} steps)"
    return job.map(method)


def _gradients(
    job: Job, group: Group, bounds: Bounds, path: Path, steps: int, bar: Any
) -> dict[Part, Tensor]:
    """Return the gradient at every part, averaged along the path."""
    runner = job.runner
    (first,) = runner.arch.sites("resid_pre", layers=[0])

    def at(parts: tuple[Part, ...], edits: dict) -> dict[Part, Tensor]:
        found = runner.gradients(
            group.corrupt,
            parts,
            lambda logits: runner.value(logits, group.pairs),
            edits=edits,
            noise=group.noise,
        )
        bar.update()
        return found

    if path == "point":
        return at(job.parts, {})
    sums: dict[Part, Tensor] = {}
    for parts, site in [(job.parts, first)] if path == "inputs" else [((p,), p.site) for p in job.parts]:
        low, high = bounds.corrupt[site], bounds.clean[site]
        for k in range(steps):
            between = torch.lerp(low, high, (k + 0.5) / steps)
            for part, gradient in at(parts, {site: lambda x, between=between: between.view_as(x)}).items():
                sums[part] = gradient / steps + sums.get(part, 0.0)
    return sums


def _add(job: Job, group: Group, bounds: Bounds, part: Part, gradient: Tensor) -> None:
    """Sum gradient · (clean - corrupt) over the numbers of each unit and the positions of each column."""
    n, row = len(group.pairs), job.parts.index(part)
    wide = torch.promote_types(gradient.dtype, torch.float32)
    slopes = part.cut(gradient, n).to(wide)
    clean, corrupt = (part.cut(x[part.site], n).to(wide) for x in (bounds.clean, bounds.corrupt))
    for i, pair in enumerate(group.pairs):
        for column, (there, here) in enumerate(pair.columns):
            if not there:
                continue
            moved = slopes[i, here] * (clean[i, there] - corrupt[i, here])  # [positions, units, size]
            job.add(group.members[i], row, column, slice(None), moved.sum((0, 2))[job.units].double().cpu())
