"""Depth: how deep a fact is gone, by handing the stream of an edited model to the original (activation patching, UDS)."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from repe_unlearn.answers import Asked, Beginning, Step, answers
from repe_unlearn.architectures import Architecture
from repe_unlearn.audit.lens import per_fact, with_options
from repe_unlearn.audit.scores import Scores, Table, curves
from repe_unlearn.audit.series import Series
from repe_unlearn.audit.states import blocks, states
from repe_unlearn.errors import ModelMismatchError, NotEnoughDataError
from repe_unlearn.facts import Facts, Form, Question, Role
from repe_unlearn.placement import input_device, require_whole
from repe_unlearn.taps import Tap, tap

BATCH_TOKENS = 512
MANY = 8  # blocks that are patched where none are asked for
LEAST = 0.05  # nats that a block must cost to count


@dataclass(frozen=True, slots=True, eq=False)
class Ignorance:
    """What it costs the original to be handed the stream of somebody who does not know (the first half of UDS).

    It depends on the original and the source only: measure it once, and use it for every model of a battery.

    Attributes:
        source: whose stream: the gold model, or decoys.
        own: fact -> margin of the original by itself, nats.
        floor: margin of the original where it does not know, nats: on decoys, or the gold model's if there are none.
        cost: block -> mean margin on forgotten facts that is lost there, nats.
        kept: block -> fact -> margin with that stream, for all facts that could be patched.
    """

    source: str
    own: Mapping[int, float]
    floor: float
    cost: Mapping[int, float]
    kept: Table

    @property
    def counted(self) -> tuple[int, ...]:
        """The blocks at which the knowledge is in the stream: not knowing costs more than 0.05 nats there."""
        return tuple(layer for layer, lost in self.cost.items() if lost > LEAST)


def ignorance(
    base: nn.Module,
    tokenizer: Any,
    facts: Facts,
    *,
    gold: nn.Module | None = None,
    forms: Sequence[Form] = ("unseen",),
    roles: Iterable[Role] | None = None,
    layers: Iterable[int] | None = None,
    seed: int = 0,
    batch_tokens: int = BATCH_TOKENS,
    progress: bool = True,
) -> Ignorance:
    """Return what not knowing costs block by block: with a gold model's stream, or with that of decoys.

    Args:
        base: the original model.
        tokenizer: its tokenizer, a fast one.
        facts: the facts of all roles.
        gold: a model of the same shape that never knew. Without it the stream is the original's own on a
            decoy that is asked for in the same wording and goes on with the same tokens, drawn for every question.
        forms: wordings to ask in.
        roles: of the facts that are asked for; default all.
        layers: block numbers; default 8 evenly spaced, the last among them.
        seed: of the decoys.
        batch_tokens: positions per batch.
        progress: show a progress bar.

    Raises:
        NotEnoughDataError: nothing to be forgotten can be asked for, or there are neither gold nor decoys.
        ModelMismatchError: gold is of another shape.
        UnsupportedArchitectureError: no row for this family.
    """
    everything = with_options(facts, forms, seed, roles)
    chosen = _spaced(base) if layers is None else blocks(base, layers)
    if gold is None:
        source, streams, questions = _decoys(
            base, tokenizer, facts, everything, chosen, seed, batch_tokens, progress
        )
        asked = Asked.of(base, tokenizer, questions)
    else:
        _same_shape(base, gold)
        asked = Asked.of(base, tokenizer, everything)
        streams = _streams(gold, asked, chosen, batch_tokens, progress)
        source, questions = "gold model", everything

    def said(model: nn.Module) -> dict[int, float]:
        found = answers(
            model, tokenizer, facts, questions=everything, batch_tokens=batch_tokens, progress=progress
        )
        return per_fact(everything, found.margin.tolist())

    kept = _patched(base, asked, questions, chosen, streams, batch_tokens, progress)
    every = said(base)
    own = {i: v for i, v in every.items() if i in kept[chosen[0]]}
    if not any(facts.facts[i].role == "forget" for i in own):
        raise NotEnoughDataError("no fact that is to be forgotten can be patched; give wordings and options.")
    cost = {layer: _known(own, facts) - _known(row, facts) for layer, row in kept.items()}
    decoys = [v for i, v in every.items() if facts.facts[i].role == "decoy"]
    floor = float(np.mean(decoys)) if decoys or gold is None else _known(said(gold), facts)
    return Ignorance(source, own, floor, cost, kept)


def depth(
    model: nn.Module,
    tokenizer: Any,
    facts: Facts,
    *,
    base: nn.Module,
    gold: nn.Module | None = None,
    reference: Ignorance | None = None,
    forms: Sequence[Form] = ("unseen",),
    roles: Iterable[Role] | None = None,
    layers: Iterable[int] | None = None,
    seed: int = 0,
    batch_tokens: int = BATCH_TOKENS,
    progress: bool = True,
) -> Scores:
    """Return how much the original still says when it goes on from the stream of another model, in nats of margin.

    At the positions before the tokens of an answer, what a block of the original hands on is replaced by what the same
    block of the model hands on; one block at a time, and only blocks where being handed the stream of somebody who does
    not know costs the original something (``Ignorance.counted``; they are chosen on the original). A fact's score is its
    margin in the original, less what the model's streams cost, in shares of what not knowing costs: the original scores
    its own margin, a model that never knew what the original scores on decoys. Decoys are treated alike.

    The curves and settings also hold the Unlearning Depth Score: mean over forgotten facts of
    sum(clip(cost here, 0, cost of not knowing)) / sum(cost of not knowing) over the fact's own blocks where that is above
    0.05 nats. 1 is as deep as never known; 0 is all there.

    Args:
        model: the model under test, of the same shape as ``base``.
        tokenizer: its tokenizer, a fast one.
        facts: the facts of all roles.
        base: the original model.
        gold: a model that never knew; see ``ignorance``.
        reference: of ``ignorance`` with the same facts, forms, roles, layers and seed; measured here if it is not given.
        forms: wordings to ask in.
        roles: of the facts that are asked for; default all.
        layers: block numbers; default 8 evenly spaced, the last among them.
        seed: of the decoys.
        batch_tokens: positions per batch.
        progress: show a progress bar.

    Raises:
        ModelMismatchError: models of different shapes.
        NotEnoughDataError: not knowing costs nothing at any block, or as ``ignorance``.
        UnsupportedArchitectureError: no row for this family.

    Example:
        ``depth(edited, tokenizer, facts, base=original, gold=gold).facts["UDS"]``
    """
    _same_shape(base, model)
    if reference is None:
        reference = ignorance(
            base,
            tokenizer,
            facts,
            gold=gold,
            forms=forms,
            roles=roles,
            layers=layers,
            seed=seed,
            batch_tokens=batch_tokens,
            progress=progress,
        )
    chosen = tuple(reference.cost)
    questions = [q for q in with_options(facts, forms, seed, roles) if q.fact in reference.own]
    asked = Asked.of(base, tokenizer, questions)
    streams = _streams(model, asked, chosen, batch_tokens, progress)
    kept = _patched(base, asked, questions, chosen, streams, batch_tokens, progress)
    counted, known = reference.counted, _known(reference.own, facts)
    if not counted or known <= reference.floor:
        raise NotEnoughDataError(
            f"the original does not know these facts: its margin is {known:.2f} nats ({reference.floor:.2f} on what it cannot "
            f"know), and the stream of the {reference.source} costs more than {LEAST} nats at {len(counted)} of the blocks "
            f"{', '.join(map(str, chosen))}. Leave out what it does not know (Answers.known), or pass other layers."
        )
    share = sum(reference.cost[layer] for layer in counted) / (known - reference.floor)
    values = {
        i: own - sum(own - kept[layer][i] for layer in counted) / share for i, own in reference.own.items()
    }
    score = _uds(reference, kept, facts)
    settings = {
        "UDS": "none: no fact is known" if score is None else f"{score:.3f}",
        "source of not knowing": reference.source,
        "blocks": ", ".join(map(str, chosen)),
        "blocks that count": ", ".join(map(str, counted)),
        "forms": ", ".join(forms),
        "seed": str(seed),
    }
    return Scores("depth", "T1", values, "nats", _drawn(reference, kept, facts), settings)


def _known(values: Mapping[int, float], facts: Facts) -> float:
    """Return the mean over forgotten facts."""
    return float(np.mean([v for i, v in values.items() if facts.facts[i].role == "forget"]))


def _uds(reference: Ignorance, kept: Table, facts: Facts) -> float | None:
    """Return the Unlearning Depth Score on margins, over the forgotten facts that have a block that counts."""
    found = []
    for i, own in reference.own.items():
        if facts.facts[i].role != "forget":
            continue
        costs = {layer: own - reference.kept[layer][i] for layer in kept}
        costs = {layer: cost for layer, cost in costs.items() if cost > LEAST}
        if costs:
            here = sum(min(max(own - kept[layer][i], 0.0), cost) for layer, cost in costs.items())
            found.append(here / sum(costs.values()))
    return float(np.mean(found)) if found else None


def _drawn(reference: Ignorance, kept: Table, facts: Facts) -> tuple[Series, ...]:
    found = curves(
        kept,
        facts,
        "Depth",
        x_label="block",
        y_label="margin of the right answer (nats)",
        caption="What the original says when it goes on from another stream after a block: that of this model, or of one "
        "that does not know. Forgotten facts that stay above the latter are still in the stream.",
    )
    mean = tuple(_known(row, facts) for row in reference.kept.values())
    label = f"forget, {reference.source}"
    return (
        *found,
        Series("Depth", label, tuple(reference.kept), mean, x_label="block", y_label=found[0].y_label),
    )


def _spaced(model: nn.Module) -> tuple[int, ...]:
    """Return at most 8 evenly spaced block numbers, the last among them."""
    n = Architecture.of(model).n_layers
    return tuple(sorted({round(n * (k + 1) / min(n, MANY)) - 1 for k in range(min(n, MANY))}))


def _same_shape(base: nn.Module, other: nn.Module) -> None:
    shapes = [{name: tuple(p.shape) for name, p in m.named_parameters()} for m in (base, other)]
    if shapes[0] != shapes[1]:
        names = sorted(
            name for name in shapes[0].keys() | shapes[1].keys() if shapes[0].get(name) != shapes[1].get(name)
        )
        raise ModelMismatchError(
            f"got two models whose parameters differ, {names[0]} among them; a stream can be handed only to a model of the "
            "same shape."
        )


def _streams(
    model: nn.Module, asked: Asked, layers: Sequence[int], batch_tokens: int, progress: bool
) -> Tensor:
    """Return ``[layers, beginnings, d]`` the stream after every beginning."""
    at = [[n - 1 for n in ns] for ns in asked.covered]
    return states(
        model, asked.runs, at, layers, batch_tokens=batch_tokens, progress=progress, label="streams"
    )


def _decoys(
    base: nn.Module,
    tokenizer: Any,
    facts: Facts,
    questions: Sequence[Question],
    layers: Sequence[int],
    seed: int,
    batch_tokens: int,
    progress: bool,
) -> tuple[str, Tensor, tuple[Question, ...]]:
    """Return the stream of a decoy after every beginning, and the questions that have a decoy.

    A beginning is the prompt and some tokens of an answer: the prompt gives way to that of a decoy in the same wording.
    """
    rng = random.Random(seed)
    pool: dict[tuple[str, str], list[Question]] = {}
    for q in questions:
        if facts.facts[q.fact].role == "decoy":
            pool.setdefault((facts.facts[q.fact].relation, q.template), []).append(q)
    kept, prompts = list[Question](), list[list[int]]()
    for q in questions:
        others = [d for d in pool.get((facts.facts[q.fact].relation, q.template), []) if d.fact != q.fact]
        if others:
            kept.append(q)
            prompts.append(tokenizer(rng.choice(others).prompt)["input_ids"])
    if not kept:
        raise NotEnoughDataError(
            "there is no gold model, and no decoy in the wording of a fact; give gold=, or facts with decoys."
        )
    asked = Asked.of(base, tokenizer, kept)
    sources: dict[Beginning, Beginning] = {}
    for prompt, options in zip(prompts, asked.spoken, strict=True):
        for ids, start in options:
            for n in range(start, len(ids)):
                sources.setdefault(tuple(ids[:n]), (*prompt, *ids[start:n]))
    distinct = list(dict.fromkeys(sources.values()))
    streams = states(
        base,
        distinct,
        [[len(text) - 1] for text in distinct],
        layers,
        batch_tokens=batch_tokens,
        progress=progress,
        label="decoys",
    )
    number = {text: k for k, text in enumerate(distinct)}
    return "decoys", streams[:, [number[sources[said]] for said in asked.beginnings]], tuple(kept)


def _patched(
    base: nn.Module,
    asked: Asked,
    questions: Sequence[Question],
    layers: Sequence[int],
    streams: Tensor,
    batch_tokens: int,
    progress: bool,
) -> dict[int, dict[int, float]]:
    """Return block -> fact -> margin of the original when that block hands on these streams, ``[layers, beginnings, d]``."""
    require_whole(base)
    device, sites = input_device(base), Architecture.of(base).sites("resid_post", layers=layers)
    found: list[dict[Step, tuple[float, bool]]] = [{} for _ in layers]
    work, begin = asked.batches(batch_tokens), 0
    with (
        torch.no_grad(),
        tqdm(total=len(work) * len(layers), desc="depth", disable=not progress, leave=False) as bar,
    ):
        for batch in work:
            ids, mask, rows, columns = asked.padded(batch, device)
            said = [asked.runs[i][:n] for i in batch for n in asked.covered[i]]
            here = streams[:, begin : begin + len(said)]
            begin += len(said)
            for k, site in enumerate(sites):
                with tap(base, {site: _replaced(rows, columns, here[k])}):
                    logits = base(input_ids=ids, attention_mask=mask, use_cache=False).logits
                found[k] |= asked.read(said, logits[rows.to(logits.device), columns.to(logits.device)])
                bar.update()
    return {
        layer: per_fact(questions, asked.score(steps).margin.tolist())
        for layer, steps in zip(layers, found, strict=True)
    }


def _replaced(rows: Tensor, columns: Tensor, stream: Tensor) -> Tap:
    """Return the tap that puts a stream in place at some rows and columns."""

    def replace(x: Tensor) -> Tensor:
        new = x.clone()
        new[rows.to(x.device), columns.to(x.device)] = stream.to(x.device, x.dtype)
        return new

    return replace
