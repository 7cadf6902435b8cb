"""Behaviour: what a model answers when it is asked, wording by wording."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from torch import nn

from repe_unlearn.answers import BATCH_TOKENS, answers
from repe_unlearn.audit.scores import Scores
from repe_unlearn.errors import NotEnoughDataError
from repe_unlearn.facts import FORMS, Facts, Form, Role


def behaviour(
    model: nn.Module,
    tokenizer: Any,
    facts: Facts,
    *,
    form: Form = "unseen",
    seed: int = 0,
    batch_tokens: int = BATCH_TOKENS,
    progress: bool = True,
) -> Scores:
    """Return by how much a model prefers right answers to wrong ones, from its logits alone.

    The score of a fact is the mean margin over its wordings: log-probability of the right answer less the log of the
    mean probability of the wrong options, in nats. A model that does not know is below 0 on average, the further the
    surer it guesses: compare with decoys.

    Args:
        model: a causal language model with its head.
        tokenizer: its tokenizer, a fast one.
        facts: the facts of all roles.
        form: wordings to ask in.
        seed: of the facts that an in-context question shows first.
        batch_tokens: positions per batch, padding included.
        progress: show a progress bar.

    Raises:
        NotEnoughDataError: no fact has a wording of this form and a wrong option.
        InputError, NonFiniteError: as ``answers``.

    Example:
        ``behaviour(model, tokenizer, facts, form="reversed").of(facts, "forget").mean()``
    """
    found = behaviours(
        model, tokenizer, facts, forms=[form], seed=seed, batch_tokens=batch_tokens, progress=progress
    )
    if not found:
        raise NotEnoughDataError(f"no fact of {facts.name!r} has a wording {form!r} and a wrong option.")
    return found[0]


def behaviours(
    model: nn.Module,
    tokenizer: Any,
    facts: Facts,
    *,
    forms: Iterable[Form] = FORMS,
    roles: Iterable[Role] | None = None,
    seed: int = 0,
    batch_tokens: int = BATCH_TOKENS,
    progress: bool = True,
) -> tuple[Scores, ...]:
    """Return ``behaviour`` for several forms from one pass; forms that these facts do not have are left out.

    Args:
        model: a causal language model with its head.
        tokenizer: its tokenizer, a fast one.
        facts: the facts of all roles.
        forms: default all.
        roles: of the facts that are asked for; default all.
        seed: of the facts that an in-context question shows first.
        batch_tokens: positions per batch, padding included.
        progress: show a progress bar.

    Returns:
        One ``Scores`` per form, in the order of the forms; possibly none.

    Raises:
        InputError, NonFiniteError: as ``answers``.
    """
    forms = tuple(forms)
    questions = facts.questions(*forms, roles=roles, seed=seed) if forms else ()
    if not questions:
        return ()
    said = answers(model, tokenizer, facts, questions=questions, batch_tokens=batch_tokens, progress=progress)
    result = []
    for form in forms:
        per_fact = said.per_fact(said.margin, form=form)
        values = {i: v for i, v in per_fact.items() if not np.isnan(v)}  # NaN: no wrong options
        if values:
            asked = sum(q.form == form and q.fact in values for q in questions)
            settings = {"questions": str(asked), "seed": str(seed)}
            if left_out := len(per_fact) - len(values):
                settings["left out"] = f"{left_out} facts without wrong options"
            result.append(Scores(f"behaviour.{form}", "T0", values, "nats", facts=settings))
    return tuple(result)
