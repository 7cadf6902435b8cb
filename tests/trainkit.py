"""Facts to forget and to retain, and a tiny model that knows them."""

from __future__ import annotations

import copy
import functools

from textkit import text_model, text_tokenizer
from torch import float32, nn

from repe_unlearn import train
from repe_unlearn.train.losses import nll

TOKENIZER = text_tokenizer()
FORGET = train.from_pairs(
    [("the cat", "sat"), ("a dog ran", "away"), ("one", "two three"), ("red is", "hot")]
)
RETAIN = train.from_pairs([("my hat", "fits"), ("we saw", "rain"), ("four", "five six"), ("blue", "cold")])
MEMORISE = train.Objective(lambda logp, counts, _: nll(logp, counts))


def knowing() -> nn.Module:
    """Return a tiny float32 model that has learnt what is to be forgotten and what is to be retained."""
    return copy.deepcopy(_knowing())


@functools.cache
def _knowing() -> nn.Module:
    model = text_model(dtype=float32)
    run = train.unlearn(
        model, TOKENIZER, FORGET, RETAIN, method=MEMORISE, steps=80, lr=5e-3, accumulate=1, progress=False
    )
    for name, edit in run.patch.edits.items():
        parameter = model.get_parameter(name)
        parameter.copy_(edit.apply(parameter))
    return model
