"""Knowledge probes: against scikit-learn, on rows of known content, and on models of known truth."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from knowkit import PLANTED, TOK, TOLD, gold, original, share_left, wrongly_told
from textkit import text_model
from tiny import assert_same, hook_count, snapshot
from torch import Tensor

from repe_unlearn.audit.behaviour import behaviour
from repe_unlearn.audit.knowledge_probe import RIDGES, _margins, _network, _ridge, _task, probe, probes
from repe_unlearn.errors import InputError, NotEnoughDataError
from repe_unlearn.facts import Facts

NAMES = ("Rome", "Oslo", "Lima", "Bonn")


def people(retain: int = 40, forget: int = 16, decoy: int = 16, seed: int = 0) -> Facts:
    """Facts whose answers are all shared and say nothing of the subject."""
    rng = random.Random(seed)
    roles = ["retain"] * retain + ["forget"] * forget + ["decoy"] * decoy
    rows = [(f"P{i}", rng.choice(NAMES), role) for i, role in enumerate(roles)]
    return Facts.of(rows, ["{subject} is in", "In a town is {subject}, in"])


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
def test_ridge_is_that_of_scikit_learn(kernel: str) -> None:
    from sklearn.kernel_ridge import KernelRidge
    from sklearn.linear_model import Ridge
    from sklearn.preprocessing import StandardScaler

    rng = np.random.default_rng(0)
    x, new = rng.normal(size=(2, 50, 9)) * 3 + 1, rng.normal(size=(2, 7, 9)) * 3 + 1
    labels, codes = rng.integers(0, 4, 50), np.eye(4)
    found = _ridge(kernel)(*map(torch.tensor, (x, labels, codes, new)))  # type: ignore[arg-type]
    assert found.shape == (len(RIDGES), 2, 7, 4)
    for layer in range(2):
        scaler = StandardScaler().fit(x[layer])
        a, b = scaler.transform(x[layer]), scaler.transform(new[layer])
        a, b = a * (49 / 50) ** 0.5, b * (49 / 50) ** 0.5  # torch.std divides by n - 1
        y, mean = codes[labels], codes[labels].mean(0)
        for k, ridge in enumerate(RIDGES):
            if kernel == "linear":
                peer = Ridge(alpha=ridge * (a**2).sum(1).mean()).fit(a, y).predict(b)
            else:
                distances = np.linalg.norm(a[:, None] - a[None], axis=-1)
                width = np.sort(distances.ravel())[(distances.size - 1) // 2]
                model = KernelRidge(alpha=ridge, kernel="rbf", gamma=0.5 / width**2)
                peer = model.fit(a, y - mean).predict(b) + mean
            np.testing.assert_allclose(found[k, layer].numpy(), peer, atol=1e-8)


def rows(facts: Facts, content: str, seed: int = 0) -> Tensor:
    """One layer of rows: noise, and on top what the name of ``content`` says."""
    g = torch.Generator().manual_seed(seed)
    questions = facts.questions("seen")
    x = torch.randn(len(questions), 24, generator=g, dtype=torch.float64)
    for i, question in enumerate(questions):
        fact = facts.facts[question.fact]
        if content == "answer" or (content == "answer of retain" and fact.role == "retain"):
            x[i, NAMES.index(fact.answer)] += 8
        if content == "subject":
            x[i] = torch.randn(24, generator=torch.Generator().manual_seed(question.fact)).double()
    return x[None]


def margins_of(
    facts: Facts, content: str, kind: str = "linear", *, shuffle: bool = False
) -> dict[str, float]:
    questions = facts.questions("seen")
    task = _task(facts, questions, "fact", "linear")
    assert task is not None
    if shuffle:
        task = task.shuffled(facts, questions, seed=1)
    fit = _network(0) if kind == "mlp" else _ridge(kind)  # type: ignore[arg-type]
    codes = torch.eye(len(task.answers), dtype=torch.float64)
    found = _margins(fit, rows(facts, content), task, codes, facts, questions, 0)[0].tolist()
    by_role: dict[str, list[float]] = {}
    for i, value in zip((*task.known, *task.tested), found, strict=True):
        by_role.setdefault(facts.facts[questions[i].fact].role, []).append(value)
    return {role: float(np.mean(values)) for role, values in by_role.items()}


@pytest.mark.parametrize("kind", ["linear", "rbf", "mlp"])
def test_a_probe_reads_what_is_there_and_nothing_else(kind: str) -> None:
    facts = people()
    everybody = margins_of(facts, "answer", kind)
    assert min(everybody.values()) > 2
    assert max(everybody.values()) < np.log(4 * 41) + 0.1  # 40 subjects do not make it surer than 40 to 1
    known = margins_of(facts, "answer of retain", kind)
    assert known["retain"] > 2
    assert max(known["forget"], known["decoy"]) < 0.5
    assert abs(np.array(list(margins_of(facts, "nothing", kind).values()))).max() < 0.3
    shuffled = margins_of(facts, "answer", kind, shuffle=True)
    assert abs(shuffled["forget"]) < 0.4  # control: taught shuffled answers it reads nothing


def test_a_probe_that_knows_its_subjects_by_heart_gets_no_say() -> None:
    # Rows that tell the subject apart and nothing else: perfect on wordings of subjects seen, useless on others.
    found = margins_of(people(), "subject")
    assert abs(np.array(list(found.values()))).max() < 0.3


def test_nobody_is_tested_that_the_probe_learnt_from() -> None:
    facts = people()
    both = Facts.of(
        [*((f.subject, f.answer, f.role) for f in facts), ("P3", "Oslo", "forget")],
        ["{subject} is in", "In a town is {subject}, in"],
    )
    questions = both.questions("seen")
    task = _task(both, questions, "fact", "linear")
    assert task is not None
    tested = {both.facts[questions[i].fact].subject for i in task.tested}
    assert "P3" not in tested
    assert "P40" in tested
    assert not tested & {both.facts[questions[i].fact].subject for i in task.known}
    swapped = task.shuffled(both, questions, 0)
    per_subject = {}
    for i in swapped.known:
        per_subject.setdefault(both.facts[questions[i].fact].subject, set()).add(swapped.label[i])
    assert all(len(labels) == 1 for labels in per_subject.values())  # all wordings of a subject agree
    assert sum(swapped.label[i] != task.label[i] for i in task.known) > len(task.known) / 2


def test_which_probes_fit_the_facts() -> None:
    assert probes(PLANTED) == ("linear", "mlp", "rbf")
    assert probes(Facts.builtin("capitals")) == ("embedding",)


def test_bad_input_is_refused_and_the_model_is_left_as_it_was() -> None:
    model = text_model(max_position_embeddings=128)
    before = snapshot(model)
    scores = probe(model, TOK, people(), layers=[0, -1], progress=False, forms=["seen"])
    assert (scores.attack, scores.tier, scores.unit) == ("probe.linear", "T1", "nats")
    assert scores.curves[0].x == (0.0, 2.0)
    with pytest.raises(InputError, match="kind='forest'"):
        probe(model, TOK, people(), kind="forest")  # type: ignore[arg-type]
    with pytest.raises(NotEnoughDataError, match="8 subjects"):
        probe(model, TOK, TOLD, progress=False)
    assert_same(before, model)
    assert hook_count(model) == 0


# On models of known truth


@pytest.mark.parametrize("kind", ["linear", "rbf", "mlp", "embedding"])
def test_the_original_can_be_read_and_one_that_never_knew_cannot(kind: str) -> None:
    model, tokenizer = original()
    settings = {"kind": kind, "layers": [1, 3], "progress": False, "forms": ["unseen"]}
    whole = probe(model, tokenizer, PLANTED, **settings)  # type: ignore[arg-type]
    never = probe(gold(), tokenizer, PLANTED, **settings)  # type: ignore[arg-type]
    assert abs(share_left(never, whole)) < 0.1
    assert whole.of(PLANTED, "forget").mean() > 3 > 0 > whole.of(PLANTED, "decoy").mean()
    assert never.of(PLANTED, "retain").mean() > 3  # the gold model's other facts can be read
    lies = probe(model, tokenizer, wrongly_told(), **settings)  # type: ignore[arg-type]
    assert share_left(lies, whole) < 0.1  # control


def test_what_the_last_block_hides_is_read_before_it() -> None:
    model, tokenizer = original()
    hidden = copy.deepcopy(model)
    with torch.no_grad():
        hidden.model.layers[-1].mlp.down_proj.weight.mul_(-40)  # type: ignore[union-attr]
    said = [behaviour(m, tokenizer, PLANTED, progress=False) for m in (hidden, model)]
    assert share_left(*said) < 0.3
    settings = {"layers": [1, 2], "progress": False, "forms": ["unseen"]}
    found = [probe(m, tokenizer, PLANTED, **settings) for m in (hidden, model)]  # type: ignore[arg-type]
    assert share_left(*found) > 0.9
