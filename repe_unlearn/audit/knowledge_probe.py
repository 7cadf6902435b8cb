"""Knowledge probes: whether a probe that learns to read answers off known facts reads them off forgotten ones."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
from torch import Tensor, nn

from repe_unlearn.answers import continuation
from repe_unlearn.audit.lens import per_fact, with_options
from repe_unlearn.audit.probes import train_mlp
from repe_unlearn.audit.scores import Scores, Table, crossfit, curves
from repe_unlearn.audit.series import Series
from repe_unlearn.audit.states import blocks, states
from repe_unlearn.errors import InputError, NotEnoughDataError
from repe_unlearn.facts import Facts, Form, Question, Role

Probe = Literal["linear", "mlp", "rbf", "embedding"]

BATCH_TOKENS = 512
FOLDS = 5  # of the known subjects
RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)  # shares of the mean squared length of a row
SCALES = (0.0, *(2.0**k for k in range(-4, 9)))  # 0: the probe has learnt nothing
TESTED: tuple[Role, ...] = ("forget", "neighbour", "decoy")
LEAST = 8  # known subjects

Fit: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(rows [layers, n, d], their answers [n], codes [answers, c], new rows [layers, m, d]) -> [settings, layers, m, answers]."""


def probes(facts: Facts) -> tuple[Probe, ...]:
    """Return the probes that these facts allow.

    Facts to be forgotten whose answers are also answers to known facts of their relation (planted facts) allow
    ``linear``, ``mlp`` and ``rbf``, which learn to tell the answers apart. ``embedding`` needs no answer twice (capitals).
    """
    named = {(f.relation, f.answer) for f in facts if f.role == "retain"}
    forget = [f for f in facts if f.role == "forget"]
    shared = [f for f in forget if (f.relation, f.answer) in named]
    return ("linear", "mlp", "rbf") if 2 * len(shared) > len(forget) else ("embedding",)


def probe(
    model: nn.Module,
    tokenizer: Any,
    facts: Facts,
    *,
    kind: Probe = "linear",
    forms: Sequence[Form] = ("seen", "unseen"),
    layers: Iterable[int] | None = None,
    seed: int = 0,
    batch_tokens: int = BATCH_TOKENS,
    progress: bool = True,
) -> Scores:
    """Return by how much a probe of a model's activations prefers right answers, trained on other people's facts.

    A probe of the stream at the last position of the prompt learns the answers to the retained facts of a relation, and
    is tested on the subjects to be forgotten and on decoys: none of them is among those it learnt from. Its settings
    (ridge, and the scale that turns its outputs into log-odds; 0 where it learns nothing) are those under which left-out
    *retained* subjects are predicted best, so no tested fact takes part; a share 1 / (n + 1) of guessing, n the number of
    these subjects, bounds how sure it gets. The score is the margin of ``behaviour``, less
    the mean score of the same probe taught shuffled answers (selectivity). The block is chosen by ``crossfit``.

    Args:
        model: of a family with a row.
        tokenizer: its tokenizer, a fast one.
        facts: the facts of all roles.
        kind: ``linear``: ridge regression on the answers. ``rbf``: the same with a Gaussian kernel as wide as the median
            distance (a least-squares support vector machine). ``mlp``: one hidden layer of 32 ReLU units. ``embedding``:
            ridge regression on the mean output embedding of an answer's tokens, for facts that share no answers.
        forms: wordings to learn from and to test on.
        layers: block numbers; default every third, and the last.
        seed: of folds, shuffles, networks and the halves of ``crossfit``.
        batch_tokens: positions per batch.
        progress: show a progress bar.

    Raises:
        NotEnoughDataError: no relation has 8 retained subjects and answers that the probe can be tested on.
        InputError: an unknown probe, or a model without output embeddings for ``embedding``.
        UnsupportedArchitectureError: no row for this family.

    Example:
        ``[probe(model, tokenizer, facts, kind=kind) for kind in probes(facts)]``
    """
    if kind not in get_args(Probe):
        raise InputError(f"got kind={kind!r}; needed one of {', '.join(get_args(Probe))}.")
    questions = with_options(facts, forms, seed)
    chosen = blocks(model, layers)
    if layers is None:
        chosen = tuple(layer for layer in chosen if (chosen[-1] - layer) % 3 == 0)
    tasks = [task for relation in facts.relations if (task := _task(facts, questions, relation, kind))]
    if not tasks:
        raise NotEnoughDataError(
            f"no relation of {facts.name!r} can be probed with {kind!r}: needed {LEAST} subjects whose facts are retained, "
            "and others with answers of theirs among their options; probes(facts) says which probes there are."
        )
    prompts = [tokenizer(q.prompt)["input_ids"] for q in questions]
    x = states(
        model,
        prompts,
        [[len(ids) - 1] for ids in prompts],
        chosen,
        batch_tokens=batch_tokens,
        progress=progress,
        label="probe",
    ).double()
    fit = _network(seed) if kind == "mlp" else _ridge("rbf" if kind == "rbf" else "linear")
    learnt: dict[int, dict[int, float]] = {layer: {} for layer in chosen}
    shuffled: dict[int, dict[int, float]] = {layer: {} for layer in chosen}
    for task in tasks:
        codes = (
            _codes(model, tokenizer, task, questions) if kind == "embedding" else torch.eye(len(task.answers))
        )
        for found, seen in ((learnt, task), (shuffled, task.shuffled(facts, questions, seed))):
            margins = _margins(fit, x, seen, codes.double(), facts, questions, seed)
            asked = [questions[i] for i in (*task.known, *task.tested)]
            for layer, row in zip(chosen, margins, strict=True):
                found[layer] |= per_fact(asked, row.tolist())
    tested = {i for task in tasks for i in (questions[j].fact for j in task.tested)}
    control = {layer: float(np.mean([row[i] for i in tested])) for layer, row in shuffled.items()}
    table = {layer: {i: v - control[layer] for i, v in row.items()} for layer, row in learnt.items()}
    values, picked = crossfit(table, facts, seed=seed)
    settings = {
        "probe": kind,
        "blocks": ", ".join(map(str, chosen)),
        "scored block": f"{picked[0]} and {picked[1]}, each chosen on the other half of the subjects",
        "shuffled answers": "mean margin "
        + ", ".join(f"{control[layer]:.2f} (block {layer})" for layer in dict.fromkeys(picked)),
        "relations": ", ".join(task.relation for task in tasks),
        "forms": ", ".join(forms),
        "seed": str(seed),
    }
    return Scores(f"probe.{kind}", "T1", values, "nats", _drawn(table, facts, kind), settings)


def _drawn(table: Table, facts: Facts, kind: Probe) -> tuple[Series, ...]:
    return curves(
        table,
        facts,
        "Probes",
        panel=kind,
        x_label="block",
        y_label="margin of the right answer (nats)",
        chance=0.0,
        caption="Probes taught on retained facts (shown: left-out subjects) and tested on other subjects. Forgotten facts "
        "above decoys can still be read.",
    )


@dataclass(frozen=True, slots=True)
class _Task:
    """One relation: whom a probe learns from, and on whom it is tested. Numbers are those of questions.

    Attributes:
        relation: its name.
        answers: all texts that a probe can tell apart.
        known: questions to learn from.
        tested: questions to be tested on.
        label: question -> the right answer.
        options: question -> the answers it is compared with, the right one first.
    """

    relation: str
    answers: tuple[str, ...]
    known: tuple[int, ...]
    tested: tuple[int, ...]
    label: Mapping[int, int]
    options: Mapping[int, tuple[int, ...]]

    def shuffled(self, facts: Facts, questions: Sequence[Question], seed: int) -> _Task:
        """Return the task with every known subject taught the answer of another one."""
        subjects = sorted({facts.facts[questions[i].fact].subject for i in self.known})
        first = {facts.facts[questions[i].fact].subject: i for i in reversed(self.known)}
        others = random.Random(seed).sample(subjects, len(subjects))
        swap = dict(zip(others, (*others[1:], others[0]), strict=True))
        source = {i: first[swap[facts.facts[questions[i].fact].subject]] for i in self.known}
        return _Task(
            self.relation,
            self.answers,
            self.known,
            self.tested,
            {**self.label, **{i: self.label[j] for i, j in source.items()}},
            {**self.options, **{i: self.options[j] for i, j in source.items()}},
        )


def _task(facts: Facts, questions: Sequence[Question], relation: str, kind: Probe) -> _Task | None:
    """Return what there is to learn and to test of a relation, or None if that is too little."""
    here = [
        i
        for i, q in enumerate(questions)
        if facts.facts[q.fact].relation == relation and q.form != "reversed"
    ]
    fact = {i: facts.facts[questions[i].fact] for i in here}
    known = [i for i in here if fact[i].role == "retain"]
    about = {fact[i].subject for i in known}
    named = {fact[i].answer for i in known}
    if kind == "embedding":
        named = {text for i in here for text in (fact[i].answer, *fact[i].distractors)}
    answers = tuple(sorted(named))
    number = {text: k for k, text in enumerate(answers)}
    options = {
        i: tuple(number[text] for text in (fact[i].answer, *fact[i].distractors) if text in number)
        for i in here
        if fact[i].answer in number
    }
    usable = {i for i, found in options.items() if len(found) > 1}
    known = [i for i in known if i in usable]
    tested = [i for i in here if i in usable and fact[i].role in TESTED and fact[i].subject not in about]
    roles = {fact[i].role for i in tested}
    if len(about) < LEAST or "forget" not in roles:
        return None
    label = {i: options[i][0] for i in (*known, *tested)}
    return _Task(relation, answers, tuple(known), tuple(tested), label, options)


def _margins(
    fit: Fit,
    x: Tensor,
    task: _Task,
    codes: Tensor,
    facts: Facts,
    questions: Sequence[Question],
    seed: int,
) -> Tensor:
    """Return ``[layers, known + tested]`` margins: of known questions when their subjects are left out."""
    known, tested = list(task.known), list(task.tested)
    labels = torch.tensor([task.label[i] for i in known])
    subjects = [facts.facts[questions[i].fact].subject for i in known]
    order = sorted(set(subjects))
    random.Random(seed).shuffle(order)
    fold = {subject: k % FOLDS for k, subject in enumerate(order)}
    left = torch.tensor([fold[subject] for subject in subjects])
    rows, outside = x[:, known], None
    for k in range(FOLDS):
        train, test = left != k, left == k
        found = fit(rows[:, train], labels[train], codes, rows[:, test])
        outside = (
            found.new_zeros(*found.shape[:2], len(known), found.shape[-1]) if outside is None else outside
        )
        outside[:, :, test] = found
    assert outside is not None
    new = fit(rows, labels, codes, x[:, tested])
    options = [task.options[i] for i in (*known, *tested)]
    width = max(map(len, options))
    index = torch.tensor([[*found, *[found[0]] * (width - len(found))] for found in options])
    there = torch.tensor([[k < len(found) for k in range(width)] for found in options])
    both = torch.cat([outside, new], 2)  # [settings, layers, known + tested, answers]
    scores = both.gather(-1, index.expand(*both.shape[:2], -1, -1)).masked_fill(~there, -torch.inf)
    scales = torch.tensor(SCALES, dtype=scores.dtype)[:, None, None, None]
    # Right about all of n subjects does not make a probe surer than 1 in n + 1: without this share of plain guessing a
    # probe that makes no mistake gets the largest scale there is, and its few mistakes elsewhere weigh hundreds of nats.
    doubt, margins = 1 / (len(order) + 1), []
    guess = there / there.sum(1, keepdim=True)
    for layer in range(len(x)):
        scaled = torch.where(there, scales * scores[:, layer], -torch.inf)  # 0 * -inf is NaN
        p = (1 - doubt) * scaled.softmax(-1) + doubt * guess
        logp = p.log().flatten(0, 1)  # [scales * settings, known + tested, options]
        best = logp[:, : len(known), 0].mean(1).argmax()
        right, wrong = logp[best, :, 0], logp[best, :, 1:].logsumexp(-1)
        margins.append(right - wrong + (there.sum(1) - 1).log())
    return torch.stack(margins)


def _ridge(kernel: Literal["linear", "rbf"]) -> Fit:
    """Kernel ridge regression on the codes of the answers, one setting per ridge."""

    def fit(x: Tensor, labels: Tensor, codes: Tensor, new: Tensor) -> Tensor:
        x, new = _standardised(x, new)
        wanted = codes[labels]
        mean = wanted.mean(0)
        if kernel == "linear":
            k, across = x @ x.mT, new @ x.mT
        else:
            width = torch.cdist(x, x).flatten(1).median(1).values[:, None, None].clamp_min(1e-12)
            k, across = ((-0.5 * (torch.cdist(a, x) / width) ** 2).exp() for a in (x, new))
        size = k.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
        eye, n = torch.eye(k.shape[-1], dtype=k.dtype), k.shape[-1]
        found = []
        for ridge in RIDGES:
            factor = torch.linalg.cholesky(k + ridge * size * eye)
            weights = torch.cholesky_solve((wanted - mean).expand(len(k), n, -1).contiguous(), factor)
            found.append((across @ weights + mean) @ codes.T)
        return torch.stack(found)

    return fit


def _network(seed: int) -> Fit:
    """A network with one hidden layer, all layers trained side by side."""

    def fit(x: Tensor, labels: Tensor, codes: Tensor, new: Tensor) -> Tensor:
        x, new = _standardised(x, new)
        return train_mlp(x.float(), labels, new.float(), seed, classes=len(codes))[None].double()

    return fit


def _standardised(x: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    mean = x.mean(1, keepdim=True)
    std = x.std(1, keepdim=True)
    std = std.clamp_min(1e-6 * std.amax((1, 2), keepdim=True).clamp_min(1e-12))
    return (x - mean) / std, (new - mean) / std


def _codes(model: nn.Module, tokenizer: Any, task: _Task, questions: Sequence[Question]) -> Tensor:
    """Return the mean output embedding of every answer's tokens, centred and of length 1, ``[answers, d]``."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    weight = getattr(head, "weight", None)
    if not isinstance(weight, Tensor):
        raise InputError(
            f"{type(model).__name__} has no output embeddings; load the causal language model with its head."
        )
    prompt = questions[task.known[0]].prompt
    rows = []
    for text in task.answers:
        ids, start = continuation(tokenizer, prompt, f" {text}")
        rows.append(weight.detach()[ids[start:]].double().cpu().mean(0))
    codes = torch.stack(rows)
    codes = codes - codes.mean(0)
    return codes / codes.norm(dim=1, keepdim=True).clamp_min(1e-12)
