"""Audit: was knowledge removed from a model, or merely hidden? Every attack on every control, then one verdict."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn
from tqdm.auto import tqdm

from repe_unlearn.answers import answers
from repe_unlearn.audit import attacks, stored, verdict_report
from repe_unlearn.audit.attacks import Attack, Case
from repe_unlearn.audit.budget import Budget
from repe_unlearn.audit.check import Check
from repe_unlearn.audit.controls import EDITED, GOLD, ORIGINAL, RANDOM, Subject, compared, subjects
from repe_unlearn.audit.leak import Leak, leaks
from repe_unlearn.audit.likelihoods import likelihoods
from repe_unlearn.audit.membership import Auc, membership
from repe_unlearn.audit.neutral import NEUTRAL
from repe_unlearn.audit.record import from_record, to_record
from repe_unlearn.audit.refusal import compare as compare_refusals
from repe_unlearn.audit.refusal import refusals
from repe_unlearn.audit.report import Report
from repe_unlearn.audit.retention import fluent, kept, retention
from repe_unlearn.audit.scores import Scores
from repe_unlearn.audit.statistics import FEWEST
from repe_unlearn.audit.stored import Stored
from repe_unlearn.audit.verdict import Measure, Thresholds, verdict
from repe_unlearn.errors import InputError, NotEnoughDataError
from repe_unlearn.facts import Facts
from repe_unlearn.facts_files import read_kept
from repe_unlearn.patch import Patch
from repe_unlearn.plan import ErasurePlan

ASKED = "behaviour.unseen"
WORDINGS, OFTEN = 2, 1
"""Wordings of a form below the full level, and of what is asked again for every try of an attack."""
Kept: TypeAlias = Facts | str | Path
Found = dict[str, dict[str, Scores]]
"""Attack -> name of the model -> scores."""


def audit(
    base: nn.Module,
    edited: nn.Module | Patch | ErasurePlan,
    tokenizer: Any,
    facts: Facts,
    *,
    level: str = "standard",
    only: Sequence[str] | None = None,
    minutes: float | None = None,
    gold: nn.Module | None = None,
    tier_limit: int = 2,
    neutral: Sequence[str] = NEUTRAL,
    kept: Kept | Sequence[Kept] = (),
    refusal: bool | None = None,
    known: bool = True,
    thresholds: Thresholds | None = None,
    seed: int = 0,
    seeds: int = 1,
    resume: str | Path | None = None,
    command: str = "",
    progress: bool = True,
) -> Report:
    """Return a report that says whether knowledge is gone from an edited model, or merely hidden, at a given budget.

    Every attack is run on the edited model, the original, a random edit of equal rank and norm and, if there is one, a
    model that never knew. What counts is the leak: the share of the original's score that comes back, both measured
    from a control under the same attack (decoys in the edited model, or the same facts in ``gold``). An attack that
    fails on the original, or that raises decoys, is no evidence. The verdict never says more than what was run.

    The models are restored bit for bit. Memory: both models (a patch makes a copy of the original), and the difference
    of their edited tensors in float64.

    Args:
        base: the original, a causal language model with its head.
        edited: the same model after any edit, by any tool; or a patch; or a plan, which hooks the original and is
            audited as an attacker who can only ask would see it.
        tokenizer: of all of them, a fast one.
        facts: what was to be forgotten and what was to stay; roles ``forget`` and, without ``gold``, ``decoy`` with at
            least 8 facts each (16 for a verdict), and best ``retain`` and ``neighbour``.
        level: ``"quick"`` (asking, ablation, lens), ``"standard"`` (also probes, relearning, rounding, sampling) or
            ``"full"`` (everything, random attacks repeated, all wordings); below full, two wordings of every form, and
            one in context, when sampling and where an attack asks again after every try.
        only: attacks to run in place of those of the level, by name (``"relearn.facts"``) or kind (``"relearn"``).
        minutes: most wall time; attacks that do not fit are left out, and the report lists them.
        gold: a model of the same shape that never knew.
        tier_limit: strongest attacker: 0 asks, 1 reads activations and weights, 2 changes weights.
        neutral: texts that have nothing to do with the facts, for damage and harmless training; 8 or more.
        kept: facts from elsewhere that should stay, or files of them (TOFU's world facts and real authors, one question
            and answer per line; or what ``Facts.read`` takes), each a measure of damage of its own, ``kept.NAME``: the
            share of those that the original chooses right and the edited model does not.
        refusal: compare how often both models decline harmful and harmless requests; default from the standard level
            on, where the tokenizer has a chat template.
        known: leave out facts to be forgotten that the original does not choose right in most of its ``seen`` wordings:
            there was nothing to forget.
        thresholds: lines that the verdict draws.
        seed: of everything that is drawn.
        seeds: runs of every attack that draws at random, at the full level; each run counts by itself.
        resume: folder that keeps what is done, so that an interrupted audit goes on from there.
        command: how to run it again, for the report.
        progress: show a progress bar over attacks and models.

    Returns:
        The report; ``passed`` only for NOT_RECOVERED_AT_BUDGET without a flag, on an edit that keeps refusals.

    Raises:
        InputError: nothing to compare, an unknown level, no control, or two kept sets of one name.
        ModelMismatchError: edited is no version of the original.
        NotEnoughDataError: fewer than 8 facts that the original knows.
        MissingDependencyError: an attack needs scikit-learn.

    Example:
        ``audit(base, edited, tokenizer, Facts.builtin("capitals"), minutes=8).save("report")``
    """
    lines = thresholds or Thresholds()
    hook = isinstance(edited, ErasurePlan)
    rows = attacks.of_level(level, 0 if hook else tier_limit, only)
    if seeds < 1:
        raise InputError(f"got seeds={seeds}; needed at least 1.")
    elsewhere = _elsewhere(kept)
    clock, store = Budget(minutes), Stored(resume)
    models = subjects(base, edited, gold, seed=seed)
    everyone, facts = facts, _known(base, tokenizer, facts) if known else facts
    facts, brief = (facts, facts) if level == "full" else (_brief(facts, WORDINGS), _brief(facts, OFTEN))
    _require_enough(facts, gold is not None)
    with models[EDITED].enter() as model:
        case = Case(tokenizer, facts, brief, base if hook else model, base, gold, neutral)
    bench = _Bench(case, models, store, clock, seed, progress)

    harms = bench.harms(lines)
    found: Found = {}
    errors: dict[str, str] = {}
    for name, one in elsewhere.items():
        try:
            harms += (bench.kept(name, one if level == "full" else _brief(one, OFTEN), lines),)
        except NotEnoughDataError as error:
            errors[f"kept.{name}"] = str(error)
    for row in tqdm(rows, desc="audit", unit="attack", disable=not progress):
        for turn in range(seeds if row.seeds and level == "full" else 1):
            try:
                found |= bench.attacked(row, turn)
            except NotEnoughDataError as error:  # these facts cannot be asked that way: said in the report
                errors[row.name] = str(error)
    declined = _refusals(bench, level, refusal)
    familiar = bench.familiar()

    plain = found[ASKED] if ASKED in found else next(iter(found.values()))
    battery = {name: compared(one, facts, plain, margin=lines.margin) for name, one in found.items()}
    asked = leaks([c for name, c in battery.items() if name.startswith("behaviour")], seed=seed)
    others = [c for name, c in battery.items() if not name.startswith("behaviour")]
    tried = leaks(others, seed=seed) if others else ()
    said = verdict(
        asked, tried, harms, lines, membership=familiar, hook=hook, budget=_budget(level, clock, found)
    )
    controls = _control_leaks(found, facts, plain, lines, seed)
    details = {
        "facts": repr(facts),
        "left out": f"{len(everyone) - len(facts)} facts that the original does not know",
        **({"kept": ", ".join(map(_kept_words, elsewhere.values()))} if elsewhere else {}),
        "level": level,
        "seed": str(seed),
        "models": ", ".join(f"{one.name} {one.key[:24]}" for one in models.values()),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": _versions(),
        "not attacked": _not_attacked(rows, clock, errors, hook),
        **({"command": command} if command else {}),
    }
    return verdict_report.report(
        said,
        asked,
        tried,
        harms,
        declined,
        familiar,
        controls=controls,
        found=found,
        facts=facts,
        lines=lines,
        details=details,
    )


class _Bench:
    """Runs attacks on models, from the store where they were run before."""

    def __init__(
        self,
        case: Case,
        models: Mapping[str, Subject],
        store: Stored,
        clock: Budget,
        seed: int,
        progress: bool,
    ) -> None:
        self.case, self.models, self.store, self.clock, self.seed, self.progress = (
            case,
            models,
            store,
            clock,
            seed,
            progress,
        )
        self._facts = _digest(case.facts, case.texts)
        begun = time.perf_counter()
        answers(
            case.base, case.tokenizer, case.brief, "seen", "unseen", roles=("forget", "decoy"), progress=False
        )
        clock.seconds_per_pass = time.perf_counter() - begun

    def key(self, *names: str, turn: int = 0) -> dict[str, str]:
        """What a result about these models depends on."""
        used = {name: self.models[name].key for name in names}
        return {**used, "facts": self._facts, "seed": str(self.seed + turn), "version": _version()}

    def attacked(self, row: Attack, turn: int) -> Found:
        """Return attack -> model -> scores of one row; empty if it does not fit the budget."""
        names = [name for name in self.models if row.random or name != RANDOM]
        name = f"{row.name}.run{turn + 1}" if turn else row.name
        keys = {one: self.key(*dict.fromkeys((one, EDITED, ORIGINAL)), turn=turn) for one in names}
        kept = {one: self.store.load(f"{name}-{one}", keys[one]) for one in names}
        missing = [one for one in names if kept[one] is None]
        passes = row.passes * len(missing)
        if missing and row.name != "behaviour" and not self.clock.fits(name, passes):
            return {}
        begun = time.perf_counter()
        results: dict[str, Sequence[Scores]] = {}
        if missing and row.prepare:
            row.prepare(self.case)
        for one in names:
            there = kept[one]
            if there is not None:
                results[one] = stored.scores_from_record(there["scores"])
                continue
            since = time.perf_counter()
            with self.models[one].enter() as model:
                results[one] = row.run(self.case, model, self.seed + turn)
            result = {"scores": stored.scores_to_record(results[one]), "seconds": time.perf_counter() - since}
            self.store.save(f"{name}-{one}", keys[one], result)
        if missing:
            self.clock.done(name, passes, time.perf_counter() - begun)
        found: Found = {}
        for one, scores in results.items():
            for entry in scores:
                found.setdefault(f"{entry.attack}.run{turn + 1}" if turn else entry.attack, {})[one] = entry
        # An attack that works on one of the two cannot be compared.
        return {attack: per for attack, per in found.items() if {EDITED, ORIGINAL} <= set(per)}

    def harms(self, lines: Thresholds) -> tuple[Measure, ...]:
        """Return what the edit costs."""
        key = {**self.key(EDITED, ORIGINAL), "limits": str(lines)}
        there = self.store.load("retention", key)
        if there is not None:
            return tuple(from_record(Measure, one, "retention") for one in there["measures"])
        before, after = self.models[ORIGINAL].enter, self.models[EDITED].enter
        case = self.case
        measures = retention(
            case.tokenizer, before, after, case.brief, case.texts, lines=lines, seed=self.seed
        )
        if hasattr(case.base, "generate"):
            measures += fluent(case.tokenizer, before, after, case.texts, seed=self.seed)
        self.store.save("retention", key, {"measures": [to_record(one) for one in measures]})
        return measures

    def kept(self, name: str, facts: Facts, lines: Thresholds) -> Measure:
        """Return what the edit costs on facts from elsewhere."""
        key = {**self.key(EDITED, ORIGINAL), "limits": str(lines), "facts": _digest(facts)}
        file = f"kept-{key['facts'][:8]}"
        there = self.store.load(file, key)
        if there is not None:
            return from_record(Measure, there["measure"], "kept")
        before, after = self.models[ORIGINAL].enter, self.models[EDITED].enter
        found = kept(self.case.tokenizer, before, after, facts, name=name, lines=lines, seed=self.seed)
        self.store.save(file, key, {"measure": to_record(found)})
        return found

    def familiar(self) -> Auc | None:
        """Return how well the likelihood of the edited model tells forgotten facts from decoys; None for too few."""
        questions = self.case.facts.questions("unseen") or self.case.facts.questions("seen")
        first = {q.fact: q for q in reversed(questions)}
        facts = self.case.facts.facts
        sides = [[q for i, q in first.items() if facts[i].role == role] for role in ("forget", "decoy")]
        if min(map(len, sides)) < FEWEST:
            return None
        with self.models[EDITED].enter() as model:
            said = [
                likelihoods(model, self.case.tokenizer, [(q.prompt, q.answer) for q in side], progress=False)
                for side in sides
            ]
        return next(one for one in membership(said[0], said[1], seed=self.seed) if one.name == "loss")


def _known(base: nn.Module, tokenizer: Any, facts: Facts) -> Facts:
    """Return the facts without those to be forgotten that the original does not know."""
    said = answers(base, tokenizer, facts, "seen", roles=("forget",), progress=False)
    right = said.per_fact(said.chosen)
    return facts.having(i for i, fact in enumerate(facts) if fact.role != "forget" or right.get(i, 0.0) > 0.5)


def _elsewhere(given: Kept | Sequence[Kept]) -> dict[str, Facts]:
    """Return kept facts by name."""
    several = [given] if isinstance(given, Facts | str | Path) else given
    found: dict[str, Facts] = {}
    for one in several:
        facts = one if isinstance(one, Facts) else read_kept(one)
        if facts.name in found:
            raise InputError(f"got two sets of facts to keep with the name {facts.name!r}; rename one.")
        found[facts.name] = facts
    return found


def _kept_words(facts: Facts) -> str:
    bare = sum(not f.distractors for f in facts)
    said = f", {bare} with other answers of the set as wrong options" if bare else ""
    return f"{facts.name} ({len(facts)} facts{said})"


def _digest(facts: Facts, texts: Sequence[str] = ()) -> str:
    """Return what identifies facts, their wordings and some texts."""
    wordings = {
        r: {form: list(texts) for form, texts in forms.items()} for r, forms in facts.templates.items()
    }
    rows = [(f.subject, f.relation, f.answer, f.distractors, f.role) for f in facts]
    state = json.dumps([rows, wordings, list(texts)])
    return hashlib.blake2b(state.encode(), digest_size=8).hexdigest()


def _brief(facts: Facts, most: int) -> Facts:
    """Return the same facts with fewer wordings of every form: what counts is facts, time goes by questions."""
    few = {
        relation: {form: wordings[:most] for form, wordings in forms.items()}
        for relation, forms in facts.templates.items()
    }
    return dataclasses.replace(facts, templates=few)


def _require_enough(facts: Facts, gold: bool) -> None:
    counts = {role: sum(f.role == role for f in facts) for role in ("forget", "decoy")}
    if counts["forget"] < 8:
        raise NotEnoughDataError(
            f"{facts.name!r} has {counts['forget']} facts to be forgotten that the original knows; at least 8 are needed, "
            "and 64 for a verdict with power."
        )
    if counts["decoy"] < 8 and not gold:
        raise InputError(
            f"{facts.name!r} has {counts['decoy']} decoys and there is no gold model; needed at least 8 facts of the role "
            "'decoy', which the model never knew, or a gold model: without a control no leak can be told from chance."
        )


def _refusals(bench: _Bench, level: str, wanted: bool | None) -> tuple[Check, ...]:
    tokenizer = bench.case.tokenizer
    if wanted is None:
        wanted = level != "quick" and bool(getattr(tokenizer, "chat_template", None))
    key = bench.key(EDITED, ORIGINAL)
    there = bench.store.load("refusal", key) if wanted else None
    if there is not None:
        return tuple(from_record(Check, one, "refusal") for one in there["checks"])
    if not wanted or not bench.clock.fits("refusal", 6.0):
        return ()
    counts = []
    for name in (ORIGINAL, EDITED):
        with bench.models[name].enter() as model:
            counts.append(refusals(model, tokenizer, progress=bench.progress))
    checks = compare_refusals(*counts, seed=bench.seed)
    bench.store.save("refusal", key, {"checks": [to_record(one) for one in checks]})
    return checks


def _control_leaks(
    found: Found, facts: Facts, plain: Mapping[str, Scores], lines: Thresholds, seed: int
) -> dict[str, tuple[Leak, ...]]:
    """Return what the random edit and the gold model leak under the same attacks, against the decoys in themselves."""
    result = {}
    for name in (RANDOM, GOLD):
        battery = []
        for attack in found.values():
            if name in attack and len(attack[name].indices(facts, "decoy")) >= 8:
                pair = {EDITED: attack[name], ORIGINAL: attack[ORIGINAL]}
                battery.append(
                    compared(
                        pair, facts, {EDITED: plain[name], ORIGINAL: plain[ORIGINAL]}, margin=lines.margin
                    )
                )
        if battery:
            result[name] = leaks(battery, seed=seed)
    return result


def _budget(level: str, clock: Budget, found: Found) -> str:
    runs = sorted({name for name in found if not name.startswith("behaviour")})
    return f"{level} level, {clock.words()}; {len(runs)} attacks: {', '.join(runs) or 'none'}"


def _not_attacked(rows: Sequence[Attack], clock: Budget, errors: Mapping[str, str], hook: bool) -> str:
    names = {row.name for row in rows}
    parts = [
        f"{row.name} (level {row.level})" for row in attacks.ATTACKS if row.name not in names and not hook
    ]
    parts += [f"{one}, no time" for one in clock.left_out]
    parts += [f"{name}: {why}" for name, why in errors.items()]
    if hook:
        parts.append("everything that reads or changes the model: whoever can do that drops the hook")
    parts.append(
        "other languages, longer adversarial prompts, and every question that is not among the facts"
    )
    return "; ".join(parts)


def _version() -> str:
    from importlib.metadata import version

    return version("repe-unlearn")


def _versions() -> str:
    import transformers

    return (
        f"repe-unlearn {_version()}, python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}"
    )
