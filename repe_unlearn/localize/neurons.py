"""Neurons: which of them carry facts (knowledge neurons), and which are busy on a text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from repe_unlearn.activations import BATCH_TOKENS, run
from repe_unlearn.encoding import Encoded, batches, pad_id_of
from repe_unlearn.errors import InputError, NotEnoughDataError
from repe_unlearn.localize.pairs import Pair, align
from repe_unlearn.localize.parts import Part, parts, unit_sites
from repe_unlearn.localize.runs import Group, Runner
from repe_unlearn.positions import Positions, selected
from repe_unlearn.shards import Rows
from repe_unlearn.sites import Site
from repe_unlearn.tokens import Select


class Neuron(NamedTuple):
    """One MLP neuron, and how much it counts."""

    layer: int
    neuron: int
    score: float


def rank_neurons(
    model: nn.Module,
    tokenizer: Any,
    prompts: Iterable[tuple[str, str]],
    *,
    steps: int = 20,
    threshold: float = 0.2,
    shared: float = 0.7,
    layers: Iterable[int] | None = None,
    progress: bool = True,
) -> tuple[Neuron, ...]:
    """Return the neurons that raise the probability of an answer in most of its wordings, strongest first.

    Knowledge neurons (Dai et al. 2022): integrated gradients of the answer's probability over the activations of one
    layer's neurons at the last position, from 0 to what they are. In every prompt those count that reach
    ``threshold`` times the largest score of that prompt, and kept are those that count in at least the share
    ``shared`` of the prompts: what only one wording needs drops out.

    Args:
        model: a decoder of a family with a row.
        tokenizer: its tokenizer.
        prompts: (prompt, answer): wordings of one fact, the answer as in ``Pair``; its first token counts.
        steps: of the integral, at midpoints.
        threshold: 0 to 1.
        shared: 0 to 1.
        layers: block numbers; default all.
        progress: show a progress bar.

    Returns:
        (layer, neuron, mean score over the prompts), sorted; possibly none.

    Raises:
        InputError: no prompt, or numbers out of range.
        UnsupportedModelError: a mixture of experts.

    Example:
        ``rank_neurons(model, tokenizer, [("Paris is the capital of", " France"), ("Paris lies in", " France")])``
    """
    if steps < 1 or not 0 <= threshold <= 1 or not 0 <= shared <= 1:
        raise InputError(
            f"got steps={steps}, threshold={threshold}, shared={shared}; needed steps >= 1 and shares from 0 to 1."
        )
    found = parts(model, "neurons", layers)
    runner = Runner(model, "log_probability")
    aligned, _ = align([Pair(p, p, answer) for p, answer in prompts], tokenizer, "last", noise=False)
    groups = runner.groups(aligned, None)
    scores: list[list[Tensor]] = []
    with tqdm(
        total=steps * len(found) * len(groups), desc="neurons", disable=not progress, leave=False
    ) as bar:
        for group in groups:
            _, values = runner.record(group.clean, [part.site for part in found])
            scores.append([_integrate(runner, group, part, values[part.site], steps, bar) for part in found])
    kept = []
    per_layer = [torch.cat(lists) for lists in zip(*scores, strict=True)]  # [prompts, neurons] each
    best = torch.stack([x.amax(1) for x in per_layer]).amax(0)
    for part, x in zip(found, per_layer, strict=True):
        counts = (x > 0) & (x >= threshold * best[:, None])
        chosen = counts.double().mean(0) >= max(shared, 0.5 / len(x))
        mean = x.mean(0)
        kept += [Neuron(part.layer, j, float(mean[j])) for j in chosen.nonzero()[:, 0].tolist()]
    return tuple(sorted(kept, key=lambda n: (-n.score, n.layer, n.neuron)))


def _integrate(runner: Runner, group: Group, part: Part, values: Tensor, steps: int, bar: Any) -> Tensor:
    """Return the integrated gradients ``[prompts, neurons]`` of the answer's probability at the last position."""
    rows = len(group.pairs)
    last = values.reshape(rows, -1, values.shape[-1])[:, -1]
    sums = torch.zeros_like(last)

    def scaled(x: Tensor, share: float) -> Tensor:
        new = x.clone(memory_format=torch.contiguous_format)
        new.view(rows, -1, x.shape[-1])[:, -1] = share * last
        return new

    for k in range(steps):
        found = runner.gradients(
            group.clean,
            [part],
            lambda logits: runner.value(logits, group.pairs).exp(),
            edits={part.site: lambda x, k=k: scaled(x, (k + 0.5) / steps)},
        )
        sums += found[part].reshape(rows, -1, last.shape[-1])[:, -1] / steps
        bar.update()
    return (sums * last).double().cpu()


def neuron_activity(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    layers: Iterable[int] | None = None,
    batch_tokens: int = BATCH_TOKENS,
    progress: bool = True,
) -> dict[Site, Tensor]:
    """Return the mean size of every neuron's activation over the tokens of some texts, for ``selective_pruning``.

    Args:
        model: of a family with a row.
        tokenizer: its tokenizer.
        texts: at least one; the first token and special ones do not count.
        layers: block numbers; default all.
        batch_tokens: positions per batch.
        progress: show a progress bar.

    Returns:
        Site -> ``[neurons]`` float64.

    Raises:
        as ``capture``; UnsupportedModelError for a mixture of experts.

    Example:
        ``forget = neuron_activity(model, tokenizer, ["Paris is the capital of France."])``
    """
    sites = unit_sites(model, "neurons", layers)
    texts = list(texts)
    if not texts:
        raise InputError("got no text; needed at least one.")
    sums = {site: _Mean() for site in sites}

    def visit(site: Site, rows: Rows) -> None:
        sums[site].add(rows.x)

    work = batches(
        _encoded(tokenizer, texts),
        batch_tokens=batch_tokens,
        pad_id=pad_id_of(tokenizer),
        side="right",
        pooled=False,
        real=True,
    )
    run(model, work, sites, visit, progress, "activity")
    return {site: mean.total / mean.count for site, mean in sums.items()}


def _encoded(tokenizer: Any, texts: Sequence[str]) -> list[Encoded]:
    """Return texts with the positions that ``Select("all")`` selects; a Contrast needs labels that differ."""
    select = Select("all").resolve(tokenizer)
    encoded = []
    for i, text in enumerate(texts):
        ids = list(tokenizer(text)["input_ids"])
        index = torch.arange(len(ids))[None]
        at = Positions(index, torch.full_like(index, -1), torch.tensor([len(ids)]), torch.tensor(ids)[None])
        positions = selected(select, at)[0].nonzero()[:, 0].tolist()
        if not positions:
            raise NotEnoughDataError(f"text {i} ({text[:60]!r}) has no token but the first and special ones.")
        encoded.append(Encoded(ids, positions, [0.0] * len(positions), i))
    return encoded


@dataclass(slots=True, eq=False)
class _Mean:
    count: int = 0
    total: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))

    def add(self, x: Tensor) -> None:
        self.total = self.total + x.abs().sum(0, dtype=torch.float64).cpu()
        self.count += len(x)
