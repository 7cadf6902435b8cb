"""What the tests of tampering attacks share: edits of the planted model that hide what it knows."""

from __future__ import annotations

import copy
import functools

from knowkit import PLANTED, original
from torch import nn

from repe_unlearn import train
from repe_unlearn.answers import answers
from repe_unlearn.audit.tries import shares
from repe_unlearn.facts import Role
from repe_unlearn.patch import Patch

ASKED = {"forms": ("unseen",), "progress": False}  # fewer wordings than by default, for speed
CHANCE = 1 / 8
_FORGET = PLANTED.samples("seen", roles=["forget"])
_RETAIN = PLANTED.samples("seen", roles=["retain"])


@functools.cache
def rmu() -> Patch:
    """Return an edit of one layer that sends what is to be forgotten into a random direction."""
    return train.rmu(
        *original(),
        _FORGET,
        _RETAIN,
        layer=1,
        layers=[1],
        c="adaptive",
        alpha=1.0,
        steps=250,
        lr=1e-2,
        batch=32,
        progress=False,
    ).patch


@functools.cache
def npo() -> Patch:
    """Return an edit of all weights that makes right answers unlikely."""
    return train.unlearn(
        *original(),
        _FORGET,
        _RETAIN,
        method="npo",
        steps=30,
        lr=1e-3,
        batch=32,
        accumulate=1,
        progress=False,
    ).patch


def edited(patch: Patch) -> nn.Module:
    """Return a copy of the original with a patch in its weights."""
    model = copy.deepcopy(original()[0])
    for name, edit in patch.edits.items():
        parameter = model.get_parameter(name)
        parameter.data = edit.apply(parameter.data)
    return model


def share(model: nn.Module, role: Role) -> float:
    """Return the mean probability of the right option without any attack."""
    said = answers(model, original()[1], PLANTED, "unseen", roles=[role], progress=False)
    return said.mean(shares(said))
