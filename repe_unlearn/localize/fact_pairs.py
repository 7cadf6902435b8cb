"""Pairs from facts: what a model knows, each prompt corrupted by another subject in the same wording."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from torch import nn
from tqdm.auto import tqdm

from repe_unlearn.answers import answers
from repe_unlearn.errors import InputError
from repe_unlearn.facts import Facts, Question
from repe_unlearn.localize.pairs import Pair, first_token


def fact_pairs(
    model: nn.Module,
    tokenizer: Any,
    facts: Facts,
    *,
    form: Literal["seen", "unseen"] = "seen",
    most: int = 8,
    progress: bool = True,
) -> tuple[Pair, ...]:
    """Return pairs of facts to forget, corrupted by other subjects; the model answers both prompts rightly.

    The two prompts of a pair are of one relation and wording and have equally many tokens; their answers begin with
    different ones. Each relation is asked wording by wording, and no further than needed; relations share evenly.

    Args:
        model: a causal language model; it answers greedily and is left as it was.
        tokenizer: its tokenizer, a fast one.
        facts: those to ``forget`` make clean prompts; those and ``retain`` of the same relation corrupt them.
        form: wordings to take.
        most: number of pairs, at least 1; fewer come back where the model knows fewer.
        progress: show a progress bar.

    Returns:
        At least one pair, each with its subject, in the order of the facts.

    Raises:
        InputError: another form, nothing to forget, no such wordings, or nothing known that another fact can corrupt.

    Example:
        ``patch_activations(model, tokenizer, fact_pairs(model, tokenizer, facts), "resid_pre", positions="groups")``
    """
    if form not in ("seen", "unseen"):
        raise InputError(f"got form={form!r}; needed seen or unseen, the forms that name the subject.")
    if most < 1:
        raise InputError(f"got most={most}; needed at least 1 pair.")
    relations = list(dict.fromkeys(fact.relation for fact in facts if fact.role == "forget"))
    if not relations:
        raise InputError(f"{facts!r} has nothing to forget; needed facts with the role forget.")
    share = -(-most // len(relations))
    wordings: dict[tuple[str, str], list[Question]] = {}
    for question in facts.questions(form, roles=("forget", "retain")):
        relation = facts.facts[question.fact].relation
        if relation in relations:
            # Wrong options are not asked for here, and would only cost runs.
            wordings.setdefault((relation, question.template), []).append(replace(question, options=()))
    if not wordings:
        raise InputError(f"{facts!r} has no {form!r} wordings of what is to be forgotten.")
    made: dict[str, list[Pair]] = {relation: [] for relation in relations}
    known = 0
    for (relation, _), asked in tqdm(wordings.items(), desc="pairs", disable=not progress, leave=False):
        if len(made[relation]) >= share:
            continue
        exact = answers(model, tokenizer, facts, questions=asked, progress=False).exact
        right = [question for question, found in zip(asked, exact, strict=True) if found]
        known += len(right)
        made[relation] += _pairs(tokenizer, facts, right)[: share - len(made[relation])]
    pairs = [pair for found in made.values() for pair in found][:most]
    if not pairs:
        raise InputError(
            f"the model answers {known} {form!r} questions rightly, and no two of one wording line up, one of them to "
            "forget: as many tokens, another answer. Use a model that knows the facts, or other facts."
        )
    return tuple(pairs)


def _pairs(tokenizer: Any, facts: Facts, questions: Sequence[Question]) -> list[Pair]:
    """Return a pair for every question to forget that another one of this wording can corrupt."""
    lengths = [len(tokenizer(question.prompt)["input_ids"]) for question in questions]
    firsts = [first_token(tokenizer, question.prompt, question.answer) for question in questions]
    made = []
    for i, question in enumerate(questions):
        fact = facts.facts[question.fact]
        others = [*range(i + 1, len(questions)), *range(i)]
        j = next((j for j in others if lengths[j] == lengths[i] and firsts[j] != firsts[i]), None)
        if fact.role == "forget" and j is not None:
            other = questions[j]
            made.append(Pair(question.prompt, other.prompt, question.answer, other.answer, fact.subject))
    return made
