"""Does what `foresee` says of a layer tell what an edit of that layer does?

SmolLM2-135M, the capitals of Europe: every block by itself is edited in closed form (its MLP, with the alpha that is
foreseen for it), and the model is asked. If the spectrum is right about where an answer is written, blocks that reach far
take much of the margin, and the others nothing.

    python tests/benchmarks/foreseen.py
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from _side_by_side import machine
from scipy.stats import pearsonr

from repe_unlearn import foresee, load
from repe_unlearn.answers import answers
from repe_unlearn.closed_form import closed_form
from repe_unlearn.facts import Facts
from repe_unlearn.measured import patched


def measured(layers: Sequence[int], region: str) -> list[dict[str, float]]:
    """Return what is foreseen of every layer, and what its edit does to the margin of what is to be forgotten."""
    loaded = load(dtype="float32", progress=False)
    model, tokenizer = loaded.model, loaded.tokenizer
    facts = Facts.builtin("capitals", forget=region)
    facts = facts.where(lambda f: f.role != "retain" or f.relation == "capital")
    facts = answers(model, tokenizer, facts, progress=False).known(2)
    print(machine("transformers"), repr(facts), sep="\n", flush=True)
    outlook = foresee(model, tokenizer, facts, layers=layers, progress=False)
    rows = {row["layer"]: row for row in outlook.rows()}

    def margins() -> dict[str, float]:
        said = answers(model, tokenizer, facts, roles=["forget"], progress=False)
        return {form: said.mean(said.margin, "forget", form=form) for form in ("seen", "unseen")}  # type: ignore[arg-type]

    before = margins()
    print(f"before: margin {before['seen']:.2f} seen, {before['unseen']:.2f} unseen; {outlook!r}")
    print(f"{'layer':>5} {'alpha':>6} {'taken':>6} {'wanted':>7} {'reach':>7} {'seen':>7} {'unseen':>7}")
    found = []
    for layer in layers:
        if layer not in rows:
            continue
        row = rows[layer]
        patch = closed_form(
            model, tokenizer, facts, layers=[layer], writers=["mlp_out"], alpha=row["alpha"], progress=False
        )
        with patched(model, patch):
            after = margins()
        found.append(
            {
                "layer": layer,
                "alpha": row["alpha"],
                "taken": 1 - row["remaining"],
                "wanted": row["wanted"],
                "reach": row["reach"],
                **{form: before[form] - after[form] for form in before},
            }
        )
        print(
            f"{layer:>5} {row['alpha']:>6.2g} {1 - row['remaining']:>6.2f} {row['wanted']:>7.4f} {row['reach']:>7.4f} "
            f"{found[-1]['seen']:>7.2f} {found[-1]['unseen']:>7.2f}",
            flush=True,
        )
    for name in ("reach", "taken"):
        r = pearsonr([row[name] for row in found], [row["unseen"] for row in found]).statistic
        print(f"correlation of {name} with the margin that is lost in unseen wordings: {r:.2f}")
    return found


def main() -> None:
    """Run it on the real model."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", nargs="+", type=int, default=range(30))
    parser.add_argument("--forget", default="Europe", help="which capitals")
    parser.add_argument("--out", type=Path, help="JSON file for the rows")
    args = parser.parse_args()
    rows = measured(args.layers, args.forget)
    if args.out:
        args.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
