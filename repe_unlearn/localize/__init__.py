"""Localise: where in a model a behaviour sits, by patching and by gradients; and switch those places off."""

from repe_unlearn.localize.attribution import attribute
from repe_unlearn.localize.fact_pairs import fact_pairs
from repe_unlearn.localize.maps import Map
from repe_unlearn.localize.neurons import Neuron, neuron_activity, rank_neurons
from repe_unlearn.localize.pairs import GROUPS, Pair, make_pairs
from repe_unlearn.localize.parts import unit_sites
from repe_unlearn.localize.patching import patch_activations
from repe_unlearn.localize.runs import Noise
from repe_unlearn.localize.suppress import selective_pruning, suppress_heads, suppress_neurons, suppressor

__all__ = [
    "GROUPS",
    "Map",
    "Neuron",
    "Noise",
    "Pair",
    "attribute",
    "fact_pairs",
    "make_pairs",
    "neuron_activity",
    "patch_activations",
    "rank_neurons",
    "selective_pruning",
    "suppress_heads",
    "suppress_neurons",
    "suppressor",
    "unit_sites",
]
