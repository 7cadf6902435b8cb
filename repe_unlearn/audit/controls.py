"""Controls: the models that every attack of an audit is run on, and the rules by which an attack counts."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

from torch import nn

from repe_unlearn.audit.battery import random_plan
from repe_unlearn.audit.edits import random_edit
from repe_unlearn.audit.leak import Comparison
from repe_unlearn.audit.scores import Scores
from repe_unlearn.audit.statistics import FEWEST, mean_interval
from repe_unlearn.difference import diff
from repe_unlearn.errors import InputError, ModelMismatchError
from repe_unlearn.facts import Facts
from repe_unlearn.fingerprints import fingerprint
from repe_unlearn.hooks import apply
from repe_unlearn.patch import Patch
from repe_unlearn.plan import ErasurePlan

EDITED, ORIGINAL, RANDOM, GOLD = "edited", "original", "random edit", "gold"
TIERS = ("T0", "T1", "T2")


@dataclass(frozen=True, slots=True, eq=False)
class Subject:
    """One model of an audit.

    Attributes:
        name: ``edited``, ``original``, ``random edit`` or ``gold``.
        key: tells its weights (and hooks) from others, for stored scores.
        enter: context in which the model is as it should be, and leaves it as it was.
    """

    name: str
    key: str
    enter: Callable[[], AbstractContextManager[nn.Module]]


def subjects(
    base: nn.Module,
    edited: nn.Module | Patch | ErasurePlan,
    gold: nn.Module | None = None,
    *,
    seed: int = 0,
) -> dict[str, Subject]:
    """Return the models under audit: edited, original, a random edit of equal rank and norm, and gold if given.

    A patch is applied to a copy of the original, a plan hooks the original while it is asked. The random edit is put
    into the original for as long as it is looked at; the original is restored bit for bit.

    Args:
        base: the original.
        edited: the same model after any edit, or the edit.
        gold: a model of the same shape that never knew.
        seed: of the random edit.

    Raises:
        InputError: edited and original are the same, bit for bit.
        ModelMismatchError: edited is no version of the original, or gold has another shape.
    """
    print_ = fingerprint(base)
    found = {ORIGINAL: Subject(ORIGINAL, print_, lambda: nullcontext(base))}
    if isinstance(edited, ErasurePlan):
        edited.require(base)
        key = f"{print_}+{_digest(edited)}"
        found[EDITED] = Subject(EDITED, key, lambda: _hooked(base, edited))
        control = random_plan(edited, seed)
        found[RANDOM] = Subject(RANDOM, f"{print_}+{_digest(control)}", lambda: _hooked(base, control))
    else:
        if isinstance(edited, Patch):
            patch, model = edited, copy.deepcopy(base)
            patch.apply_(model)
        else:
            patch, model = diff(base, edited), edited
        key = fingerprint(model)
        found[EDITED] = Subject(EDITED, key, lambda: nullcontext(model))
        found[RANDOM] = Subject(RANDOM, f"{print_}+random{seed}:{key}", lambda: _randomly(base, patch, seed))
    if gold is not None:
        shapes = [{name: tuple(p.shape) for name, p in one.named_parameters()} for one in (base, gold)]
        if shapes[0] != shapes[1]:
            raise ModelMismatchError(
                "gold has other parameters than the original; needed one of the same shape."
            )
        found[GOLD] = Subject(GOLD, fingerprint(gold), lambda: nullcontext(gold))
    return found


@contextmanager
def _hooked(model: nn.Module, plan: ErasurePlan) -> Iterator[nn.Module]:
    with apply(model, plan):
        yield model


@contextmanager
def _randomly(model: nn.Module, patch: Patch, seed: int) -> Iterator[nn.Module]:
    control = random_edit(patch, seed)
    control.apply_(model)
    try:
        yield model
    finally:
        control.revert_(model)


def _digest(plan: ErasurePlan) -> str:
    state = hashlib.blake2b(digest_size=8)
    for site, eraser in sorted(plan.erasers.items(), key=lambda item: str(item[0])):
        state.update(str(site).encode())
        for tensor in (eraser.left, eraser.right, eraser.shift):
            state.update(tensor.double().cpu().numpy().tobytes())
    return state.hexdigest()


def compared(
    found: Mapping[str, Scores], facts: Facts, plain: Mapping[str, Scores], *, margin: float = 0.1
) -> Comparison:
    """Return one attack as the statistics want it: edited against original and control, with its gate.

    The control is the gold model on the same facts where there is one, else the decoys in the edited model. An attack
    that raises decoys, in the edited model or in the original, puts in what it claims to find; it is marked invalid and
    is no evidence. (An attack that does not work on the original is found invalid by ``leak.leaks``.)

    Args:
        found: name of the model -> scores of one attack; ``edited`` and ``original`` at least.
        facts: the facts.
        plain: name of the model -> scores of plain questions, against which decoys must not rise.
        margin: share of the original's knowledge by which decoys may rise.

    Raises:
        InputError: no decoys and no gold model, so that there is no control.
        NotEnoughDataError: fewer than 8 facts.
    """
    edited, original = found[EDITED], found[ORIGINAL]
    both = [i for i in edited.indices(facts, "forget") if i in original.values]
    if GOLD in found:
        both = [i for i in both if i in found[GOLD].values]
        controls, control = both, [found[GOLD].values[i] for i in both]
    else:
        controls = edited.indices(facts, "decoy")
        control = [edited.values[i] for i in controls]
    if len(controls) < FEWEST:
        raise InputError(
            f"{edited.attack}: got {len(controls)} decoys with a score and no gold model; needed at least {FEWEST} facts "
            "that the model never knew (role 'decoy'), asked for in the same wordings."
        )
    return Comparison(
        edited.attack,
        edited=[edited.values[i] for i in both],
        original=[original.values[i] for i in both],
        control=control,
        paired=GOLD in found,
        tier=TIERS.index(edited.tier),
        facts=tuple(map(str, both)),
        controls=tuple(map(str, controls)),
        invalid=_spoils(found, facts, plain) or _injects(found, facts, plain, margin),
    )


def _spoils(found: Mapping[str, Scores], facts: Facts, plain: Mapping[str, Scores]) -> str:
    """Return why an attack is too weak to count, judged on the original alone, or the empty string.

    If under the attack the original shows less than half of what it shows when asked plainly, the attack spoils more than
    it finds (or the wording is one that the model cannot answer), and a share of the little that is left says nothing.
    """
    attacked, asked = found[ORIGINAL], plain[ORIGINAL]
    if not all(one.indices(facts, "decoy") for one in (attacked, asked)):
        return ""
    gap, needed = (
        float(one.of(facts, "forget").mean() - one.of(facts, "decoy").mean()) / 2 for one in (attacked, asked)
    )
    gap, needed = 2 * gap, needed if attacked.unit == asked.unit else 0.5  # of all that a share can show
    if gap >= needed:
        return ""
    return (
        f"too weak on the original, which shows {gap:.2f} {attacked.unit} more than on decoys and should show {needed:.2f}, "
        "half of what it does when it is asked plainly (of 1, for shares)"
    )


def _injects(found: Mapping[str, Scores], facts: Facts, plain: Mapping[str, Scores], margin: float) -> str:
    """Return why an attack injects what it finds, or the empty string."""
    for name in (EDITED, ORIGINAL):
        scores, asked = found[name], plain[name]
        decoys = scores.indices(facts, "decoy")
        if scores.unit == asked.unit:  # nats: against the plain questions, and never below what chance gives
            level = max(0.0, float(asked.of(facts, "decoy").mean())) if asked.indices(facts, "decoy") else 0.0
        elif name == EDITED and decoys:  # share: what chance gives depends on the attack, so on the original
            level = float(found[ORIGINAL].of(facts, "decoy").mean())
        else:
            continue
        if len(decoys) < FEWEST:
            continue
        mean, low, _ = mean_interval(scores.of(facts, "decoy"))
        gap = float(found[ORIGINAL].of(facts, "forget").mean()) - level
        if gap > 0 and low > level + margin * gap:
            return (
                f"it raises decoys in the {name} model ({mean:.2f} against {level:.2f} {scores.unit}), so it puts in what "
                "it finds"
            )
    return ""
