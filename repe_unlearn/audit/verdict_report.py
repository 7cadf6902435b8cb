"""From leaks and harms to a report: verdict first, then figures, tables and what is needed to repeat it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from repe_unlearn.audit.check import Check
from repe_unlearn.audit.controls import EDITED, GOLD, ORIGINAL, RANDOM
from repe_unlearn.audit.leak import Leak
from repe_unlearn.audit.membership import Auc
from repe_unlearn.audit.report import Report
from repe_unlearn.audit.scores import Scores
from repe_unlearn.audit.series import Series
from repe_unlearn.audit.verdict import ATTACKERS, NOT_RECOVERED, Measure, Thresholds, Verdict
from repe_unlearn.facts import Facts

LEAKS = "What comes back"
HARMS = "What the edit costs"
_SHOWN_MOST = 1.5  # leaks and harms beyond are drawn at the edge of their figure, the tables have the number

SENTENCES = {
    "NOT_FORGOTTEN": "The edited model still answers when it is asked.",
    "HIDDEN": "The edited model does not answer when it is asked, but an attack brings the knowledge back.",
    "INCONCLUSIVE": "Neither that the knowledge is still there nor that it is gone was shown.",
    "NOT_RECOVERED_AT_BUDGET": "None of the attacks brought the knowledge back, to within the margin.",
}
FLAGS = {
    "DAMAGED": "What should stay is damaged.",
    "OVERSHOOT": "The forgotten facts stand out as less likely than facts that the model never knew.",
}


def report(
    said: Verdict,
    asked: Sequence[Leak],
    tried: Sequence[Leak],
    harms: Sequence[Measure],
    refusals: Sequence[Check] = (),
    membership: Auc | None = None,
    *,
    controls: Mapping[str, Sequence[Leak]],
    found: Mapping[str, Mapping[str, Scores]],
    facts: Facts,
    lines: Thresholds,
    details: Mapping[str, str],
) -> Report:
    """Return the report of an audit.

    Args:
        said: the verdict.
        asked: leaks of plain questions.
        tried: leaks of attacks.
        harms: what the edit costs.
        refusals: checks of refusals.
        membership: how well texts about forgotten facts are told from those about decoys.
        controls: name of a control model -> its leaks under the same attacks.
        found: attack -> model -> scores, for curves and settings.
        facts: what was asked.
        lines: of the verdict.
        details: facts of the run.
    """
    random = {one.name: one.value for one in controls.get(RANDOM, ()) if not one.invalid}
    checks = [_overall(said, lines)]
    checks += [_leak(one, lines, random.get(one.name), found[one.name]) for one in (*asked, *tried)]
    checks += [_harm(one, lines) for one in harms]
    if membership is not None:
        checks.append(dataclasses.replace(membership.check(width=lines.auc), passed=None, bound=""))
    checks += refusals
    words = " ".join((SENTENCES[said.name], *(FLAGS[flag] for flag in said.flags)))
    series = (*_forest([*asked, *tried], controls, lines), *_curves(found), *_costs(harms))
    return Report(
        title=f"Audit: {facts.name}",
        subtitle=f"Attacker who {ATTACKERS[said.tier]}. Budget: {said.budget}.",
        checks=tuple(checks),
        series=series,
        facts={
            "verdict": " + ".join((said.name, *said.flags)),
            "attacker": ATTACKERS[said.tier],
            "budget": said.budget,
            "why": "\n".join(said.reasons),
            **details,
        },
        verdict=words,
    )


def _overall(said: Verdict, lines: Thresholds) -> Check:
    note = f"Leak of the attack that got out the most ({said.worst}), with bounds that hold for all attacks together."
    known = math.isfinite(said.worst_value)
    return Check(
        "verdict",
        said.worst_value,
        f"{NOT_RECOVERED}, no flag",
        said.name == NOT_RECOVERED and not said.flags and known,
        low=said.worst_low if known else None,
        high=said.worst_high if known else None,
        note=note if known else "No attack is valid.",
    )


def _leak(one: Leak, lines: Thresholds, random: float | None, scores: Mapping[str, Scores]) -> Check:
    settings = "; ".join(f"{key}: {value}" for key, value in scores[EDITED].facts.items() if len(value) < 90)
    unit = scores[EDITED].unit
    level = f"edited {one.edited:.2f}, original {one.original:.2f}, without the knowledge {one.control:.2f} {unit}"
    if one.invalid:
        return Check.information(
            f"leak.{one.name}", math.nan, note=f"Not counted: {one.invalid}. {level}. {settings}"
        )
    shown, absent = one.floor > lines.margin, one.most < lines.margin
    enough = one.units >= lines.facts
    note = (
        f"T{one.tier}, {one.facts} facts, {one.controls} controls; {level}. Bounds {one.floor:.2f} (all attacks together) "
        f"and {one.most:.2f}; Holm p {one.p_holm:.2g}; chance of showing absence {one.power(lines.margin):.0%}. {settings}"
    )
    return Check(
        f"leak.{one.name}",
        one.value,
        f"<= {lines.margin:g}",
        (False if shown else True if absent else None) if enough else None,
        control=random,
        low=min(one.low, one.high),
        high=max(one.low, one.high),
        note=note,
    )


def limit_of(harm: Measure, lines: Thresholds) -> float:
    """Return the harm that counts as damage."""
    return harm.limit if harm.limit is not None else float(getattr(lines, harm.name))


def _harm(harm: Measure, lines: Thresholds) -> Check:
    limit = limit_of(harm, lines)
    passed = False if harm.low > limit else True if harm.high <= limit else None
    return Check(f"cost.{harm.name}", harm.value, f"<= {limit:g}", passed, low=harm.low, high=harm.high)


def _cut(value: float) -> float:
    return value if math.isnan(value) else max(-_SHOWN_MOST, min(_SHOWN_MOST, value))


def _forest(
    edited: Sequence[Leak], controls: Mapping[str, Sequence[Leak]], lines: Thresholds
) -> tuple[Series, ...]:
    rows = {one.name: float(i) for i, one in enumerate(one for one in edited if not one.invalid)}
    caption = (
        "Share of the original's knowledge that each attack gets out, with 95 % intervals; 0 is a model that never knew, 1 the "
        "original. A random edit of equal size tells what size alone does. Attacks that were not counted are in the table."
    )
    result = []
    for label, leaks in (
        ("edited", edited),
        *((name, controls[name]) for name in (RANDOM, GOLD) if name in controls),
    ):
        valid = [one for one in leaks if one.name in rows and not one.invalid]
        if valid:
            result.append(
                Series(
                    LEAKS,
                    label,
                    x=tuple(rows[one.name] for one in valid),
                    y=tuple(_cut(one.value) for one in valid),
                    low=tuple(_cut(one.low) for one in valid),
                    high=tuple(_cut(one.high) for one in valid),
                    y_label="leak (share of the original's knowledge)",
                    chance=lines.margin,
                    rows=tuple(one.name for one in valid),
                    caption=caption,
                )
            )
    return tuple(result)


def _costs(harms: Sequence[Measure]) -> tuple[Series, ...]:
    if not harms:
        return ()
    lines = Thresholds()
    limits = [limit_of(one, lines) for one in harms]
    cut = [
        [min(max(v / limit, -1.0), 4.0) for v in (one.value, one.low, one.high)]
        for one, limit in zip(harms, limits, strict=True)
    ]
    return (
        Series(
            HARMS,
            "edited",
            x=tuple(float(i) for i in range(len(harms))),
            y=tuple(one[0] for one in cut),
            low=tuple(one[1] for one in cut),
            high=tuple(one[2] for one in cut),
            y_label="harm, as a multiple of its limit (cut at 4)",
            chance=1.0,
            rows=tuple(f"{one.name}: {one.value:.3g}" for one in harms),
            caption="Harm to what should stay, with 95 % intervals over facts or texts. Beyond the dashed line it is damage.",
        ),
    )


def _curves(found: Mapping[str, Mapping[str, Scores]]) -> tuple[Series, ...]:
    """Return the curves of the attacks, one line per model on what is to be forgotten, and the decoys of the edited."""
    names = {EDITED: "edited", ORIGINAL: "original", RANDOM: "random edit", GOLD: "gold"}
    result = []
    for models in found.values():
        for name in (ORIGINAL, RANDOM, GOLD, EDITED):
            for one in models[name].curves if name in models else ():
                decoys = one.label.startswith("decoy")
                if (decoys and name != EDITED) or one.label in ("retain", "neighbour"):
                    continue
                label = "decoys" if decoys else names[name]
                rows, points = (one.point_labels, ()) if one.marker_only else (one.rows, one.point_labels)
                result.append(
                    dataclasses.replace(one, label=label, rows=rows, point_labels=points, chance=None)
                )
    return tuple(result)
