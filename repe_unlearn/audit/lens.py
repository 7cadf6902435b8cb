"""Logit lens: what a model would answer if it stopped after each block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from repe_unlearn.answers import Asked
from repe_unlearn.audit.scores import Scores, crossfit, curves
from repe_unlearn.audit.states import blocks, states
from repe_unlearn.errors import NotEnoughDataError
from repe_unlearn.facts import Facts, Form, Question, Role
from repe_unlearn.localize.parts import parts
from repe_unlearn.localize.runs import Runner

BATCH_TOKENS = 512
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # shares of the mean variance of a coordinate


def lens(
    model: nn.Module,
    tokenizer: Any,
    facts: Facts,
    *,
    forms: Sequence[Form] = ("seen", "unseen"),
    roles: Iterable[Role] | None = None,
    layers: Iterable[int] | None = None,
    tuned: bool = False,
    seed: int = 0,
    batch_tokens: int = BATCH_TOKENS,
    progress: bool = True,
) -> Scores:
    """Return by how much the stream after the most telling block prefers right answers, read by the model's own head.

    The stream at the position before each token of an answer takes the place of what the last block hands on, and the
    model goes on from there: its final norm, head, soft cap and scale. After the last block that is what the model says.
    The margin is that of ``behaviour``, summed over the tokens of an answer. The block is chosen by ``crossfit``: on
    other facts than those that are scored, by the same rule for every model, so the maximum over blocks makes no leak.

    Blocks in the middle do not speak the language of the head. With ``tuned`` (a tuned lens) the stream is first taken
    there by an affine map, a ridge regression of what the last block hands on at all positions of retained facts, whose
    ridge predicts left-out retained subjects best. No forgotten fact and no decoy takes part in it.

    Args:
        model: a causal language model with its head, of a family with a row.
        tokenizer: its tokenizer, a fast one.
        facts: the facts of all roles.
        forms: wordings to ask in.
        roles: of the facts that are asked for; default all.
        layers: block numbers; default all, or with ``tuned`` every third and the last.
        tuned: see above.
        seed: of the halves of ``crossfit`` and of in-context questions.
        batch_tokens: positions per batch.
        progress: show a progress bar.

    Raises:
        NotEnoughDataError: no fact has such a wording and a wrong option, or ``tuned`` with fewer than two retained
            subjects.
        UnsupportedArchitectureError: no row for this family.
        InputError, NonFiniteError: as ``answers``.

    Example:
        ``lens(model, tokenizer, facts).of(facts, "forget").mean()``
    """
    questions = with_options(facts, forms, seed, roles)
    asked = Asked.of(model, tokenizer, questions)
    chosen, table = blocks(model, layers), dict[int, dict[int, float]]()
    if tuned and layers is None:
        chosen = tuple(layer for layer in chosen if (chosen[-1] - layer) % 3 == 0)
    at = [[n - 1 for n in ns] for ns in asked.covered]
    streams = states(
        model, asked.runs, at, chosen, batch_tokens=batch_tokens, progress=progress, label="lens"
    )
    tail = Tail(model)
    if tuned:
        streams = _translated(model, tokenizer, facts, forms, chosen, streams, batch_tokens, progress)
    for layer, stream in zip(chosen, streams, strict=True):
        table[layer] = per_fact(questions, _margins(asked, tail, stream, batch_tokens))
    values, picked = crossfit(table, facts, seed=seed)
    drawn = curves(
        table,
        facts,
        "Tuned lens" if tuned else "Logit lens",
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
    return Scores("lens.tuned" if tuned else "lens", "T1", values, "nats", drawn, settings)


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


def _translated(
    model: nn.Module,
    tokenizer: Any,
    facts: Facts,
    forms: Sequence[Form],
    layers: Sequence[int],
    streams: Tensor,
    batch_tokens: int,
    progress: bool,
) -> Tensor:
    """Return streams ``[layers, m, d]`` as the last block would hand them on, by maps learnt from retained facts."""
    taught = facts.questions(*forms, roles=["retain"])
    subjects = list(dict.fromkeys(facts.facts[q.fact].subject for q in taught))
    if len(subjects) < 2:
        raise NotEnoughDataError(
            f"a tuned lens learns from retained facts, and these are about {len(subjects)} subjects; needed at least 2."
        )
    texts = [tokenizer(q.prompt + q.answer)["input_ids"] for q in taught]
    places = [list(range(1, len(ids))) for ids in texts]  # the first position is an attention sink
    last = blocks(model, [-1])[0]
    seen = states(
        model,
        texts,
        places,
        sorted({*layers, last}),
        batch_tokens=batch_tokens,
        progress=progress,
        label="tuned lens",
    )
    left_out = torch.tensor(
        [
            subjects.index(facts.facts[q.fact].subject) % 2 == 1
            for q, at in zip(taught, places, strict=True)
            for _ in at
        ]
    )
    target, found = seen[-1].double(), []
    for x, stream in zip(seen, streams, strict=False):  # the last of seen may be no layer that was asked for
        x = x.double()

        def missed(ridge: float, x: Tensor = x) -> float:
            new = affine_ridge(x[~left_out], target[~left_out], ridge)(x[left_out])
            return float((new - target[left_out]).square().sum())

        best = min(RIDGES, key=missed)
        found.append(affine_ridge(x, target, best)(stream.double()).to(streams.dtype))
    return torch.stack(found)


def affine_ridge(x: Tensor, y: Tensor, ridge: float) -> Callable[[Tensor], Tensor]:
    """Return the affine map that minimises |y - (x - mean) w - b|^2 + ridge * tr(cov x) / d * n * |w|^2."""
    mean, middle = x.mean(0), y.mean(0)
    centred = x - mean
    gram = centred.T @ centred
    gram.diagonal().add_(ridge * gram.diagonal().mean().clamp_min(1e-30))
    weight = torch.cholesky_solve(centred.T @ (y - middle), torch.linalg.cholesky(gram))
    return lambda new: (new - mean) @ weight + middle


def with_options(
    facts: Facts, forms: Sequence[Form], seed: int, roles: Iterable[Role] | None = None
) -> tuple[Question, ...]:
    """Return the questions of some forms that have a wrong option.

    Raises:
        NotEnoughDataError: there is none.
    """
    questions = tuple(q for q in facts.questions(*forms, roles=roles, seed=seed) if q.options)
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
