"""Built-in contrasts: minimal pairs in English, generated from word tables, the same on every machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from repe_unlearn.builtin.gender import gender
from repe_unlearn.builtin.tense import tense
from repe_unlearn.contrast import Contrast

__all__ = ["BUILTINS", "gender", "tense"]

BUILTINS: Mapping[str, Callable[..., Contrast]] = MappingProxyType({"gender": gender, "tense": tense})
