"""Built-in data in English, generated from word tables, the same on every machine: contrasts of minimal pairs, and facts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from repe_unlearn.builtin.capitals import capitals
from repe_unlearn.builtin.gender import gender
from repe_unlearn.builtin.planted import planted
from repe_unlearn.builtin.tense import tense
from repe_unlearn.contrast import Contrast

__all__ = ["BUILTINS", "capitals", "gender", "planted", "tense"]

BUILTINS: Mapping[str, Callable[..., Contrast]] = MappingProxyType({"gender": gender, "tense": tense})
