"""Answers: what a model says to the questions of some facts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any, NamedTuple, TypeAlias, get_args

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .encoding import completion_tokens, longest_text
from .errors import InputError, NonFiniteError
from .facts import Facts, Form, Question, Role
from .head import only_last
from .placement import evaluating, input_device, require_whole
from .tables import html_table

__all__ = ["Answers", "answers", "continuation"]

BATCH_TOKENS = 512


@dataclass(frozen=True, slots=True, eq=False)
class Answers:
    """What a model says to some questions, one number per question.

    Attributes:
        facts: the facts that the questions ask for.
        questions: the questions.
        logp: log-probability of the right answer, nats, summed over its tokens.
        margin: ``logp`` less the log of the mean probability of the wrong options, nats; NaN without options.
        exact: greedy decoding says the right answer.
        chosen: the right answer is more probable than every wrong option; False without options.
    """

    facts: Facts
    questions: tuple[Question, ...]
    logp: np.ndarray
    margin: np.ndarray
    exact: np.ndarray
    chosen: np.ndarray

    def accuracy(self, *roles: Role, form: Form | None = None, relation: str | None = None) -> float:
        """Return the share of greedy right answers; NaN where there are no such questions."""
        return self.mean(self.exact, *roles, form=form, relation=relation)

    def mean(
        self, values: np.ndarray, *roles: Role, form: Form | None = None, relation: str | None = None
    ) -> float:
        """Return the mean over facts of one of the arrays, each fact counted once whatever its number of wordings."""
        per_fact = self.per_fact(values, *roles, form=form, relation=relation)
        return float(np.mean(list(per_fact.values()))) if per_fact else float("nan")

    def per_fact(
        self, values: np.ndarray, *roles: Role, form: Form | None = None, relation: str | None = None
    ) -> dict[int, float]:
        """Return fact -> mean over its questions of one of the arrays; facts of no such question are left out."""
        sums: dict[int, list[float]] = {}
        for question, value in zip(self.questions, values, strict=True):
            fact = self.facts.facts[question.fact]
            if (
                (not roles or fact.role in roles)
                and form in (None, question.form)
                and relation in (None, fact.relation)
            ):
                sums.setdefault(question.fact, []).append(float(value))
        return {fact: float(np.mean(found)) for fact, found in sums.items()}

    def known(self, wordings: int = 2) -> Facts:
        """Return the facts that are answered greedily in at least so many wordings, and all decoys.

        Raises:
            NotEnoughDataError: none is.
        """
        right = np.zeros(len(self.facts), dtype=int)
        for question, exact in zip(self.questions, self.exact, strict=True):
            right[question.fact] += bool(exact)
        return self.facts.having(
            i for i, fact in enumerate(self.facts) if right[i] >= wordings or fact.role == "decoy"
        )

    def __repr__(self) -> str:
        shares = ", ".join(f"{role} {self.accuracy(role):.2f}" for role in self.facts.roles)
        return f"Answers({len(self.questions)} questions; greedy accuracy {shares})"

    def _repr_html_(self) -> str:
        rows = []
        for role, form in product(self.facts.roles, get_args(Form)):
            if asked := self.per_fact(self.exact, role, form=form):
                values = (self.exact, self.chosen, self.margin)
                means = (f"{self.mean(value, role, form=form):.2f}" for value in values)
                rows.append((role, form, len(asked), *means))
        columns = ("role", "form", "facts", "greedy right", "best of options", "margin (nats)")
        return html_table(repr(self), columns, rows)


def answers(
    model: nn.Module,
    tokenizer: Any,
    facts: Facts,
    *forms: Form,
    roles: Iterable[Role] | None = None,
    questions: Sequence[Question] | None = None,
    batch_tokens: int = BATCH_TOKENS,
    progress: bool = True,
) -> Answers:
    """Return what a model answers to facts, from one pass that shares the prompt among right and wrong answers.

    Args:
        model: a causal language model with its head; it answers in evaluation mode and is left as it was.
        tokenizer: its tokenizer, a fast one.
        facts: the facts.
        forms: wordings; default ``seen`` and ``unseen``.
        roles: default all.
        questions: of these facts, in place of forms and roles.
        batch_tokens: positions per batch, padding included.
        progress: show a progress bar.

    Raises:
        InputError: no questions, a tokenizer without offsets, or a prompt that is too long for the model.
        NonFiniteError: the model's logits hold NaN or infinity.

    Example:
        ``answers(model, tokenizer, Facts.builtin("capitals"), "unseen").accuracy("forget")``
    """
    if questions is None:
        questions = facts.questions(*(forms or ("seen", "unseen")), roles=roles)
    if not questions:
        raise InputError("got no questions; these facts have no wordings of the forms asked for.")
    asked = Asked.of(model, tokenizer, questions)
    said = asked.score(_scored(model, asked, batch_tokens, progress))
    return Answers(facts, tuple(questions), said.logp, said.margin, said.exact, said.chosen)


def continuation(tokenizer: Any, prompt: str, text: str, longest: int | None = None) -> tuple[list[int], int]:
    """Return the token ids of prompt and text together, and how many of them are the prompt's.

    See ``encoding.completion_tokens``; special tokens that a tokenizer puts at the end are left out.

    Raises:
        InputError: the tokenizer has no offsets, or nothing is left of the text, or more than ``longest`` tokens.
    """
    ids, behind = completion_tokens(tokenizer, prompt, text)
    if not behind or behind[0] == 0:
        raise InputError(
            f"got the prompt {prompt[:60]!r} and the continuation {text!r}; needed a token in each."
        )
    ids = ids[: behind[-1] + 1]
    if longest is not None and len(ids) > longest:
        raise InputError(
            f"the prompt {prompt[:60]!r} has {len(ids)} tokens; the model takes at most {longest}."
        )
    return ids, behind[0]


Beginning: TypeAlias = tuple[int, ...]
"""The token ids of what was said so far."""

Step: TypeAlias = tuple[Beginning, int]
"""What was said so far, and the token that comes next."""


class Said(NamedTuple):
    """One number per question, as in ``Answers``."""

    logp: np.ndarray
    margin: np.ndarray
    exact: np.ndarray
    chosen: np.ndarray


@dataclass(frozen=True, slots=True, eq=False)
class Asked:
    """What a model has to be run on to answer some questions: every beginning of an answer, few of them by themselves.

    Attributes:
        spoken: for every question the right answer and the wrong ones: token ids, and how many are the prompt's.
        tokens: beginning -> the next tokens whose probability is asked for.
        runs: the texts to run, shortest first; every other beginning is the beginning of one of them.
        covered: for every run the lengths of the beginnings that it answers for.
    """

    spoken: tuple[tuple[tuple[list[int], int], ...], ...]
    tokens: Mapping[Beginning, list[int]]
    runs: tuple[Beginning, ...]
    covered: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, model: nn.Module, tokenizer: Any, questions: Iterable[Question]) -> Asked:
        """Return what some questions need.

        Raises:
            InputError: a tokenizer without offsets, or a prompt that is too long for the model.
        """
        longest = longest_text(model)
        spoken = tuple(
            tuple(continuation(tokenizer, q.prompt, text, longest) for text in (q.answer, *q.options))
            for q in questions
        )
        found: dict[Beginning, dict[int, None]] = {}
        for options in spoken:
            for ids, start in options:
                for said, token in _steps(ids, start):
                    found.setdefault(said, {})[token] = None
        # In sorted order a beginning comes right before what it begins, and one run answers for both.
        runs = sorted((a for a, b in pairwise([*sorted(found), ()]) if b[: len(a)] != a), key=len)
        covered = tuple(tuple(n for n in range(1, len(run) + 1) if run[:n] in found) for run in runs)
        return cls(spoken, {said: list(tokens) for said, tokens in found.items()}, tuple(runs), covered)

    @property
    def beginnings(self) -> list[Beginning]:
        """The beginnings, run by run."""
        return [run[:n] for run, ns in zip(self.runs, self.covered, strict=True) for n in ns]

    def batches(self, batch_tokens: int) -> list[list[int]]:
        """Return the indices of the runs in batches of at most so many positions with padding."""
        found: list[list[int]] = []
        for i, run in enumerate(self.runs):
            if not found or (len(found[-1]) + 1) * len(run) > batch_tokens:
                found.append([])
            found[-1].append(i)
        return found

    def padded(self, batch: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return token ids and mask ``[b, t]``, and row and column of the last token of every beginning ``[m]``."""
        runs = [self.runs[i] for i in batch]
        longest = max(map(len, runs))
        ids = [[*run, *([0] * (longest - len(run)))] for run in runs]
        mask = [[1] * len(run) + [0] * (longest - len(run)) for run in runs]
        at = [(row, n - 1) for row, i in enumerate(batch) for n in self.covered[i]]
        rows, columns = torch.tensor(at, device=device).T
        return torch.tensor(ids, device=device), torch.tensor(mask, device=device), rows, columns

    def read(self, beginnings: Sequence[Beginning], logits: Tensor) -> dict[Step, tuple[float, bool]]:
        """Return step -> (log-probability, greedy decoding takes it) from logits ``[beginnings, v]``.

        Raises:
            NonFiniteError: they hold NaN or infinity.
        """
        logp = logits.float().log_softmax(-1)
        if not torch.isfinite(logp.amax(-1)).all():
            raise NonFiniteError(
                "the model's logits hold NaN or infinity; its weights or its dtype are at fault."
            )
        best, found = logp.argmax(-1).tolist(), dict[Step, tuple[float, bool]]()
        wanted = [(k, token) for k, said in enumerate(beginnings) for token in self.tokens[said]]
        rows, columns = torch.tensor(wanted, device=logp.device).T
        for (k, token), value in zip(wanted, logp[rows, columns].tolist(), strict=True):
            found[beginnings[k], token] = (value, best[k] == token)
        return found

    def score(self, found: Mapping[Step, tuple[float, bool]]) -> Said:
        """Return what a model says to every question, from the log-probabilities of all steps."""
        said = Said(*(np.zeros(len(self.spoken)) for _ in range(4)))
        for i, options in enumerate(self.spoken):
            sums = np.array([sum(found[step][0] for step in _steps(*option)) for option in options])
            right, wrong = sums[0], sums[1:]
            said.logp[i], said.exact[i] = right, all(found[step][1] for step in _steps(*options[0]))
            said.margin[i] = (
                right - (np.logaddexp.reduce(wrong) - np.log(len(wrong))) if len(wrong) else np.nan
            )
            said.chosen[i] = bool(len(wrong)) and right > wrong.max()
        return said._replace(exact=said.exact.astype(bool), chosen=said.chosen.astype(bool))


def _steps(ids: Sequence[int], start: int) -> list[Step]:
    return [(tuple(ids[:i]), ids[i]) for i in range(start, len(ids))]


def _scored(
    model: nn.Module, asked: Asked, batch_tokens: int, progress: bool
) -> dict[Step, tuple[float, bool]]:
    """Return step -> (log-probability, greedy decoding takes it)."""
    require_whole(model)
    device, found = input_device(model), dict[Step, tuple[float, bool]]()
    with evaluating(model), torch.no_grad():
        for batch in tqdm(
            asked.batches(batch_tokens), desc="answers", unit="batch", disable=not progress, leave=False
        ):
            ids, mask, rows, columns = asked.padded(batch, device)
            keep = ids.shape[1] - int(columns.min())  # nothing is asked at the prompts
            options = {"use_cache": False, **only_last(model, keep)}
            logits = model(input_ids=ids, attention_mask=mask, **options).logits[:, -keep:]
            said = [asked.runs[i][:n] for i in batch for n in asked.covered[i]]
            kept = columns - (ids.shape[1] - keep)
            found |= asked.read(said, logits[rows.to(logits.device), kept.to(logits.device)])
    return found
