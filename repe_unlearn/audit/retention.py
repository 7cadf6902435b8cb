"""Retention: what an edit costs where nothing was to be forgotten, with intervals over facts and texts."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import nn

from repe_unlearn.answers import Answers, answers
from repe_unlearn.audit.fluency import ngram_entropy, repetition
from repe_unlearn.audit.likelihoods import greedy
from repe_unlearn.audit.statistics import FEWEST, mean_interval
from repe_unlearn.audit.verdict import Measure, Thresholds
from repe_unlearn.errors import NotEnoughDataError
from repe_unlearn.facts import Facts, Role, draw
from repe_unlearn.placement import input_device

Enter: TypeAlias = Callable[[], AbstractContextManager[nn.Module]]

TEXTS = 48  # of retained facts, for KL and perplexity
FACTS = 64  # of every role, asked whether they are still known
OPTIONS = 3  # of a kept fact without wrong answers
_OPENING, _NEW = 6, 24  # tokens of a neutral text that generation begins with, and tokens that it adds


def distance(
    tokenizer: Any,
    before: Enter,
    after: Enter,
    texts: Sequence[str],
    *,
    name: str,
    lines: Thresholds | None = None,
    seed: int = 0,
) -> tuple[Measure, Measure]:
    """Return KL(before || after) in nats per token and the rise of log-perplexity as a share, on some texts.

    Intervals are over texts, every text counted alike.

    Args:
        tokenizer: of both models.
        before: context in which the original stands.
        after: context in which the edited model stands; the two are entered in turn.
        texts: at least 8 of two tokens or more.
        name: of the texts, goes behind the names of the measures.
        lines: limits of damage; None: the defaults.
        seed: of the bootstrap.

    Raises:
        NotEnoughDataError: fewer than 8 texts of two tokens or more.
        NonFiniteError: the edited model gives NaN.
    """
    encoded = [ids for ids in (tokenizer(text)["input_ids"] for text in texts) if len(ids) > 1]
    if len(encoded) < FEWEST:
        raise NotEnoughDataError(
            f"got {len(encoded)} texts of two tokens or more; needed at least {FEWEST} to measure what an edit costs."
        )
    kl, rise, level = [], [], []
    for ids in encoded:  # one text at a time: its logits under both models are in memory
        p, nll_before = _predicted(before, ids)
        q, nll_after = _predicted(after, ids)
        kl.append(float((p.exp() * (p - q)).sum(-1).mean()))
        rise.append(nll_after - nll_before)
        level.append(nll_before)
    lines = lines or Thresholds()
    share = np.array(rise) / max(float(np.mean(level)), 1e-9)
    return (
        Measure(f"kl.{name}", *mean_interval(kl, seed=seed), limit=lines.kl),
        Measure(f"log_perplexity.{name}", *mean_interval(share, seed=seed), limit=lines.log_perplexity),
    )


def _predicted(enter: Enter, ids: Sequence[int]) -> tuple[torch.Tensor, float]:
    """Return log-probabilities of the next token at every position, and the mean negative one of those that came."""
    with enter() as model, torch.inference_mode():
        tokens = torch.tensor([ids], device=input_device(model))
        logp = model(input_ids=tokens, use_cache=False).logits[0].float().log_softmax(-1).cpu()
    nll = -logp[:-1].gather(1, tokens[0, 1:, None].cpu()).mean()
    return logp.double(), float(nll)


def drop(
    before: Answers,
    after: Answers,
    role: Role,
    *,
    name: str,
    lines: Thresholds | None = None,
    seed: int = 0,
) -> Measure | None:
    """Return by how much the share of right choices fell on facts that should stay; None for fewer than 8 facts.

    Only facts that the original chooses right in most wordings count: the others have nothing to lose.

    Args:
        before: of the original.
        after: of the edited model, to the same questions.
        role: of the facts.
        name: of the measure.
        lines: limits of damage; None: the defaults.
        seed: of the bootstrap over facts.
    """
    old, new = before.per_fact(before.chosen, role), after.per_fact(after.chosen, role)
    falls = [old[i] - new[i] for i in old if i in new and old[i] > 0.5]
    if len(falls) < FEWEST:
        return None
    return Measure(name, *mean_interval(falls, seed=seed), limit=(lines or Thresholds()).neighbours)


def retention(
    tokenizer: Any,
    before: Enter,
    after: Enter,
    facts: Facts,
    neutral: Sequence[str],
    *,
    lines: Thresholds | None = None,
    seed: int = 0,
) -> tuple[Measure, ...]:
    """Return what an edit costs: KL and log-perplexity on retained facts and neutral texts, and lost answers.

    Args:
        tokenizer: of both models.
        before: context in which the original stands.
        after: context in which the edited model stands.
        facts: with the roles retain and neighbour, as far as there are such facts; up to 64 of each are asked.
        neutral: texts that have nothing to do with what was to be forgotten.
        lines: limits of damage; None: the defaults.
        seed: of bootstrap and choice.

    Raises:
        NotEnoughDataError: see ``distance``; texts of retained facts are left out where there are fewer than 8.
    """
    kept: tuple[Role, ...] = tuple(role for role in ("retain", "neighbour") if role in facts.roles)
    measures = list(distance(tokenizer, before, after, neutral, name="neutral", lines=lines, seed=seed))
    if kept:
        sentences = facts.training_text(*kept, seed=seed)[:TEXTS]
        if len(sentences) >= FEWEST:
            measures += distance(tokenizer, before, after, sentences, name="retain", lines=lines, seed=seed)
        chosen = _some(facts, kept, seed)
        asked = facts.questions("unseen", roles=kept) or facts.questions("seen", roles=kept)
        asked = tuple(q for q in asked if q.fact in chosen)
        with before() as model:
            old = answers(model, tokenizer, facts, questions=asked, progress=False)
        with after() as model:
            new = answers(model, tokenizer, facts, questions=asked, progress=False)
        for role in kept:
            name = "retained" if role == "retain" else "neighbours"
            measures += filter(None, [drop(old, new, role, name=name, lines=lines, seed=seed)])
    return tuple(measures)


def kept(
    tokenizer: Any,
    before: Enter,
    after: Enter,
    facts: Facts,
    *,
    name: str,
    lines: Thresholds | None = None,
    seed: int = 0,
) -> Measure:
    """Return by how much the share of right choices fell on facts from elsewhere, all of which should stay.

    All facts count but decoys, whatever their role, if the original chooses them right in most wordings. Where a fact
    has no wrong answers, up to 3 right answers of other facts of its relation take their place: easier to tell apart
    than wrong answers of its own kind.

    Args:
        tokenizer: of both models.
        before: context in which the original stands.
        after: context in which the edited model stands.
        facts: asked in their unseen wordings, or the seen ones of those that have no others.
        name: of the measure, behind ``kept.``
        lines: limits of damage; None: the defaults (``neighbours``).
        seed: of the bootstrap and the choice of options.

    Raises:
        NotEnoughDataError: fewer than 8 of them are answered by the original.
    """
    rng = random.Random(seed)
    pools: dict[str, set[str]] = {}
    for fact in facts:
        pools.setdefault(fact.relation, set()).add(fact.answer)
    whole = replace(
        facts,
        facts=tuple(
            replace(
                fact,
                role="decoy" if fact.role == "decoy" else "retain",
                distractors=fact.distractors or draw(pools[fact.relation], {fact.answer}, OPTIONS, rng),
            )
            for fact in facts
        ),
    )
    asked = whole.questions("unseen", roles=["retain"])
    having = {q.fact for q in asked}
    asked += tuple(q for q in whole.questions("seen", roles=["retain"]) if q.fact not in having)
    found = None
    if asked:
        with before() as model:
            old = answers(model, tokenizer, whole, questions=asked, progress=False)
        with after() as model:
            new = answers(model, tokenizer, whole, questions=asked, progress=False)
        found = drop(old, new, "retain", name=f"kept.{name}", lines=lines, seed=seed)
    if found is None:
        raise NotEnoughDataError(
            f"the original answers fewer than {FEWEST} of the {len({q.fact for q in asked})} facts of {name!r}; "
            "needed facts that it knows."
        )
    return found


def _some(facts: Facts, roles: Sequence[Role], seed: int) -> set[int]:
    """Return the indices of at most ``FACTS`` facts of every role."""
    chosen = set[int]()
    for role in roles:
        there = [i for i, fact in enumerate(facts) if fact.role == role]
        chosen.update(random.Random(seed).sample(there, min(FACTS, len(there))))
    return chosen


def fluent(
    tokenizer: Any, before: Enter, after: Enter, neutral: Sequence[str], *, texts: int = 8, seed: int = 0
) -> tuple[Measure, ...]:
    """Return by how much greedy continuations of neutral openings lost variety: n-gram entropy (bits), repetition.

    Args:
        tokenizer: of both models.
        before: context in which the original stands.
        after: context in which the edited model stands.
        neutral: texts whose first words are continued.
        texts: how many, at least 8.
        seed: of the bootstrap.

    Returns:
        ``fluency.entropy`` (fall, limit 1 bit) and ``fluency.repetition`` (rise, limit 0.2).

    Raises:
        NotEnoughDataError: fewer than 8 texts.
    """
    openings = [
        tokenizer.decode(tokenizer(t)["input_ids"][:_OPENING], skip_special_tokens=True)
        for t in neutral[:texts]
    ]
    found = []
    for enter in (before, after):
        with enter() as model:
            said = greedy(model, tokenizer, openings, max_new_tokens=_NEW, progress=False)
        found.append([(ngram_entropy(text), repetition(text)) for text in said])
    old, new = np.array(found)
    return (
        Measure("fluency.entropy", *mean_interval(old[:, 0] - new[:, 0], seed=seed), limit=1.0),
        Measure("fluency.repetition", *mean_interval(new[:, 1] - old[:, 1], seed=seed), limit=0.2),
    )
