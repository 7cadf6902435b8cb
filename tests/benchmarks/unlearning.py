"""What does each method forget, what does it keep, and what does it take? One table of all, in one run.

SmolLM2-135M, the capitals of Europe: every method gets the seen wordings only and is measured on unseen ones, next to other
capitals, other relations of the same countries and neutral text. Facts that the model does not know (in fewer than two
wordings) are left out. With `--tune` six settings of each method are run on seed 0 first, and the table uses the best of
each; without it, the settings of an earlier `--tune` in the same folder, or the defaults of `METHODS`. Whatever is in the
folder is not run again.

    python tests/benchmarks/unlearning.py --out unlearning-runs --tune
    python tests/benchmarks/unlearning.py --out unlearning-runs --methods closed_form,npo --seeds 0 --quick
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from _side_by_side import machine

from repe_unlearn import load
from repe_unlearn.answers import answers
from repe_unlearn.audit.neutral import NEUTRAL
from repe_unlearn.errors import InputError
from repe_unlearn.facts import Facts
from repe_unlearn.measured import Measured
from repe_unlearn.methods import METHODS
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
    "random": {"relative": [0.01, 0.02, 0.05, 0.1, 0.2, 0.5]},
}
_SHOWN = (
    "forget_seen", "forget_unseen", "margin", "retain", "neighbour", "kl", "relative", "touched", "seconds", "peak_bytes",
)  # fmt: skip


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options of both benchmarks."""
    result = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--methods", default=",".join(METHODS), help="comma-separated")
    result.add_argument("--seeds", default="0,1,2", help="comma-separated")
    result.add_argument(
        "--out", type=Path, default=Path("unlearning-runs"), help="folder for rows and points"
    )
    result.add_argument("--tune", action="store_true", help="six settings of each method on seed 0 first")
    result.add_argument("--every", type=int, default=1, help="only every n-th country of the capitals")
    result.add_argument("--quick", action="store_true", help="fewer facts and neutral texts, one seed")
    return result


def run(
    model: Any,
    tokenizer: Any,
    facts: Facts,
    args: argparse.Namespace,
    *,
    grids: Mapping[str, Mapping[str, Sequence[Any]]] = GRIDS,
    fixed: Mapping[str, Mapping[str, Any]] | None = None,
    texts: Sequence[str] = NEUTRAL,
    figure: Path | None = None,
) -> list[dict[str, Any]]:
    """Run all methods, print the table, write rows.json and the figure, and return the rows.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        facts: what the model knows.
        args: of ``parser``.
        grids: method -> option -> values, for ``--tune``.
        fixed: method -> options that differ from its defaults for this model.
        texts: neutral text.
        figure: SVG file to write.
    """
    seeds = [0] if args.quick else [int(seed) for seed in args.seeds.split(",")]
    found: list[dict[str, Any]] = []
    for name in args.methods.split(","):
        how = {"fixed": (fixed or {}).get(name), "folder": args.out, "texts": texts}
        chosen = args.out / f"{name}.settings.json"
        if args.tune:
            tried = sweep(model, tokenizer, facts, name, grids[name], seed=0, **how)
            chosen.write_text(json.dumps(dict(_best(tried).options)))
        options = json.loads(chosen.read_text()) if chosen.exists() else {}
        settings = {**METHODS[name].defaults, **(how["fixed"] or {}), **options}
        grid = {key: [value] for key, value in settings.items()} or {"layers": [None]}
        for seed in seeds:
            done = sweep(model, tokenizer, facts, name, grid, seed=seed, **how)
            point = done.points[0]
            if not found:
                found.append(_row("before", done.before, done.before, {}))
                print(machine("transformers"), f"\n{facts!r}\n")
                print(" ".join(f"{column:>13}" for column in ("method", "seed", *_SHOWN, "kept")))
                _print(found[0])
            if point.measured is None:
                print(f"{name:>13} {seed:>13} failed: {point.error}")
                continue
            found.append(_row(name, point.measured, done.before, settings))
            _print(found[-1])
    (args.out / "rows.json").write_text(json.dumps(found, indent=1, default=str) + "\n")
    if figure is not None:
        figure.write_text(draw(found))
    return found


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
            lambda n: n in ("influence", "fisher_dampening", "selective_pruning"),
        ),
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
    for i, (name, (x, y, kl)) in enumerate(sorted(means.items(), key=lambda pair: pair[1])):
        # Neighbours in the figure get their names on different sides.
        side = (
            {"xytext": (6, (4, -9)[i % 2]), "ha": "left"}
            if not 0.5 < x < 0.82
            else {"xytext": (-6, (-9, 5)[i % 2]), "ha": "right"}
        )
        ax.annotate(f"{name} ({kl:.2g})", (x, y), textcoords="offset points", fontsize=7, **side)
    best = front(means.values(), lambda m: (m[0], -m[1]))
    ax.plot(
        [m[0] for m in best],
        [m[1] for m in best],
        color="#8a9099",
        linewidth=1,
        zorder=1,
        label="none is better",
    )
    ax.set(xlim=(-0.03, 1.02), ylim=(-0.03, top))
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


def main() -> None:
    """Run the benchmark on the real model."""
    args = parser(__doc__).parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    loaded = load(dtype="float32", progress=False)
    facts = Facts.builtin("capitals", forget="Europe")
    # What must be kept: capitals of other continents, and all else about the countries of Europe.
    facts = facts.where(lambda f: f.role != "retain" or f.relation == "capital")
    subjects = sorted({f.subject for f in facts if f.role != "decoy"})[:: 3 if args.quick else args.every]
    facts = facts.where(lambda f: f.subject in subjects or f.role == "decoy")
    facts = answers(loaded.model, loaded.tokenizer, facts).known(2)
    texts = NEUTRAL[:6] if args.quick else NEUTRAL
    run(
        loaded.model,
        loaded.tokenizer,
        facts,
        args,
        texts=texts,
        figure=args.out / "quick.svg" if args.quick else FIGURE,
    )


if __name__ == "__main__":
    main()
