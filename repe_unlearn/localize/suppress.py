"""Suppress: switch chosen heads and neurons off, as hooks or in the weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from repe_unlearn.architectures import Architecture
from repe_unlearn.eraser import Eraser
from repe_unlearn.errors import InputError, NonFiniteError, NotBakeableError, ShapeError
from repe_unlearn.fingerprints import fingerprint
from repe_unlearn.folding import bake, writer_input
from repe_unlearn.localize.parts import Part, Units, parts, width
from repe_unlearn.moments import Moments
from repe_unlearn.patch import Patch
from repe_unlearn.plan import ErasurePlan
from repe_unlearn.sites import Site

Mode = Literal["zero", "mean", "negative"]
Means = Mapping[Site, Moments | Tensor]


def suppressor(
    model: nn.Module,
    what: Units,
    chosen: Iterable[tuple[Any, ...]],
    *,
    mode: Mode = "zero",
    scale: float = 1.0,
    means: Means | None = None,
) -> ErasurePlan:
    """Return the plan that replaces what chosen heads or neurons put out, for ``apply`` as hooks or ``bake``.

    Args:
        model: of a family with a row.
        what: ``heads`` (query heads: those of a group that share keys and values are told apart) or ``neurons``.
        chosen: (layer, head) or (layer, neuron); further entries, such as the score of ``rank_neurons``, are ignored.
        mode: ``zero``: nothing; ``mean``: the same for every input, its mean; ``negative``: ``-scale`` times itself.
        scale: of ``negative``, >= 0.
        means: of the whole tensor at each of ``unit_sites(model, what)``, ``[width]`` or what ``capture`` returned
            there; needed for ``mean``.

    Raises:
        InputError: nothing chosen, a layer or unit that does not exist, a mode without what it needs.
        UnsupportedModelError: neurons of a mixture of experts.

    Example:
        ``with apply(model, suppressor(model, "heads", [(3, 1), (7, 0)])): ...``
    """
    if mode not in ("zero", "mean", "negative"):
        raise InputError(f"got mode={mode!r}; needed zero, mean or negative.")
    if (mode == "mean") != (means is not None):
        raise InputError(
            f"got mode={mode!r} {'with' if means is not None else 'without'} means; they go together."
        )
    if not 0 <= scale < float("inf"):
        raise InputError(f"got scale={scale}; needed a finite number >= 0.")
    by_layer: dict[int, set[int]] = {}
    for layer, unit, *_ in chosen:
        by_layer.setdefault(int(layer), set()).add(int(unit))
    if what not in ("heads", "neurons"):
        raise InputError(f"got {what!r}; needed heads or neurons.")
    if not by_layer or min(by_layer) < 0:
        raise InputError(
            f"got {what} of layers {sorted(by_layer)}; needed at least one, as (layer, number) from 0."
        )
    erasers = {}
    for part in parts(model, what, sorted(by_layer)):
        units = sorted(by_layer[part.layer])
        if not 0 <= units[0] <= units[-1] < part.units:
            raise InputError(f"got {what} {units} of layer {part.layer}; it has 0 to {part.units - 1}.")
        erasers[part.site] = _eraser(model, part, units, scale if mode == "negative" else 0.0, means)
    facts = {
        "made by": f"suppressor({what}, {mode})",
        what: str({k: sorted(v) for k, v in sorted(by_layer.items())}),
    }
    return ErasurePlan(erasers, fingerprint(model), facts)


def _eraser(model: nn.Module, part: Part, units: list[int], scale: float, means: Means | None) -> Eraser:
    wide = width(model, Architecture.of(model), part.site)
    size = wide // part.units
    index = [j for unit in units for j in range(unit * size, (unit + 1) * size)]
    axes = torch.zeros(len(index), wide, dtype=torch.float64)
    axes[range(len(index)), index] = 1.0
    shift = torch.zeros(wide, dtype=torch.float64)
    if means is not None:
        if part.site not in means:
            raise InputError(f"got no mean for {part.site}; capture it at unit_sites(model, ...).")
        given = means[part.site]
        mean = given.mean_x if isinstance(given, Moments) else given
        if mean.shape != (wide,):
            raise ShapeError(f"got a mean {tuple(mean.shape)} for {part.site}; needed [{wide}].")
        shift[index] = mean.detach().to("cpu", torch.float64)[index]
    return Eraser((1 + scale) * axes.T, axes, shift)


def suppress_neurons(
    model: nn.Module,
    neurons: Iterable[tuple[Any, ...]],
    *,
    mode: Mode = "zero",
    scale: float = 1.0,
    means: Means | None = None,
) -> Patch:
    """Return the weight edit that switches neurons off: the columns of the MLP's last matrix that read them.

    ``zero``: the column becomes 0; ``negative``: ``-scale`` times itself; ``mean``: 0, and the bias grows by what the
    column gave to the mean. The patched model computes what ``apply(model, suppressor(...))`` computes.

    Args:
        model: of a family with a row, weights in memory and not quantised.
        neurons: (layer, neuron), or what ``rank_neurons`` returns.
        mode: ``zero``, ``mean`` or ``negative``.
        scale: of ``negative``, >= 0.
        means: for ``mean``, as for ``suppressor``.

    Raises:
        as ``suppressor``; NotBakeableError where ``mean`` needs a bias that the family cannot have.

    Example:
        ``patch = suppress_neurons(model, rank_neurons(model, tokenizer, prompts)[:10]); patch.apply_(model)``
    """
    return _patch(model, suppressor(model, "neurons", neurons, mode=mode, scale=scale, means=means))


def suppress_heads(
    model: nn.Module,
    heads: Iterable[tuple[Any, ...]],
    *,
    mode: Mode = "zero",
    scale: float = 1.0,
    means: Means | None = None,
) -> Patch:
    """Return the weight edit that switches attention heads off: the columns of the output projection that read them.

    Args:
        model: of a family with a row, weights in memory and not quantised.
        heads: (layer, query head).
        mode: ``zero``, ``mean`` or ``negative``.
        scale: of ``negative``, >= 0.
        means: for ``mean``, as for ``suppressor``.

    Raises:
        as ``suppress_neurons``.

    Example:
        ``suppress_heads(model, [(3, 1)], mode="negative", scale=2.0).apply_(model)``
    """
    return _patch(model, suppressor(model, "heads", heads, mode=mode, scale=scale, means=means))


def _patch(model: nn.Module, plan: ErasurePlan) -> Patch:
    try:
        return bake(model, plan)
    except NotBakeableError as error:
        raise NotBakeableError(
            error.site,
            error.reason,
            "use mode='zero', or apply(model, suppressor(..., mode='mean')) as hooks",
        ) from None


def selective_pruning(
    model: nn.Module,
    forget: Mapping[Site, Tensor],
    retain: Mapping[Site, Tensor],
    *,
    fraction: float = 0.03,
    eps: float = 1e-5,
) -> Patch:
    """Return the patch that zeroes the neurons that are busier on one text than on another.

    Selective pruning (Pochinkov & Schoots 2024): the score of a neuron is ``forget / (retain + eps)``, and the
    highest ``fraction`` of all neurons of all layers is pruned.

    Args:
        model: of a family with a row.
        forget: mean sizes on what is to be forgotten, ``neuron_activity``.
        retain: the same on what is to be kept.
        fraction: above 0, below 1; at least one neuron is pruned.
        eps: keeps neurons that are silent on both from having large scores.

    Raises:
        InputError: other sites or shapes in the two, or a fraction out of range.
        NonFiniteError: NaN or infinity in one of them.

    Example:
        ``selective_pruning(model, neuron_activity(model, tok, bad), neuron_activity(model, tok, good))``
    """
    if not 0 < fraction < 1 or not eps > 0:
        raise InputError(
            f"got fraction={fraction}, eps={eps}; needed a fraction between 0 and 1 and eps > 0."
        )
    found = {site: writer_input(Architecture.of(model), site) for site in forget}
    layers = {site: place[0] for site, place in found.items() if place is not None}
    if len(layers) != len(found) or not layers or set(forget) != set(retain):
        raise InputError(
            "got activities of other sites; needed both from neuron_activity with the same layers."
        )
    if any(forget[site].shape != retain[site].shape or forget[site].ndim != 1 for site in layers):
        raise ShapeError("got activities of other shapes; needed [neurons] at every site.")
    scores = {site: forget[site].double().cpu() / (retain[site].double().cpu() + eps) for site in layers}
    names = [(layers[site], j) for site, score in scores.items() for j in range(len(score))]
    flat = torch.cat(list(scores.values()))
    if not flat.isfinite().all():
        raise NonFiniteError("the activities hold NaN or infinite values; check the texts and the model.")
    count = max(1, round(fraction * len(flat)))
    chosen = flat.argsort(descending=True, stable=True)[:count].tolist()
    return suppress_neurons(model, [names[i] for i in chosen])
