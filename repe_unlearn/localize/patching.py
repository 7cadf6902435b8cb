"""Activation patching: put a clean activation into a corrupt run, and see how much of the answer comes back."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from repe_unlearn.errors import InputError, NonFiniteError, NumericalWarning
from repe_unlearn.localize.maps import Map
from repe_unlearn.localize.pairs import Aligned, Pair, align
from repe_unlearn.localize.parts import Part, parts
from repe_unlearn.localize.runs import Group, Metric, Noise, Runner
from repe_unlearn.sites import Site


def patch_activations(
    model: nn.Module,
    tokenizer: Any,
    pairs: Iterable[Pair],
    sites: str,
    *,
    positions: str | None = None,
    metric: Metric = "logit_difference",
    noise: Noise | None = None,
    layers: Iterable[int] | None = None,
    units: Iterable[int] | None = None,
    batch_tokens: int = 512,
    progress: bool = True,
) -> Map:
    """Return for every place how much of the clean answer its clean activation brings back, measured by running it.

    Each place of each pair is a run of its own (batched): the corrupt prompt, with the activation of the clean one at
    that place. A run begins at the block of its place, with the stream of the corrupt run, so the blocks before cost
    nothing: half of the work over all layers. Whatever happens (an error, Ctrl-C), nothing is left on the model.

    Args:
        model: a decoder of a family with a row, in eval mode.
        tokenizer: its tokenizer.
        pairs: clean and corrupt prompts.
        sites: a kind of site (``resid_pre``, ``resid_post``, ``attn_out``, ``mlp_out``, ``attn_in``, ``mlp_in``):
            layer × position. ``heads`` or ``neurons``: layer × unit, at the output projection's input.
        positions: ``each`` token, ``groups`` around the subject (``GROUPS``), ``all`` at once, or one of the groups,
            such as ``last``. Default ``each``; for heads and neurons ``all`` (one column of positions only).
        metric: ``logit_difference`` (answer - wrong) or ``log_probability`` (of the answer), at the last position.
        noise: corrupt the subject's embeddings in place of the prompt.
        layers: block numbers; default all.
        units: heads or neurons; default all (of a large model's neurons that is one run each).
        batch_tokens: positions per batch.
        progress: show a progress bar.

    Returns:
        A map with ``effects`` = patched - corrupt.

    Raises:
        InputError: prompts that do not line up, answers with one first token, unknown words, or pairs whose clean and
            corrupt metric are the same.
        UnsupportedModelError: neurons of a mixture of experts; a compiled or sharded model.
        UnsupportedArchitectureError: no row.
        NonFiniteError: the model gives NaN or infinity.

    Example:
        ``patch_activations(model, tokenizer, pairs, "resid_pre", positions="groups").plot()``
    """
    job = prepare(model, tokenizer, pairs, sites, positions, metric, noise, layers, units)
    if batch_tokens < 1:
        raise InputError(f"got batch_tokens={batch_tokens}; needed at least 1.")
    runner = job.runner
    total = sum(len(g.pairs) for g in job.groups) * len(job.parts) * len(job.columns) * len(job.units)
    with tqdm(total=total, desc="patch", unit="run", disable=not progress, leave=False) as bar:
        for group in job.groups:
            bounds = Bounds.of(job, group)
            tuples = runner.shapes(group.corrupt)
            width = group.corrupt.shape[1]
            for row, part in enumerate(job.parts):
                places = [
                    (i, column, unit)
                    for i, pair in enumerate(group.pairs)
                    for column in range(len(job.columns))
                    if pair.columns[column][0]
                    for unit in range(len(job.units))
                ]
                step = max(1, batch_tokens // width)
                for begin in range(0, len(places), step):
                    chunk = places[begin : begin + step]
                    index = torch.tensor([i for i, _, _ in chunk], device=runner.device)
                    replace = _replace(job, part, chunk, group, bounds.clean[part.site])
                    stream = bounds.streams[part.layer][index]
                    logits = runner.patched(group.corrupt[index], stream, part, replace, tuples)
                    values = runner.value(logits, [group.pairs[i] for i, _, _ in chunk]).tolist()
                    for (i, column, unit), value in zip(chunk, values, strict=True):
                        job.add(group.members[i], row, column, unit, value - float(bounds.low[i]))
                    bar.update(len(chunk))
                bar.update(len(group.pairs) * len(job.columns) * len(job.units) - len(places))
    return job.map("patching")


def _replace(
    job: Job, part: Part, chunk: Sequence[tuple[int, int, int]], group: Group, clean: Tensor
) -> Callable[[Tensor], Tensor]:
    """Return the function that puts clean values into a batch, one place in every row."""
    source = part.cut(clean, len(group.pairs))

    def replace(x: Tensor) -> Tensor:
        new = x.clone(memory_format=torch.contiguous_format)  # so that what is cut is a view of it
        cut = part.cut(new, len(chunk))
        for row, (i, column, unit) in enumerate(chunk):
            there, here = group.pairs[i].columns[column]
            chosen = job.units[unit]
            cut[row, here, chosen] = source[i, there, chosen]
        return new

    return replace


@dataclass(frozen=True, slots=True, eq=False)
class Bounds:
    """The two runs between which the places of some pairs lie.

    Attributes:
        low: ``[n]`` metric of the corrupt run.
        clean, corrupt: the tensors at the parts' sites and before the first block.
        streams: what the parts' blocks get in the corrupt run, by layer.
    """

    low: Tensor
    clean: Mapping[Site, Tensor]
    corrupt: Mapping[Site, Tensor]
    streams: Mapping[int, Tensor]

    @classmethod
    def of(cls, job: Job, group: Group) -> Bounds:
        """Run the pairs of one length, clean and corrupt, and note how far apart they are."""
        runner, layers = job.runner, sorted({0, *(part.layer for part in job.parts)})
        starts = dict(zip(layers, runner.arch.sites("resid_pre", layers=layers), strict=True))
        sites = list(dict.fromkeys([*(part.site for part in job.parts), *starts.values()]))
        above, clean = runner.record(group.clean, sites)
        below, corrupt = runner.record(group.corrupt, sites, group.noise)
        high, low = runner.value(above, group.pairs), runner.value(below, group.pairs)
        for i, gap in zip(group.members, (high - low).tolist(), strict=True):
            job.gaps[i] += gap / job.samples
        return cls(low, clean, corrupt, {layer: corrupt[site] for layer, site in starts.items()})


@dataclass(slots=True, eq=False)
class Job:
    """What patching and attribution share: the pairs, the places, and the sums that become a map."""

    runner: Runner
    what: str
    pairs: list[Aligned]
    groups: list[Group]
    parts: tuple[Part, ...]
    columns: tuple[str, ...]
    units: list[int]
    samples: int
    effects: Tensor = field(init=False)
    gaps: Tensor = field(init=False)

    def __post_init__(self) -> None:
        shape = (len(self.pairs), len(self.parts), len(self.columns), len(self.units))
        self.effects = torch.zeros(shape, dtype=torch.float64)
        for i, pair in enumerate(self.pairs):
            for column, (there, _) in enumerate(pair.columns):
                if not there:
                    self.effects[i, :, column] = torch.nan
        self.gaps = torch.zeros(len(self.pairs), dtype=torch.float64)

    def add(self, pair: int, row: int, column: int, unit: int | slice, effect: float | Tensor) -> None:
        """Add the effect of one place (of all units with a slice), one sample of the noise."""
        self.effects[pair, row, column, unit] += effect / self.samples

    def map(self, method: str) -> Map:
        """Return the map.

        Raises:
            NonFiniteError: the model gave NaN or infinity.
            InputError: a pair without a gap.
        """
        there = torch.tensor([[bool(c[0]) for c in pair.columns] for pair in self.pairs])[:, None, :, None]
        if not torch.isfinite(torch.where(there, self.effects, 0.0)).all() or not self.gaps.isfinite().all():
            raise NonFiniteError("the model's logits or gradients hold NaN or infinite values; try float32.")
        flat = [i for i, gap in enumerate(self.gaps.tolist()) if gap == 0.0]
        if flat or float(self.gaps.mean()) == 0.0:
            raise InputError(
                f"pair {flat[0] if flat else 0} has the same {self.runner.metric} clean and corrupt, so there is nothing "
                "to recover; leave it out, or choose a corrupt prompt that changes the answer."
            )
        wrong = [i for i, gap in enumerate(self.gaps.tolist()) if gap < 0]
        if 0 < len(wrong) < len(self.pairs):
            warnings.warn(
                f"in {len(wrong)} of {len(self.pairs)} pairs (first: {wrong[0]}) the corrupt prompt gives more for the "
                "answer than the clean one, in the others less; they cancel out. Leave those out that the model does not "
                "know, or read Map.per_pair.",
                NumericalWarning,
                stacklevel=3,
            )
        cut = self.what in ("heads", "neurons")
        return Map(
            self.what,
            method,
            self.runner.metric,
            tuple(part.layer for part in self.parts),
            tuple(map(str, self.units)) if cut else self.columns,
            self.effects[:, :, 0] if cut else self.effects[..., 0],
            self.gaps.clone(),
        )


def prepare(
    model: nn.Module,
    tokenizer: Any,
    pairs: Iterable[Pair],
    sites: str,
    positions: str | None,
    metric: Metric,
    noise: Noise | None,
    layers: Iterable[int] | None,
    units: Iterable[int] | None,
) -> Job:
    """Return the checked job of ``patch_activations`` and ``attribute``; nothing has run yet but noise's embeddings."""
    runner = Runner(model, metric)
    cut = sites in ("heads", "neurons")
    if positions is None:
        positions = "all" if cut else "each"
    if cut and positions in ("each", "groups"):
        raise InputError(
            f"got positions={positions!r} for {sites}; a map of units has one column of positions: use 'all' or one "
            "group, such as 'last'."
        )
    if not cut and units is not None:
        raise InputError(f"got units for {sites}; only heads and neurons have them.")
    found = parts(model, sites, layers)
    aligned, columns = align(pairs, tokenizer, positions, noise=noise is not None)
    widths = sorted({part.units for part in found})
    if len(widths) != 1:
        raise InputError(
            f"got layers with {widths} {sites}; a map has layers of one width: choose them by layers=."
        )
    chosen = list(range(widths[0])) if units is None else list(dict.fromkeys(units))
    if not chosen or not all(0 <= unit < widths[0] for unit in chosen):
        raise InputError(f"got units {chosen[:5]}; this model has {sites} 0 to {widths[0] - 1}.")
    return Job(
        runner,
        sites,
        aligned,
        runner.groups(aligned, noise),
        found,
        columns,
        chosen,
        1 if noise is None else noise.samples,
    )
