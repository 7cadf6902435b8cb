"""Head: run it on the last positions only; with a large vocabulary it costs as much as many blocks."""

from __future__ import annotations

import inspect

from torch import nn


def only_last(model: nn.Module, n: int) -> dict[str, int]:
    """Return the options that make a forward run its head on the last ``n`` positions; none where it has no such option.

    Slice the logits all the same (``[:, -n:]``), which is right in both cases.
    """
    return {"logits_to_keep": n} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
