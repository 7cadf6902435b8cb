"""The table of unlearning.py on planted facts: a small model is taught them here, so what it knows is known exactly.

The facts are about people who do not exist, answers are balanced and independent, and each relation has eight answers: an
accuracy of 1/8 is chance. The model (four layers, width 96) is trained once, in about a minute, and kept on disk. The last
row is the model that was never taught what is to be forgotten.

    python tests/benchmarks/planted.py --out planted-runs --tune
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from plantedkit import gold_model, neutral_text, planted_model
from unlearning import Subject, _print, _row, parser, run

from repe_unlearn.facts import Facts
from repe_unlearn.measured import measure
from repe_unlearn.methods import METHODS

# What suits a model of four layers: larger learning rates, smaller ridges.
FIXED = {
    **{
        name: {"layers": [1, 2, 3], "alpha": 1.0, "ridge": 0.1}
        for name in METHODS
        if name.startswith("closed_form")
    },
    **{name: {"layer": 2, "steps": 60, "lr": 1e-2, "alpha": 10.0} for name in ("rmu", "rmu_adaptive")},
    **{name: {"lr": 1e-3} for name in ("grad_ascent", "grad_diff", "npo", "simnpo")},
    "influence": {"gain": 0.01},
}
_CLOSED = {"ridge": [0.03, 0.1, 1.0], "beta": [1.0, 10.0]}
GRIDS = {
    **{name: _CLOSED for name in METHODS if name.startswith("closed_form")},
    "rmu": {"lr": [1e-3, 3e-3, 1e-2], "alpha": [10.0, 100.0]},
    "rmu_adaptive": {"lr": [1e-3, 3e-3, 1e-2], "alpha": [10.0, 100.0]},
    "grad_ascent": {"lr": [3e-4, 1e-3, 3e-3], "steps": [5, 10]},
    "grad_diff": {"lr": [3e-4, 1e-3, 3e-3], "steps": [20, 40]},
    "npo": {"lr": [3e-4, 1e-3, 3e-3], "steps": [20, 40]},
    "simnpo": {"lr": [3e-4, 1e-3, 3e-3], "gamma": [0.125, 1.0]},
    "influence": {"gain": [0.003, 0.01, 0.03], "damping": [0.1, 1.0]},
    "fisher_dampening": {"alpha": [0.3, 1.0, 3.0], "bound": [0.1, 0.5]},
    "selective_pruning": {"fraction": [0.01, 0.03, 0.06, 0.1, 0.2, 0.3]},
    "neuron_suppression": {"count": [10, 30, 100], "scale": [0.0, 1.0]},
    "head_suppression": {"count": [1, 2, 4], "scale": [0.0, 1.0]},
    "random": {"relative": [0.02, 0.1, 0.3, 0.6, 1.0, 2.0]},
}


def main() -> None:
    """Run the benchmark on small models, one per seed."""
    args = parser(__doc__).parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    few = {"forget": 12, "retain": 24, "decoys": 8} if args.quick else {}

    def subject(seed: int) -> Subject:
        facts = Facts.builtin("planted", neighbours=1, seed=seed, **few)
        texts = neutral_text(facts)[:: 4 if args.quick else 1]
        model, tokenizer = planted_model(facts, seed=seed)
        fixed = {name: {**how, "texts": texts} if "ridge" in how else how for name, how in FIXED.items()}
        return Subject(model, tokenizer, facts, texts, fixed)

    for seed in dict.fromkeys(row["seed"] for row in run(subject, args, GRIDS, args.out / "pareto.svg")):
        it = subject(seed)
        gold = gold_model(it.facts, seed=seed)[0]
        before, never = (
            measure(model, it.tokenizer, it.facts, texts=it.texts[:1], method=name, seed=seed, progress=False)
            for name, model in (("before", it.model), ("never knew", gold))
        )
        _print(_row("never knew", never, before, {}))


if __name__ == "__main__":
    main()
