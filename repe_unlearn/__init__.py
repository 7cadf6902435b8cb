"""Make a model stop representing something: capture, solve in closed form, hook or bake, verify, export."""

from importlib.metadata import version as _version

from . import algebra, export, localize, quantisation, solvers, train
from .activations import capture, gather
from .answers import Answers, answers
from .architectures import Architecture
from .audit import Check, Report, verify
from .closed_form import closed_form
from .concepts import Concepts
from .contrast import Contrast, Example
from .difference import diff
from .discovery import Discovery, discover
from .eraser import Eraser
from .facts import Fact, Facts, Question, Sample
from .facts_files import Corpus
from .fingerprints import fingerprint
from .folding import bake
from .gate import Gate
from .hooks import apply
from .inputs import Inputs
from .measured import Measured, measure
from .methods import METHODS
from .models import Loaded, load
from .moments import Moments
from .outlook import Outlook, foresee
from .patch import Patch
from .plan import ErasurePlan, solve
from .sequential import fit_sequential
from .shards import Shards
from .sites import Site
from .steering import Steer, SteeringPlan
from .stream import plan_stream
from .thin_moments import ThinMoments
from .tokens import Select

__version__ = _version("repe-unlearn")

__all__ = [
    "METHODS",
    "Answers",
    "Architecture",
    "Check",
    "Concepts",
    "Contrast",
    "Corpus",
    "Discovery",
    "Eraser",
    "ErasurePlan",
    "Example",
    "Fact",
    "Facts",
    "Gate",
    "Inputs",
    "Loaded",
    "Measured",
    "Moments",
    "Outlook",
    "Patch",
    "Question",
    "Report",
    "Sample",
    "Select",
    "Shards",
    "Site",
    "Steer",
    "SteeringPlan",
    "ThinMoments",
    "algebra",
    "answers",
    "apply",
    "bake",
    "capture",
    "closed_form",
    "diff",
    "discover",
    "export",
    "fingerprint",
    "fit_sequential",
    "foresee",
    "gather",
    "load",
    "localize",
    "measure",
    "plan_stream",
    "quantisation",
    "solve",
    "solvers",
    "train",
    "verify",
]
