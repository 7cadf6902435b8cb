"""Data whose answer is known: activations with a planted concept, and texts whose words give their class away."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import torch
from torch import Tensor

from repe_unlearn.activations import Rows
from repe_unlearn.contrast import Contrast

SOUNDS = {"bee": ("bzzzzz", "zzzzz", "fzzzzzz"), "cat": ("purrrr", "mrrrrr", "hrrrrrr")}
NEUTRAL = ("The river is wide and slow here.", "Two bells rang at six.", "Snow fell on the hills.")

_PEOPLE = (
    "Ann", "Bob", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hal", "Ida", "Jon", "Kay", "Lou", "Mia", "Ned", "Olga", "Pia",
    "Quin", "Ray", "Sue", "Tom",
)  # fmt: skip
_FRAMES = (
    "{} hears {}",
    "{1} is what {0} got",
    "now {} said {}",
    "so {1} woke {0}",
    "{} made it {}",
    "a {1} near {0}",
)


def numbered(n: int, groups: int = 16) -> Contrast:
    """Return n pairs of two classes in a number of content groups; the texts themselves say nothing."""
    return Contrast.from_pairs(
        [(f"a{i}", f"b{i}") for i in range(n)], groups=[f"group {i % groups}" for i in range(n)]
    )


def planted(n: int = 150, d: int = 12, *, strength: float = 6.0, seed: int = 0) -> tuple[Contrast, Rows]:
    """Return pairs and activations in which class 1 is moved along one direction.

    The two members of a pair share their content, the larger part of the variance, as real minimal pairs do.
    """
    contrast = numbered(n)
    generator = torch.Generator().manual_seed(seed)
    z = torch.tensor(contrast.labels)
    x = torch.randn(n, d, generator=generator).repeat_interleave(2, 0)
    x = x + 0.5 * torch.randn(2 * n, d, generator=generator) + strength * z[:, None] * direction(d)
    return contrast, Rows(x, z, torch.arange(2 * n))


def direction(d: int) -> Tensor:
    """Return a unit vector that is no axis."""
    return torch.nn.functional.normalize(torch.arange(1.0, d + 1), dim=0)


def sounds() -> list[dict[str, str]]:
    """Return 360 minimal pairs (bee or cat) as rows of a file: 20 contents in 6 wordings, 3 words each."""
    rows = []
    for (i, who), (j, frame) in itertools.product(enumerate(_PEOPLE), enumerate(_FRAMES)):
        for k in range(3):
            for label, words in SOUNDS.items():
                rows.append(
                    {
                        "text": frame.format(who, words[k]),
                        "label": label,
                        "group": who,
                        "template": f"frame {j}",
                        "pair": f"{i}.{j}.{k}",
                    }
                )
    return rows


def spoken() -> Contrast:
    """Return the same pairs as a contrast."""
    rows = sounds()
    column = {key: [row[key] for row in rows] for key in rows[0]}
    return Contrast.from_labels(
        column["text"],
        column["label"],
        groups=column["group"],
        templates=column["template"],
        pairs=column["pair"],
        name="sounds",
    )


def jsonl(path: Path, rows: list[dict[str, str]]) -> Path:
    """Write one JSON object per line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
