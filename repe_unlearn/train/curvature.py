"""Curvature: one Newton step that makes the forget set less likely and follows what the retain set leaves free."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from repe_unlearn.edit import Edit
from repe_unlearn.encoding import longest_text, pad_id_of
from repe_unlearn.errors import InputError, NonFiniteError
from repe_unlearn.facts import Sample
from repe_unlearn.patch import Patch

from .gradients import Labels, by_sample, mean_gradient, ridge_of
from .kfac import kfac
from .loop import positive
from .samples import Tokens, tokenise
from .trainee import Trainee, choose, made, trainee

_COLUMNS = 2**18  # that are widened to float64 at once


def influence(
    model: nn.Module,
    tokenizer: Any,
    forget: Sequence[Sample],
    retain: Sequence[Sample],
    *,
    parameters: str | Sequence[str],
    curvature: Literal["samples", "kfac"] = "samples",
    damping: float = 0.1,
    gain: float = 1.0,
    step: float | None = None,
    labels: Labels = "model",
    draws: int = 1,
    seed: int = 0,
    progress: bool = True,
) -> Patch:
    """Return the patch ``step · (G + λI)⁻¹ g``: g the gradient of the forget NLL, G the curvature of the retain NLL.

    That is the influence-function estimate of having trained without the forget set, up to the length of the step.
    No loop, no learning rate: one backward pass per sample. Pass the forget set as ``retain`` as well to divide by
    its own curvature (a Newton step on the forget loss alone).

    Memory besides the model, P = number of chosen parameters: ``"samples"`` keeps retain samples × draws × P float32
    numbers (100 samples, one down_proj of 576 × 1536: 354 MB) and solves a system of the size of the samples, by
    Woodbury; ``"kfac"`` keeps in² + out² float64 numbers per weight.

    Args:
        model: a causal language model with its weights in memory.
        tokenizer: its fast tokenizer.
        forget: what is to be forgotten.
        retain: what is to stay.
        parameters: which to change, as for ``unlearn``; choose few, such as ``mlp_writers(model, [8])``.
        curvature: ``"samples"``: G from gradients of single samples, of the rank of their number. ``"kfac"``: a
            Kronecker product of input and output-gradient moments per weight, of full rank, for linear layers only.
        damping: λ as a share of the mean nonzero eigenvalue (trace of G over the number of gradients), > 0.
        gain: chooses the step: the forget NLL per token is to rise by this many nats to first order.
        step: the step itself, in place of ``gain``.
        labels: ``"model"`` draws next tokens from the prediction, which makes G an unbiased estimate of the
            Gauss-Newton matrix; ``"data"`` takes those of the text (the empirical Fisher matrix).
        draws: of next tokens per sample, >= 1.
        seed: of the draws.
        progress: show progress bars.

    Raises:
        InputError: unknown parameters, text that is too long, an unusable setting, K-FAC for a weight that is no
            linear layer.
        NotEnoughDataError: no samples.
        NonFiniteError: a gradient holds NaN or infinity, or is zero.
        UnsupportedModelError: no causal language model, or weights that are quantised or not in memory.

    Example:
        ``patch = influence(model, tokenizer, forget, retain, parameters=mlp_writers(model, [8]))``
    """
    positive(draws=draws)
    for key, value in {"damping": damping, "gain": gain, "step": step}.items():
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise InputError(f"got {key}={value!r}; needed a positive number.")
    if labels not in ("model", "data") or curvature not in ("samples", "kfac"):
        raise InputError(
            f"got labels={labels!r}, curvature={curvature!r}; needed 'model' or 'data', and 'samples' or 'kfac'."
        )
    names = choose(model, parameters)
    pad_id, limit = pad_id_of(tokenizer), longest_text(model)
    f = tokenise(forget, tokenizer, max_length=limit)
    r = tokenise(retain, tokenizer, max_length=limit) * (draws if labels == "model" else 1)
    generator = torch.Generator().manual_seed(seed)
    solve: Callable[..., list[Tensor]] = kfac if curvature == "kfac" else _by_samples
    with trainee(model, names) as trained:
        g = mean_gradient(trained, f, pad_id, progress=progress)
        x = solve(trained, r, g, pad_id, damping, labels, generator, progress=progress)
    slope = sum(float((a * b).sum()) for a, b in zip(g, x, strict=True))
    if not (math.isfinite(slope) and slope > 0):
        raise NonFiniteError(
            f"the forget loss rises by {slope} per step; the gradient is zero, NaN or infinite. Load the model in "
            "float32, or choose other parameters."
        )
    length = gain / slope if step is None else step
    rule = f"one Newton step ({curvature})"
    edits = {name: Edit(length * part, None, rule) for name, part in zip(names, x, strict=True)}
    facts = {
        "damping": damping,
        "step": length,
        "expected_gain": length * slope,
        "labels": labels,
        "draws": draws,
        "seed": seed,
        "forget": len(forget),
        "retain": len(retain),
    }
    return made(model, edits, rule, facts)


def _by_samples(
    trained: Trainee,
    tokens: Sequence[Tokens],
    g: Sequence[Tensor],
    pad_id: int,
    damping: float,
    labels: Labels,
    generator: torch.Generator,
    *,
    progress: bool,
) -> list[Tensor]:
    sizes = [leaf.numel() for leaf in trained.leaves]
    rows = torch.empty(len(tokens), sum(sizes), dtype=trained.leaves[0].dtype)
    count = 0
    found = by_sample(trained, tokens, pad_id, labels, generator, progress=progress, label="curvature")
    for i, (parts, n) in enumerate(found):
        for place, part in zip(rows[i].split(sizes), parts, strict=True):
            place.copy_(part.flatten())
        count += n
    rows /= math.sqrt(count)
    flat = torch.cat([part.flatten() for part in g])
    ridge = ridge_of(float(rows.square().sum(dtype=torch.float64)), len(rows), damping)
    parts = woodbury(rows, flat, ridge).split(sizes)
    return [part.reshape(like.shape) for part, like in zip(parts, g, strict=True)]


def woodbury(rows: Tensor, g: Tensor, ridge: float) -> Tensor:
    """Return ``(rowsᵀ rows + ridge · I)⁻¹ g`` by a system of the size of the number of rows, in float64.

    Args:
        rows: ``[n, p]``.
        g: ``[p]``.
        ridge: > 0.
    """
    n, p = rows.shape
    gram = ridge * torch.eye(n, dtype=torch.float64)
    image = torch.zeros(n, dtype=torch.float64)
    for start in range(0, p, _COLUMNS):
        part = rows[:, start : start + _COLUMNS].double()
        gram += part @ part.T
        image += part @ g[start : start + _COLUMNS].double()
    weights = torch.cholesky_solve(image[:, None], torch.linalg.cholesky(gram))[:, 0]
    result = g.double().clone()
    for start in range(0, p, _COLUMNS):
        result[start : start + _COLUMNS] -= rows[:, start : start + _COLUMNS].double().T @ weights
    return result / ridge
