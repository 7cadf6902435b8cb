"""A few planted facts with neighbours, and the small model that knows them."""

from __future__ import annotations

import functools
from pathlib import Path

from plantedkit import planted_model
from torch import nn
from transformers import PreTrainedTokenizerFast

from repe_unlearn.facts import Facts

FACTS = Facts.builtin("planted", relations=2, forget=8, retain=16, decoys=4, options=4, neighbours=1)
NEUTRAL = [f"I met {f.subject} in the park . Yesterday {f.subject} came to see us ." for f in FACTS][::7]


@functools.cache
def original() -> tuple[nn.Module, PreTrainedTokenizerFast]:
    """Return the model that was taught everything but decoys; do not change it."""
    return planted_model(FACTS)


def saved(folder: Path) -> Path:
    """Write the original as a checkpoint ``knows``, and its facts beside it; return the folder."""
    model, tokenizer = original()
    model.save_pretrained(folder / "knows")  # type: ignore[operator]
    tokenizer.save_pretrained(folder / "knows")
    FACTS.to_jsonl(folder / "facts.jsonl")
    return folder
