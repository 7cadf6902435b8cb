"""Solvers: pure functions from Moments to an Eraser, one method per file, no model in sight.

``ridge_edit`` returns an ``Edit`` of a weight in place of an ``Eraser``.

``inlp``, ``rlace`` and ``second_order`` need the rows themselves, ``(x [n, d], z [n])``: what they compute is not a
function of Moments.
"""

from . import targets
from .inlp import inlp
from .joint import joint, shared
from .leace import leace, leace_many
from .mean_difference import mean_difference
from .oracle import OracleEraser, oracle
from .pca import pca
from .quadratic import QuadraticEraser, quadratic
from .random import random
from .ridge_edit import RidgeFactor, ridge_edit
from .rlace import Game, rlace, rlace_game
from .second_order import second_order
from .spectrum import (
    Prediction,
    Spectrum,
    Tradeoff,
    choose,
    distortion,
    predict,
    remaining,
    spectrum,
)
from .splince import splince
from .subspace import subspace
from .targets import Target

__all__ = [
    "Game",
    "OracleEraser",
    "Prediction",
    "QuadraticEraser",
    "RidgeFactor",
    "Spectrum",
    "Target",
    "Tradeoff",
    "choose",
    "distortion",
    "inlp",
    "joint",
    "leace",
    "leace_many",
    "mean_difference",
    "oracle",
    "pca",
    "predict",
    "quadratic",
    "random",
    "remaining",
    "ridge_edit",
    "rlace",
    "rlace_game",
    "second_order",
    "shared",
    "spectrum",
    "splince",
    "subspace",
    "targets",
]
