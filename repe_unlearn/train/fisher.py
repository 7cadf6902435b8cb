"""Fisher dampening: shrink the weights that matter far more to the forget set than to the retain set."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from repe_unlearn.edit import Edit
from repe_unlearn.encoding import longest_text, pad_id_of
from repe_unlearn.errors import InputError, NonFiniteError
from repe_unlearn.facts import Sample
from repe_unlearn.patch import Patch

from .gradients import by_sample
from .samples import Tokens, tokenise
from .trainee import Trainee, choose, made, trainee


def fisher_dampening(
    model: nn.Module,
    tokenizer: Any,
    forget: Sequence[Sample],
    retain: Sequence[Sample],
    *,
    alpha: float = 10.0,
    bound: float = 1.0,
    parameters: str | Sequence[str] = "all",
    progress: bool = True,
) -> Patch:
    """Return the patch of selective synaptic dampening: θ ← θ · min(bound · F_r / F_f, 1) where F_f > alpha · F_r.

    F is the diagonal Fisher information, the mean square of the gradient of each sample's NLL per token. One backward
    pass per sample; no training. The published method takes F_r over all training data, forget set included; here it
    is over the samples given as ``retain``. Its defaults come from image classifiers.

    Memory besides the model: chosen parameters × 4 floats.

    Args:
        model: a causal language model with its weights in memory.
        tokenizer: its fast tokenizer.
        forget: what is to be forgotten.
        retain: what is to stay.
        alpha: how many times more a weight must matter to the forget set, > 0.
        bound: the published λ, > 0: how far a weight is shrunk.
        parameters: which may change, as for ``unlearn``.
        progress: show progress bars.

    Returns:
        The patch; ``provenance["dampened"]`` is the share of the chosen weights that it changes.

    Raises:
        InputError: no weight matters so much more to the forget set; unknown parameters; text that is too long.
        NotEnoughDataError: no samples.
        NonFiniteError: a gradient holds NaN or infinity.
        UnsupportedModelError: no causal language model, or weights that are quantised or not in memory.

    Example:
        ``patch = fisher_dampening(model, tokenizer, forget, retain, parameters="mlp")``
    """
    for key, value in {"alpha": alpha, "bound": bound}.items():
        if not (value > 0 and math.isfinite(value)):
            raise InputError(f"got {key}={value!r}; needed a positive number.")
    names = choose(model, parameters)
    pad_id, limit = pad_id_of(tokenizer), longest_text(model)
    f = tokenise(forget, tokenizer, max_length=limit)
    r = tokenise(retain, tokenizer, max_length=limit)
    with trainee(model, names) as trained:
        f_forget, f_retain = (_diagonal(trained, tokens, pad_id, progress) for tokens in (f, r))
        weights = [leaf.detach() for leaf in trained.leaves]
    edits, changed = {}, 0
    rule = f"Fisher dampening, alpha {alpha:g}, bound {bound:g}"
    for name, weight, importance, kept in zip(names, weights, f_forget, f_retain, strict=True):
        chosen = importance > alpha * kept
        factor = torch.where(chosen, (bound * kept / importance).clamp(max=1), 1)
        changed += int(chosen.sum())
        if bool(chosen.any()):
            edits[name] = Edit((factor.double() - 1) * weight.double(), None, rule)
    if not edits:
        raise InputError(
            f"no weight matters more than alpha={alpha:g} times as much to the forget set as to the retain set; "
            "lower alpha, or choose other parameters."
        )
    share = changed / sum(weight.numel() for weight in weights)
    return made(model, edits, rule, {"dampened": share, "forget": len(f), "retain": len(r)})


def _diagonal(trained: Trainee, tokens: Sequence[Tokens], pad_id: int, progress: bool) -> list[Tensor]:
    """Return the mean square of the gradients of single samples."""
    total = [torch.zeros_like(leaf, requires_grad=False) for leaf in trained.leaves]
    unused = torch.Generator()
    for found, n in by_sample(trained, tokens, pad_id, "data", unused, progress=progress, label="importance"):
        for sum_, part in zip(total, found, strict=True):
            sum_.add_((part / n).square(), alpha=1 / len(tokens))
    if not all(bool(torch.isfinite(part).all()) for part in total):
        raise NonFiniteError("the gradients hold NaN or infinite values; load the model in float32.")
    return total
