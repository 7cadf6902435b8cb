"""Solvers: pure functions from Moments to an Eraser, one method per file, no model in sight.

``inlp``, ``rlace`` and ``second_order`` need the rows themselves, ``(x [n, d], z [n])``: what they compute is not a
function of Moments.
"""

from .inlp import inlp
from .joint import joint, shared
from .leace import leace, leace_many
from .mean_difference import mean_difference
from .oracle import OracleEraser, oracle
from .pca import pca
from .quadratic import QuadraticEraser, quadratic
from .random import random
from .rlace import Game, rlace, rlace_game
from .second_order import second_order
from .splince import splince
from .subspace import subspace

__all__ = [
    "Game",
    "OracleEraser",
    "QuadraticEraser",
    "inlp",
    "joint",
    "leace",
    "leace_many",
    "mean_difference",
    "oracle",
    "pca",
    "quadratic",
    "random",
    "rlace",
    "rlace_game",
    "second_order",
    "shared",
    "splince",
    "subspace",
]
