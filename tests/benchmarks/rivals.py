"""How much of a direction do the published rules of other tools leave in what sublayers write, and how much does ours?

The rules are those of tests/rivalkit.py, restated; the models are tiny ones with random weights, so that the figures show
which rule is exact, not what a certain checkpoint would lose.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from _side_by_side import machine

sys.path.insert(0, str(Path(__file__).parents[1]))


def main() -> None:
    """Print the table."""
    from rivalkit import FUSED, POST_NORM, by_suffix, left, ours, row_renormalising

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", nargs="+", default=[*FUSED, *POST_NORM], help="families of tests/tiny.py")
    args = parser.parse_args()
    print(machine())
    print("\nworst layer, attention / MLP; 1 is all of the component\n")
    print("| family | row-renormalising rule | suffix rule | bake |")
    print("|---|---|---|---|")
    for model_type in args.models:
        found = [left(model_type, rule) for rule in (row_renormalising, by_suffix, ours)]
        cells = [f"{kinds['attn_out']:.2g} / {kinds['mlp_out']:.2g}" for kinds in found]
        print(f"| {model_type} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
