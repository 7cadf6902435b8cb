"""DATA: the attacks of an audit, in the order of what they tell per second."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, get_args

from torch import nn

from repe_unlearn.audit.ablation import Ablation, ablation, ablations
from repe_unlearn.audit.behaviour import behaviours
from repe_unlearn.audit.budget import kind_of
from repe_unlearn.audit.depth import depth
from repe_unlearn.audit.knowledge_probe import probe, probes
from repe_unlearn.audit.lens import lens
from repe_unlearn.audit.perturbation import perturbation
from repe_unlearn.audit.prefix import prefix
from repe_unlearn.audit.relearning import RATES, RATES_SMALL, SMALL, Arm, relearning
from repe_unlearn.audit.sampling import leak_at_k
from repe_unlearn.audit.scores import Scores, Tier
from repe_unlearn.errors import InputError
from repe_unlearn.facts import FORMS, Facts, Form, Role

Level = Literal["quick", "standard", "full"]
LEVELS: tuple[Level, ...] = get_args(Level)
COMPARED: tuple[Role, ...] = ("forget", "decoy")


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """What an attack sees besides the model that it attacks.

    Attributes:
        tokenizer: of all models.
        facts: what is asked.
        brief: the same facts in fewer wordings, for attacks that ask after every try.
        edited: the edited model.
        base: the original.
        gold: a model that never knew, or None.
        texts: neutral texts.
        directions: of the edit, for ``ablation``; found once, while the original is as it was.
    """

    tokenizer: Any
    facts: Facts
    brief: Facts
    edited: nn.Module
    base: nn.Module
    gold: nn.Module | None
    texts: Sequence[str]
    directions: list[Ablation] = field(default_factory=list)


Run: TypeAlias = Callable[[Case, nn.Module, int], Sequence[Scores]]


@dataclass(frozen=True, slots=True, eq=False)
class Attack:
    """One row of the battery.

    Attributes:
        name: of the attack.
        tier: the attacker that it needs.
        level: the first level that has it.
        passes: cost on one model, in passes of the seen and unseen questions of ``Case.brief`` through it (measured).
        run: (case, model, seed) -> scores, one entry for every wording or reader that stands by itself.
        prepare: called before any model is attacked; the random edit changes the original while it is looked at.
        seeds: draws at random, so the full level repeats it.
        random: run it on the random edit too; not what trains, nor what compares with the original.
    """

    name: str
    tier: Tier
    level: Level
    passes: float
    run: Run
    seeds: bool = False
    random: bool = True
    prepare: Callable[[Case], None] | None = None


def _behaviour(case: Case, model: nn.Module, seed: int) -> Sequence[Scores]:
    options = {"roles": COMPARED, "seed": seed, "progress": False}
    plain: list[Form] = [form for form in FORMS if form != "in_context"]
    # What is shown first makes in-context questions three times as long, so they come in fewer wordings.
    return (
        *behaviours(model, case.tokenizer, case.facts, forms=plain, **options),
        *behaviours(model, case.tokenizer, case.brief, forms=["in_context"], **options),
    )


def _directions(case: Case) -> None:
    if not case.directions:
        case.directions.extend(
            ablations(case.edited, case.tokenizer, case.brief, base=case.base, progress=False)
        )


def _ablation(case: Case, model: nn.Module, seed: int) -> Sequence[Scores]:
    # All models are attacked with the directions of the edited one.
    return [ablation(model, case.tokenizer, case.brief, which=case.directions, seed=seed, progress=False)]


def _lens(case: Case, model: nn.Module, seed: int) -> Sequence[Scores]:
    return [lens(model, case.tokenizer, case.brief, roles=COMPARED, seed=seed, progress=False)]


def _probes(case: Case, model: nn.Module, seed: int) -> Sequence[Scores]:
    kinds = probes(case.facts)
    if kinds == ("embedding",):
        # No answer to be forgotten is among those that a probe can learn: learn the way to the head instead.
        return [
            lens(model, case.tokenizer, case.brief, roles=COMPARED, tuned=True, seed=seed, progress=False)
        ]
    return [probe(model, case.tokenizer, case.facts, kind=kind, seed=seed, progress=False) for kind in kinds]


def _sampled(case: Case, model: nn.Module, seed: int) -> Sequence[Scores]:
    return [leak_at_k(model, case.tokenizer, case.brief, roles=COMPARED, seed=seed, progress=False)]


def _prefix(case: Case, model: nn.Module, seed: int) -> Sequence[Scores]:
    return [prefix(model, case.tokenizer, case.brief, seed=seed, progress=False)]


def _depth(case: Case, model: nn.Module, seed: int) -> Sequence[Scores]:
    options = {"base": case.base, "gold": case.gold, "seed": seed, "progress": False}
    return [depth(model, case.tokenizer, case.brief, **options)]


def _perturbed(change: str) -> Run:
    def run(case: Case, model: nn.Module, seed: int) -> Sequence[Scores]:
        return [perturbation(model, case.tokenizer, case.brief, change=change, seed=seed, progress=False)]

    return run


def _relearned(arm: Arm, *, full: bool = False) -> Run:
    def run(case: Case, model: nn.Module, seed: int) -> Sequence[Scores]:
        small = sum(p.numel() for p in model.parameters()) < SMALL
        options = {
            "steps": (5, 10, 20, 40) if full else (5, 10, 20),
            # A large model takes a minute per rate, so all of them, and large batches, only where there is time.
            "rates": None if full else RATES_SMALL[1:] if small else RATES[1:2],
            "batch": 16 if full or small else 8,
            "texts": case.texts,
        }
        return [relearning(model, case.tokenizer, case.brief, arm=arm, seed=seed, progress=False, **options)]

    return run


# Behaviour comes first: without it no verdict. Retention is measured before the attacks.
ATTACKS: tuple[Attack, ...] = (
    Attack("behaviour", "T0", "quick", 5.5, _behaviour),
    Attack("ablation", "T1", "quick", 9.5, _ablation, prepare=_directions),
    Attack("lens", "T1", "quick", 2.5, _lens),
    Attack("probe", "T1", "standard", 4.0, _probes),
    Attack("relearn.retain_only", "T2", "standard", 8.0, _relearned("retain_only"), random=False),
    Attack("relearn.facts", "T2", "standard", 8.0, _relearned("facts"), random=False),
    Attack("perturb.int8", "T2", "standard", 1.0, _perturbed("int8")),
    Attack("perturb.int4", "T2", "standard", 1.0, _perturbed("int4")),
    Attack("sampling", "T0", "standard", 3.0, _sampled, seeds=True),
    Attack("depth", "T1", "full", 20.0, _depth, random=False),
    Attack("perturb.prune30", "T2", "full", 1.0, _perturbed("prune30")),
    Attack("perturb.noise", "T2", "full", 1.0, _perturbed("noise"), seeds=True),
    Attack("relearn.benign", "T2", "full", 60.0, _relearned("benign", full=True), random=False, seeds=True),
    Attack("relearn.decoy", "T2", "full", 60.0, _relearned("decoy", full=True), random=False, seeds=True),
    Attack("prefix", "T1", "full", 20.0, _prefix, random=False, seeds=True),
)


def of_level(level: str, tier_limit: int = 2, only: Sequence[str] | None = None) -> tuple[Attack, ...]:
    """Return the attacks of a level that attackers up to a tier can make, or those that are named.

    Args:
        level: ``"quick"``, ``"standard"`` or ``"full"``.
        tier_limit: 0, 1 or 2.
        only: names (``"relearn.facts"``) or their part before the dot (``"relearn"``), of any level; behaviour is
            always among them.

    Raises:
        InputError: an unknown level, tier or name.
    """
    if level not in LEVELS:
        raise InputError(f"got level {level!r}; needed one of {', '.join(LEVELS)}.")
    if tier_limit not in (0, 1, 2):
        raise InputError(f"got tier_limit={tier_limit!r}; needed 0 (ask), 1 (read) or 2 (tamper).")
    allowed = [a for a in ATTACKS if int(a.tier[1]) <= tier_limit]
    if only is None:
        return tuple(a for a in allowed if LEVELS.index(a.level) <= LEVELS.index(level))
    names = {name for a in ATTACKS for name in (a.name, kind_of(a.name))}
    if unknown := set(only) - names:
        raise InputError(
            f"got the attack {min(unknown)!r}; needed some of {', '.join(a.name for a in ATTACKS)}."
        )
    return tuple(a for a in allowed if {a.name, kind_of(a.name)} & {"behaviour", *only})
