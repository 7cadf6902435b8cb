"""What does each method forget, what does it keep, and what does it take? One table of all, in one run.

SmolLM2-135M, the capitals of Europe: every method gets the seen wordings only and is measured on unseen ones, next to other
capitals, other relations of the same countries and neutral text. Facts that the model does not know (in fewer than two
wordings) are left out. A seed draws the countries (with `--every`) and whatever a method leaves to chance. With `--tune`
six settings of each method are run on seed 0 first, and the table uses the best of each; without it, the settings of an
earlier `--tune` in the same folder, or the defaults of `METHODS`. Whatever is in the folder is not run again.

    python tests/benchmarks/unlearning.py --out unlearning-runs --every 2 --tune
    python tests/benchmarks/unlearning.py --out unlearning-runs --methods closed_form,npo --seeds 0 --quick
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from _side_by_side import machine

from repe_unlearn import Contrast, apply, load
from repe_unlearn.answers import answers
from repe_unlearn.audit.neutral import NEUTRAL
from repe_unlearn.errors import InputError
from repe_unlearn.facts import Facts
from repe_unlearn.measured import Effort, Measured, measure
from repe_unlearn.methods import METHODS
from repe_unlearn.steering import SteeringPlan, fact_gate, steer_by_means, steer_to_random
from repe_unlearn.sweep import Point, Sweep, front, sweep

FIGURE = Path(__file__).parents[2] / "docs" / "figures" / "unlearning-pareto.svg"

# Six settings of each: equal effort.
GRIDS: Mapping[str, Mapping[str, Sequence[Any]]] = {
    **{
        name: {"ridge": [3.0, 14.0], "beta": [3.0, 10.0, 30.0]}
        for name in METHODS
        if name.startswith("closed_form")
    },
    "rmu": {"lr": [3e-4, 1e-3, 3e-3], "alpha": [10.0, 100.0]},
    "rmu_adaptive": {"lr": [3e-4, 1e-3, 3e-3], "alpha": [10.0, 100.0]},
    "grad_ascent": {"lr": [1e-5, 3e-5, 1e-4], "steps": [5, 10]},
    "grad_diff": {"lr": [3e-5, 1e-4, 3e-4], "steps": [20, 40]},
    "npo": {"lr": [3e-5, 1e-4, 3e-4], "steps": [20, 40]},
    "simnpo": {"lr": [3e-5, 1e-4, 3e-4], "gamma": [0.125, 1.0]},
    "influence": {"gain": [0.3, 1.0, 4.0], "damping": [0.1, 1.0]},
    "fisher_dampening": {"alpha": [1.0, 3.0, 10.0], "bound": [0.3, 1.0]},
    "selective_pruning": {"fraction": [0.001, 0.002, 0.005, 0.01, 0.02, 0.03]},
    "neuron_suppression": {"count": [30, 100, 300], "scale": [0.0, 1.0]},
    "head_suppression": {"count": [3, 10, 30], "scale": [0.0, 1.0]},
    "random": {"relative": [0.01, 0.02, 0.05, 0.1, 0.2, 0.5]},
}
_SHOWN = (
    "forget_seen", "forget_unseen", "forget_chosen", "margin", "retain", "neighbour", "kl", "relative", "touched",
    "seconds", "peak_bytes",
)  # fmt: skip


class Subject(NamedTuple):
    """What the methods are run on: a model, what it knows, neutral text, and options that suit this model.

    ``fixed`` is method -> options that differ from its defaults, ``hooks`` name -> seed -> a plan that acts while the model runs.
    """

    model: Any
    tokenizer: Any
    facts: Facts
    texts: Sequence[str] = NEUTRAL
    fixed: Mapping[str, Mapping[str, Any]] = {}
    hooks: Mapping[str, Callable[[int], SteeringPlan]] = {}


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options of both benchmarks."""
    result = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--methods", default=",".join(METHODS), help="comma-separated")
    result.add_argument("--seeds", default="0,1,2", help="comma-separated")
    result.add_argument(
        "--out", type=Path, default=Path("unlearning-runs"), help="folder for rows and points"
    )
    result.add_argument(
        "--tune", action="store_true", help="six settings of each method on the first seed first"
    )
    result.add_argument("--tuned", default=",".join(METHODS), help="which methods --tune is about")
    result.add_argument(
        "--every", type=int, default=1, help="one in n countries of the capitals, drawn by the seed"
    )
    result.add_argument("--quick", action="store_true", help="fewer facts and neutral texts, one seed")
    return result


def run(
    subject: Callable[[int], Subject],
    args: argparse.Namespace,
    grids: Mapping[str, Mapping[str, Sequence[Any]]],
    figure: Path,
) -> list[dict[str, Any]]:
    """Run all methods, print the rows and the table, write rows.json and the figure, and return the rows.

    Args:
        subject: seed -> what the methods are run on.
        args: of ``parser``.
        grids: method -> option -> values, for ``--tune``.
        figure: SVG file to write.
    """
    seeds = [0] if args.quick else [int(seed) for seed in args.seeds.split(",")]
    print(machine("transformers"))
    found: list[dict[str, Any]] = []
    for seed in seeds:
        it = subject(seed)
        print(f"\n{it.facts!r}\n")
        print(" ".join(f"{column:>13}" for column in ("method", "seed", *_SHOWN, "kept")))
        for name in args.methods.split(","):
            how = {"fixed": it.fixed.get(name), "folder": args.out, "texts": it.texts}
            chosen = args.out / f"{name}.settings.json"
            if args.tune and seed == seeds[0] and name in args.tuned.split(","):
                tried = sweep(*it[:3], name, grids[name], seed=seed, **how)
                chosen.write_text(json.dumps(dict(_best(tried).options)))
            options = json.loads(chosen.read_text()) if chosen.exists() else {}
            settings = {**METHODS[name].defaults, **(how["fixed"] or {}), **options}
            grid = {key: [value] for key, value in settings.items()} or {"layers": [None]}
            done = sweep(*it[:3], name, grid, seed=seed, **how)
            point = done.points[0]
            if not any(row["seed"] == seed for row in found):
                found.append({**_row("before", done.before, done.before, {}), "seed": seed})
                _print(found[-1])
            if point.measured is None:
                print(f"{name:>13} {seed:>13} failed: {point.error}")
                continue
            found.append(_row(name, point.measured, done.before, settings))
            _print(found[-1])
        before = next((row for row in found if row["seed"] == seed), None)
        for name, make in it.hooks.items() if before else ():
            row = _hooked(it, name, make, seed, args.out)
            found.append(
                {**_row(name, row, Measured(retain=before["retain"], neighbour=before["neighbour"]), {})}
            )
            _print(found[-1])
    (args.out / "rows.json").write_text(json.dumps(found, indent=1, default=str) + "\n")
    figure.write_text(draw(found))
    print(table(found))
    return found


def _hooked(it: Subject, name: str, make: Callable[[int], SteeringPlan], seed: int, folder: Path) -> Measured:
    """Return what a plan does, from the folder if it is there."""
    file = folder / f"{name}.{seed}.json"
    if not file.exists():
        began = time.perf_counter()
        plan = make(seed)
        spent = Effort(time.perf_counter() - began)
        measured = measure(
            *it[:3], lambda: apply(it.model, plan), texts=it.texts, method=name, seed=seed, effort=spent
        )
        file.write_text(measured.to_json())
    return Measured.from_json(file.read_text())


def steering(model: Any, tokenizer: Any, facts: Facts) -> Mapping[str, Callable[[int], SteeringPlan]]:
    """Return steering behind a gate that fires after what is to be forgotten: to a random vector, and by means (CAA)."""

    def gate() -> Any:
        return fact_gate(model, tokenizer, facts, 10, progress=False)

    def away(seed: int) -> SteeringPlan:
        asked = {
            "forget": [q.prompt for q in facts.questions("seen", roles=["forget"])],
            "keep": [q.prompt for q in facts.questions("seen", roles=["retain", "neighbour"])],
        }
        contrast = Contrast.from_classes(asked, name=facts.name)
        return steer_by_means(model, tokenizer, contrast, [20], coefficient=2.0, gate=gate(), progress=False)

    return {
        "steer_to_random": lambda seed: steer_to_random(
            model, tokenizer, facts, [10], gate(), seed=seed, progress=False
        ),
        "steer_by_means": away,
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a Markdown table: the mean over seeds, and the range where it matters and there is one."""
    lines = [
        "| method | seeds | forget, seen | forget | of four answers | margin | retain | neighbours | smaller share kept "
        "| KL, nats | size over all / over edited weights | s | peak GiB |",
        "|" + "---|" * 13,
    ]
    for name in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == name]

        def cell(column: str, digits: int = 2, *, spread: bool = False, rows: Any = mine) -> str:
            values = [row[column] for row in rows if row[column] is not None]
            if not values:
                return "–"
            text = f"{sum(values) / len(values):.{digits}f}"
            low, high = (f"{f(values):.{digits}f}" for f in (min, max))
            return f"{text} ({low} to {high})" if spread and low != high else text

        peaks = [row["peak_bytes"] for row in mine if row["peak_bytes"]]
        cells = (
            f"`{name}`" if name in METHODS else name,
            str(len(mine)),
            cell("forget_seen"),
            cell("forget_unseen", spread=True),
            cell("forget_chosen"),
            cell("margin", 1),
            cell("retain"),
            cell("neighbour"),
            cell("kept", spread=True),
            cell("kl", 3),
            f"{cell('relative', 3)} / {cell('touched', 3)}",
            cell("seconds", 0),
            f"{max(peaks) / 2**30:.1f}" if peaks else "–",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _best(tried: Sweep) -> Point:
    """Return the best point within the goals, or else the one that is best by the sum of what it misses."""
    try:
        return tried.best()
    except InputError:
        done = [(p, p.measured) for p in tried.points if p.measured is not None]
        if not done:
            raise

        def missed(m: Measured) -> float:
            kept = m.kept(tried.before)
            return max(0.0, m.forget_unseen - 0.15) + max(0.0, 0.9 - kept) + max(0.0, m.kl - 0.05)

        return min(done, key=lambda pair: missed(pair[1]))[0]


def _row(name: str, m: Measured, before: Measured, settings: Mapping[str, Any]) -> dict[str, Any]:
    numbers = {column: None if math.isnan(getattr(m, column)) else getattr(m, column) for column in _SHOWN}
    shown = {key: value for key, value in settings.items() if key != "texts"}
    return {"method": name, "seed": m.seed, "settings": shown, **numbers, "kept": m.kept(before)}


def _print(row: Mapping[str, Any]) -> None:
    cells = [row[column] for column in (*_SHOWN, "kept")]
    texts = ["" if cell is None else f"{cell:.3g}" for cell in cells]
    print(" ".join(f"{text:>13}" for text in (row["method"], row["seed"], *texts)), flush=True)


def draw(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return an SVG of forget accuracy against what is kept: a mark per method, at the mean of its seeds."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    from repe_unlearn.audit.figures import to_svg

    means: dict[str, tuple[float, float, float]] = {}
    for name in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == name]
        means[name] = tuple(sum(row[c] for row in mine) / len(mine) for c in ("forget_unseen", "kept", "kl"))  # type: ignore[assignment]  # three
    # Okabe and Ito's colours, and a shape for each class: neither alone has to be told apart.
    kinds = {
        "closed form": ("#0072B2", "o", lambda n: n.startswith("closed_form")),
        "gradient": (
            "#D55E00",
            "s",
            lambda n: n in ("rmu", "rmu_adaptive", "npo", "simnpo") or n.startswith("grad_"),
        ),
        "one step or none": (
            "#009E73",
            "D",
            lambda n: (
                n in ("influence", "fisher_dampening", "selective_pruning") or n.endswith("_suppression")
            ),
        ),
        "hook behind a gate": ("#CC79A7", "^", lambda n: n.startswith("steer_")),
        "no edit, random edit": ("#333333", "X", lambda n: n in ("before", "random")),
    }
    fig, ax = plt.subplots(figsize=(7.2, 4.6), layout="constrained")
    top = max(1.08, 0.07 + max(kept for _, kept, _ in means.values()))
    goal = mpl.patches.Rectangle((-0.03, 0.9), 0.18, top - 0.9, color="#0072B2", alpha=0.08, linewidth=0)
    ax.add_patch(goal)
    for label, (colour, marker, has) in kinds.items():
        mine = {n: m for n, m in means.items() if has(n)}
        if mine:
            xs, ys, _ = zip(*mine.values(), strict=True)
            ax.scatter(
                xs,
                ys,
                c=colour,
                marker=marker,
                s=46,
                label=label,
                edgecolors="white",
                linewidths=0.6,
                zorder=3,
            )
    _name(ax, {f"{name} ({kl:.2g})": (x, y) for name, (x, y, kl) in means.items()})
    best = front(means.values(), lambda m: (m[0], -m[1]))
    ax.plot(
        [m[0] for m in best],
        [m[1] for m in best],
        color="#8a9099",
        linewidth=1,
        zorder=1,
        label="none is better",
    )
    ax.set(xlim=(-0.03, 1.02), ylim=(-0.16, top))
    ax.set_xlabel("accuracy on what is to be forgotten, unseen wordings")
    ax.set_ylabel("kept of retain and neighbours, smaller share of before")
    ax.axhline(1.0, color="#8a9099", linewidth=0.6, linestyle=":", zorder=0)
    ax.set_title(
        "Forgotten and kept; in brackets KL on neutral text, nats per token", loc="left", fontsize=10
    )
    ax.grid(color="#e6e8eb")
    ax.legend(loc="lower right", fontsize=8, frameon=False)
    text = to_svg(fig)
    plt.close(fig)
    return text


def _name(ax: Any, marks: Mapping[str, tuple[float, float]]) -> None:
    """Write names beside marks, each at the first of some places where it covers no other name and no mark."""
    from matplotlib.transforms import Bbox

    renderer = ax.figure.canvas.get_renderer()
    ax.figure.draw_without_rendering()
    points = ax.transData.transform(list(marks.values()))
    taken = [Bbox.from_bounds(x - 4, y - 4, 8, 8) for x, y in points]
    frame = ax.get_window_extent()
    for name, at in sorted(marks.items(), key=lambda pair: (-pair[1][1], pair[1][0])):
        for dy in (0, 9, -9, 18, -18, 27, -27, 36, -36):
            for dx, side in ((7, "left"), (-7, "right")):
                text = ax.annotate(
                    name, at, (dx, dy), textcoords="offset points", fontsize=7, ha=side, va="center"
                )
                box = text.get_window_extent(renderer)
                if frame.x0 <= box.x0 and box.x1 <= frame.x1 and not box.count_overlaps(taken):
                    break
                text.remove()
            else:
                continue
            break
        else:
            continue  # no place is left; the table has it
        taken.append(box)


def main() -> None:
    """Run the benchmark on the real model."""
    args = parser(__doc__).parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    loaded = load(dtype="float32", progress=False)
    facts = Facts.builtin("capitals", forget="Europe")
    # What must be kept: capitals of other continents, and all else about the countries of Europe.
    facts = facts.where(lambda f: f.role != "retain" or f.relation == "capital")
    subjects = sorted({f.subject for f in facts if f.role != "decoy"})
    texts = NEUTRAL[:6] if args.quick else NEUTRAL
    share = 3 if args.quick else args.every

    def subject(seed: int) -> Subject:
        drawn = random.Random(seed).sample(subjects, -(-len(subjects) // share))
        mine = facts.where(lambda f: f.subject in drawn or f.role == "decoy")
        known = answers(loaded.model, loaded.tokenizer, mine, progress=False).known(2)
        hooks = steering(loaded.model, loaded.tokenizer, known)
        return Subject(loaded.model, loaded.tokenizer, known, texts, hooks=hooks)

    run(subject, args, GRIDS, args.out / "quick.svg" if args.quick else FIGURE)


if __name__ == "__main__":
    main()
