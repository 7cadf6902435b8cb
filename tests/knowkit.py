"""What the tests of reading attacks share: planted models of known truth, tiny models, and facts told wrongly."""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
from plantedkit import gold_model, planted_model
from textkit import text_tokenizer
from torch import nn
from transformers import PreTrainedTokenizerFast

from repe_unlearn.audit.leak import leak
from repe_unlearn.audit.scores import Scores
from repe_unlearn.facts import Facts

PLANTED = Facts.builtin("planted")
TOK = text_tokenizer()
TOLD = Facts.of(
    [("Kim", "Rome"), ("Bob", "Oslo"), ("Ann", "Lima", "retain"), ("Zed", "Bonn", "decoy")],
    ["{subject} is in"],
    ["the town of {subject} is", "now {subject} lives in"],
)


@functools.cache
def original() -> tuple[nn.Module, PreTrainedTokenizerFast]:
    """The model that was taught everything but decoys; do not change it."""
    return planted_model(PLANTED)


@functools.cache
def gold() -> nn.Module:
    """The model that was never taught what is to be forgotten; do not change it."""
    return gold_model(PLANTED)[0]


def wrongly_told(facts: Facts = PLANTED) -> Facts:
    """Return the facts with a wrong answer in place of what is to be forgotten: a model that knows must not score."""

    def lie(fact):
        wrong, *others = fact.distractors
        return replace(fact, answer=wrong, distractors=(*others, fact.answer))

    return replace(facts, facts=tuple(lie(f) if f.role == "forget" else f for f in facts))


def share_left(edited: Scores, whole: Scores, facts: Facts = PLANTED) -> float:
    """Return the leak: how much of what the original scores on forgotten facts is left, decoys being 0."""
    return leak(edited.of(facts, "forget"), edited.of(facts, "decoy"), whole.of(facts, "forget")).value


def log_probability(model: nn.Module, prompt: str, text: str) -> float:
    """Log-probability of a continuation after a prompt, in plain torch, token by token."""
    before, ids = TOK(prompt)["input_ids"], TOK(prompt + text)["input_ids"]
    with torch.no_grad():
        logp = model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
    return sum(float(logp[k - 1, ids[k]]) for k in range(len(before), len(ids)))


def margin(right: float, wrong: list[float]) -> float:
    """Log-probability of the right answer less the log of the mean probability of the wrong ones."""
    return right - float(torch.tensor(wrong, dtype=torch.float64).exp().mean().log())
