"""Logit lens: what a model would answer if it stopped after each block."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from repe_unlearn.answers import Asked
from repe_unlearn.audit.scores import Scores, crossfit, curves
from repe_unlearn.audit.states import blocks, states
from repe_unlearn.errors import NotEnoughDataError
from repe_unlearn.facts import Facts, Form, Question
from repe_unlearn.localize.parts import parts
from repe_unlearn.localize.runs import Runner

BATCH_TOKENS = 512


def lens(
    model: nn.Module,
    tokenizer: Any,
    facts: Facts,
    *,
    forms: Sequence[Form] = ("seen", "unseen"),
    layers: Iterable[int] | None = None,
    seed: int = 0,
    batch_tokens: int = BATCH_TOKENS,
    progress: bool = True,
) -> Scores:
    """Return by how much the stream after the most telling block prefers right answers, read by the model's own head.

    The stream at the position before each token of an answer takes the place of what the last block hands on, and the
    model goes on from there: its final norm, head, soft cap and scale. After the last block that is what the model says.
    The margin is that of ``behaviour``, summed over the tokens of an answer. The block is chosen by ``crossfit``: on
    other facts than those that are scored, by the same rule for every model, so the maximum over blocks makes no leak.

    Args:
        model: a causal language model with its head, of a family with a row.
        tokenizer: its tokenizer, a fast one.
        facts: the facts of all roles.
        forms: wordings to ask in.
        layers: block numbers; default all.
        seed: of the halves of ``crossfit`` and of in-context questions.
        batch_tokens: positions per batch.
        progress: show a progress bar.

    Raises:
        NotEnoughDataError: no fact has such a wording and a wrong option.
        UnsupportedArchitectureError: no row for this family.
        InputError, NonFiniteError: as ``answers``.

    Example:
        ``lens(model, tokenizer, facts).of(facts, "forget").mean()``
    """
    questions = with_options(facts, forms, seed)
    asked = Asked.of(model, tokenizer, questions)
    chosen, table = blocks(model, layers), dict[int, dict[int, float]]()
    at = [[n - 1 for n in ns] for ns in asked.covered]
    streams = states(
        model, asked.runs, at, chosen, batch_tokens=batch_tokens, progress=progress, label="lens"
    )
    tail = Tail(model)
    for layer, stream in zip(chosen, streams, strict=True):
        table[layer] = per_fact(questions, _margins(asked, tail, stream, batch_tokens))
    values, picked = crossfit(table, facts, seed=seed)
    drawn = curves(
        table,
        facts,
        "Logit lens",
        x_label="block",
        y_label="margin of the right answer (nats)",
        chance=0.0,
        caption="What the model would answer if it stopped after a block. Forgotten facts above decoys are still there.",
    )
    settings = {
        "blocks": f"{len(chosen)} of {tail.layers}",
        "scored block": f"{picked[0]} and {picked[1]}, each chosen on the other half of the subjects",
        "forms": ", ".join(forms),
        "seed": str(seed),
    }
    return Scores("lens", "T1", values, "nats", drawn, settings)


class Tail:
    """What a model does after its last block: norm, head, soft cap and scale, by its own code."""

    def __init__(self, model: nn.Module):
        self._runner = Runner(model, "log_probability")
        self.layers = self._runner.arch.n_layers
        (self._last,) = parts(model, "resid_post", [self.layers - 1])
        self._tuples = self._runner.shapes(self._ids(1))

    def _ids(self, n: int) -> Tensor:
        return torch.zeros(n, 1, dtype=torch.long, device=self._runner.device)

    def __call__(self, stream: Tensor) -> Tensor:
        """Return logits ``[n, v]`` from what the last block would hand on, ``[n, d]``."""
        stream = stream.to(self._runner.device)
        ids = self._ids(len(stream))
        return self._runner.patched(ids, stream[:, None], self._last, stream.view_as, self._tuples)


def with_options(facts: Facts, forms: Sequence[Form], seed: int) -> tuple[Question, ...]:
    """Return the questions of some forms that have a wrong option.

    Raises:
        NotEnoughDataError: there is none.
    """
    questions = tuple(q for q in facts.questions(*forms, seed=seed) if q.options)
    if not questions:
        raise NotEnoughDataError(
            f"no fact of {facts.name!r} has a wording {' or '.join(forms)} and a wrong option; add distractors."
        )
    return questions


def per_fact(questions: Sequence[Question], values: Iterable[float]) -> dict[int, float]:
    """Return fact -> mean over its questions."""
    found: dict[int, list[float]] = {}
    for question, value in zip(questions, values, strict=True):
        found.setdefault(question.fact, []).append(float(value))
    return {fact: sum(xs) / len(xs) for fact, xs in found.items()}


def _margins(asked: Asked, tail: Tail, stream: Tensor, step: int) -> Sequence[float]:
    said, found = asked.beginnings, dict[Any, tuple[float, bool]]()
    for begin in range(0, len(said), step):
        chunk = slice(begin, begin + step)
        found |= asked.read(said[chunk], tail(stream[chunk]))
    return asked.score(found).margin.tolist()
