"""Gradient baselines: what to forget and what to retain become a Patch."""

from repe_unlearn.facts import Sample

from .curvature import influence
from .fisher import fisher_dampening
from .loop import Run, Step, unlearn
from .losses import METHODS, Objective
from .samples import from_jsonl, from_pairs, from_texts
from .steer import rmu
from .trainee import mlp_writers

__all__ = [
    "METHODS",
    "Objective",
    "Run",
    "Sample",
    "Step",
    "fisher_dampening",
    "from_jsonl",
    "from_pairs",
    "from_texts",
    "influence",
    "mlp_writers",
    "rmu",
    "unlearn",
]
