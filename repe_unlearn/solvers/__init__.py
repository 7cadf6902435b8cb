"""Solvers: pure functions from Moments to an Eraser, one method per file, no model in sight."""

from .leace import leace
from .mean_difference import mean_difference
from .random import random

__all__ = ["leace", "mean_difference", "random"]
