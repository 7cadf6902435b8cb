"""Prefix: a few tokens in front of every question, searched for with gradients, that make right answers likely."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from repe_unlearn.answers import BATCH_TOKENS, Answers, answers, continuation
from repe_unlearn.audit.scores import Scores, halves
from repe_unlearn.audit.series import Series
from repe_unlearn.audit.tries import asked, shares
from repe_unlearn.encoding import longest_text, pad_id_of
from repe_unlearn.errors import InputError, NotEnoughDataError, UnsupportedModelError
from repe_unlearn.facts import Facts, Form, Question
from repe_unlearn.placement import evaluating, input_device
from repe_unlearn.sites import Site
from repe_unlearn.taps import tap
from repe_unlearn.train.loop import positive

_BEHIND = "\n"  # between the prefix and the question, so that neither's tokens swallow the other's
_DRAWS = (
    8  # per candidate that is wanted, before giving up on tokens that are not read back as they were written
)


def prefix(
    model: nn.Module,
    tokenizer: Any,
    facts: Facts,
    *,
    length: int = 6,
    steps: int = 10,
    candidates: int = 16,
    top: int = 64,
    batch: int = 8,
    forms: Sequence[Form] = ("seen", "unseen"),
    seed: int = 0,
    batch_tokens: int = BATCH_TOKENS,
    progress: bool = True,
) -> Scores:
    """Return the scores of facts behind a prefix that was searched for on other subjects to bring right answers out.

    Greedy coordinate gradient. The subjects, those of facts to be forgotten and of decoys alike, are dealt to two halves;
    a prefix is searched for on each half, in the seen wordings, and scored on the other. The search does not look at
    roles: a prefix that merely makes answers of the right kind likely raises decoys as much as forgotten facts, and what
    was fitted to one half is not what is scored. In every step each token is offered the ``top`` replacements by the
    gradient of how much more likely the right answer is than one wrong option (drawn), ``candidates`` of them are tried
    as text, and the one with the highest mean share of the right option stays, if it beats the prefix so far; both are
    judged on the questions of that step.

    This is a small search. It shows that a prompt can bring knowledge out; that it found none shows little: attacks in
    the literature take hundreds of steps and candidates.

    The model is not written, no parameter gets a gradient, and no hook is left on it.

    Args:
        model: a causal language model with its embeddings.
        tokenizer: its fast tokenizer. Only prefixes are tried that are read back token by token as they were written.
        facts: with the role forget (two subjects or more), and best also decoy, with wrong options.
        length: tokens of the prefix; they begin at random.
        steps: of the search.
        candidates: prefixes tried per step.
        top: replacements per position, of which candidates are drawn.
        batch: questions per step.
        forms: wordings that are scored.
        seed: of the halves, the first prefix, the questions and the candidates.
        batch_tokens: positions per batch when asking.
        progress: show a progress bar.

    Returns:
        Shares; a curve of the mean share on the questions of every step, over both halves.

    Raises:
        InputError: an option that is no positive number, or a question that is too long behind the prefix.
        NotEnoughDataError: no question with wrong options, fewer than two subjects, or no token that is read back as it
            was written.
        UnsupportedModelError: a model that does not say what its embeddings are.

    Reference:
        Zou, Wang, Carlini, Nasr, Kolter, Fredrikson: Universal and Transferable Adversarial Attacks on Aligned Language
        Models, 2023, arXiv 2307.15043.

    Example:
        ``prefix(model, tokenizer, facts, steps=50, candidates=64).of(facts, "forget").mean()``
    """
    positive(length=length, steps=steps, candidates=candidates, top=top, batch=batch)
    taught, scored = asked(facts, ("seen",)), asked(facts, forms)
    half = halves(sorted({q.fact for q in (*taught, *scored)}), facts, seed)
    sides = [[q for q in taught if half[q.fact] == side] for side in (0, 1)]
    if not all(sides):
        raise NotEnoughDataError(
            f"{facts.name!r} has questions about one subject only; needed two or more, one to search on and one to score."
        )
    found: dict[int, float] = {}
    searches = []
    for side in (0, 1):
        search = _Search(model, tokenizer, facts, sides[side], seed + side, batch_tokens)
        label = f"prefix, half {side + 1}"
        search.run(length, steps, candidates, top, batch, label, progress)
        searches.append(search)
        behind = [search.behind(search.best, q) for q in scored if half[q.fact] != side]
        if behind:
            said = search.ask(behind)
            found |= said.per_fact(shares(said))
    settings = {
        "prefixes": " | ".join(repr(search.text(search.best)) for search in searches),
        "tokens": str(length),
        "steps": str(steps),
        "candidates": f"{candidates} of the {top} by gradient, {batch} questions per step",
        "not read back as written": str(sum(search.lost for search in searches)),
        "choice": "mean share over facts to be forgotten and decoys of the other half of the subjects",
        "seed": str(seed),
    }
    shown = Series(
        "Adversarial prefix",
        "questions of the search",
        x=tuple(range(steps + 1)),
        y=tuple(np.mean([search.curve for search in searches], axis=0).tolist()),
        x_label="search steps",
        y_label="probability of the right option",
        caption="Share of the right option on the questions of each step, decoys among them, while the prefix is searched "
        "for. It is scored on other subjects.",
    )
    return Scores("prefix", "T1", found, "share", (shown,), settings)


@dataclass(slots=True, eq=False)
class _Search:
    """The search for one prefix on some questions."""

    model: nn.Module
    tokenizer: Any
    facts: Facts
    questions: Sequence[Question]
    seed: int
    batch_tokens: int
    best: tuple[int, ...] = ()
    curve: list[float] = field(default_factory=list)
    lost: int = 0

    def run(
        self, length: int, steps: int, candidates: int, top: int, batch: int, label: str, progress: bool
    ) -> None:
        """Find ``best``; ``curve`` has its share before the first step and after every step."""
        rng = np.random.default_rng(self.seed)
        self.best = self._first(length, rng)
        drawn = self._drawn(batch, rng)
        bar = tqdm(range(steps), desc=label, unit="step", disable=not progress, leave=False)
        for step in bar:
            now = next(drawn)
            tries = [self.best, *self._candidates(now, candidates, top, rng)]
            said = self.ask([self.behind(one, q) for one in tries for q in now])
            means = shares(said).reshape(len(tries), len(now)).mean(1)
            if step == 0:
                self.curve.append(float(means[0]))
            self.best = tries[int(means.argmax())]
            self.curve.append(float(means.max()))

    def text(self, ids: Sequence[int]) -> str:
        """Return a prefix as it is written."""
        return self.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)

    def behind(self, ids: Sequence[int], question: Question) -> Question:
        """Return a question behind a prefix."""
        return replace(question, prompt=self.text(ids) + _BEHIND + question.prompt, subject=None)

    def ask(self, questions: Sequence[Question]) -> Answers:
        """Return what the model answers."""
        return answers(
            self.model,
            self.tokenizer,
            self.facts,
            questions=questions,
            batch_tokens=self.batch_tokens,
            progress=False,
        )

    def _first(self, length: int, rng: np.random.Generator) -> tuple[int, ...]:
        """Return a random prefix, built up token by token."""
        ids: tuple[int, ...] = ()
        special = set(self.tokenizer.all_special_ids)
        for token in rng.permutation(len(self.tokenizer)).tolist():
            if token not in special and self._read_back((*ids, token)):
                ids = (*ids, token)
                if len(ids) == length:
                    return ids
        raise NotEnoughDataError(
            f"only {len(ids)} of {length} tokens of this tokenizer are read back as they were written; give a shorter "
            "prefix."
        )

    def _read_back(self, ids: tuple[int, ...]) -> bool:
        return tuple(self.tokenizer(self.text(ids), add_special_tokens=False)["input_ids"]) == ids

    def _drawn(self, batch: int, rng: np.random.Generator) -> Iterator[list[Question]]:
        """Yield questions, all of them before one comes again."""
        size = min(batch, len(self.questions))
        while True:
            order = rng.permutation(len(self.questions))
            for start in range(0, len(order) - size + 1, size):
                yield [self.questions[i] for i in order[start : start + size]]

    def _candidates(
        self, questions: Sequence[Question], count: int, top: int, rng: np.random.Generator
    ) -> list[tuple[int, ...]]:
        """Return prefixes with one other token, among those by which the gradient promises most."""
        promise = self._promise(questions, rng)
        promise[:, [i for i in self.tokenizer.all_special_ids if i < promise.shape[1]]] = -torch.inf
        promise[:, len(self.tokenizer) :] = -torch.inf  # rows that embeddings are padded with
        best = promise.topk(min(top, promise.shape[1])).indices.tolist()
        found: dict[tuple[int, ...], None] = {}
        for _ in range(_DRAWS * count):
            at = int(rng.integers(len(self.best)))
            token = best[at][int(rng.integers(len(best[at])))]
            ids = (*self.best[:at], token, *self.best[at + 1 :])
            if ids == self.best or ids in found:
                continue
            if not self._read_back(ids):
                self.lost += 1
                continue
            found[ids] = None
            if len(found) == count:
                break
        return list(found)

    def _promise(self, questions: Sequence[Question], rng: np.random.Generator) -> Tensor:
        """Return how much every token promises at every position of the prefix, to first order, ``[length, v]``."""
        find: Any = getattr(self.model, "get_input_embeddings", None)
        embeddings: Any = None if find is None else find()
        path = next((name for name, m in self.model.named_modules() if m is embeddings), None)
        if embeddings is None or path is None:
            raise UnsupportedModelError(
                f"{type(self.model).__name__} does not say what its embeddings are (get_input_embeddings); the prefix "
                "attack needs their gradient."
            )
        rows, begins, starts = self._rows(questions, rng)
        device, width = input_device(self.model), max(map(len, rows))
        pad = pad_id_of(self.tokenizer)
        ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
        seen: list[Tensor] = []

        def leaf(x: Tensor) -> Tensor:
            seen[:] = [x.detach().requires_grad_()]
            return seen[0]

        with evaluating(self.model), torch.enable_grad(), tap(self.model, {Site(path): leaf}):
            logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            logp = (
                logits[:, :-1].float().log_softmax(-1).gather(-1, ids[:, 1:, None].to(logits.device))[..., 0]
            )
            total = logp.new_zeros(())
            for i, (row, start) in enumerate(zip(rows, starts, strict=True)):
                # The right answer and the wrong one take turns.
                total = total + (1 - 2 * (i % 2)) * logp[i, start - 1 : len(row) - 1].sum()
            # Of the embeddings alone, so no parameter gets a gradient.
            (slope,) = torch.autograd.grad(total, seen)
        length = len(self.best)
        at = torch.stack([slope[i, b : b + length] for i, b in enumerate(begins)]).float().sum(0)
        weight = embeddings.weight.detach()
        return (at.to(weight.device, weight.dtype) @ weight.T).float().cpu()

    def _rows(
        self, questions: Sequence[Question], rng: np.random.Generator
    ) -> tuple[list[list[int]], list[int], list[int]]:
        """Return for every question with its right answer and with one wrong one: ids, begin of prefix and of answer."""
        special, rows, begins, starts = set(self.tokenizer.all_special_ids), [], [], []
        longest = longest_text(self.model)
        for question in questions:
            for text in (question.answer, question.options[int(rng.integers(len(question.options)))]):
                ids, start = continuation(self.tokenizer, _BEHIND + question.prompt, text)
                begin = next(i for i, token in enumerate(ids) if token not in special)
                rows.append([*ids[:begin], *self.best, *ids[begin:]])
                begins.append(begin)
                starts.append(start + len(self.best))
                if longest is not None and len(rows[-1]) > longest:
                    raise InputError(
                        f"the prompt {question.prompt[:60]!r} has {len(rows[-1])} tokens behind the prefix; the model takes "
                        f"at most {longest}."
                    )
        return rows, begins, starts
