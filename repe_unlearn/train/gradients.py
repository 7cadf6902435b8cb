"""Gradients of the log-likelihood by single samples: the rows of Fisher and Gauss-Newton matrices."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

from repe_unlearn.errors import NonFiniteError

from .samples import Tokens, pad
from .trainee import Trainee

Labels: TypeAlias = Literal["model", "data"]
"""Whose next tokens the gradients are of: drawn from the model's own prediction, or those of the text."""


def ridge_of(trace: float, gradients: int, damping: float) -> float:
    """Return damping times the mean nonzero eigenvalue of a matrix that is a sum of so many outer products.

    Raises:
        NonFiniteError: the gradients hold NaN or infinity, or all are zero.
    """
    ridge = damping * trace / gradients
    if not (math.isfinite(ridge) and ridge > 0):
        raise NonFiniteError(
            f"the squared gradients add up to {trace}; needed a positive number. Load the model in float32, or choose "
            "parameters that the loss depends on."
        )
    return ridge


def by_sample(
    trained: Trainee,
    tokens: Sequence[Tokens],
    pad_id: int,
    labels: Labels,
    generator: torch.Generator,
    *,
    progress: bool,
    label: str,
) -> Iterator[tuple[list[Tensor], int]]:
    """Yield for each sample the gradients of its summed NLL by the leaves, and how many tokens count in it.

    With labels of the model, the mean of their outer products is the Gauss-Newton matrix: the scores of different
    tokens are uncorrelated, so that only the products of a token with itself remain.
    """
    for i in tqdm(range(len(tokens)), desc=label, unit="sample", disable=not progress, leave=False):
        logits, ids, counts = trained.logits(pad(tokens, [i], pad_id).to(trained.device))
        rows, targets = logits[counts], ids[counts]
        if labels == "model":
            # On the CPU, so that one seed gives one result on every device.
            p = rows.detach().cpu().softmax(-1)
            targets = torch.multinomial(p, 1, generator=generator)[:, 0].to(rows.device)
        loss = cross_entropy(rows, targets, reduction="sum")
        found = torch.autograd.grad(loss, trained.leaves, allow_unused=True, materialize_grads=True)
        yield list(found), len(targets)


def mean_gradient(trained: Trainee, tokens: Sequence[Tokens], pad_id: int, *, progress: bool) -> list[Tensor]:
    """Return the gradient of the NLL per token over all samples together, in float64 on the CPU."""
    total = [torch.zeros_like(leaf, dtype=torch.float64, requires_grad=False) for leaf in trained.leaves]
    count = 0
    unused = torch.Generator()
    for found, n in by_sample(trained, tokens, pad_id, "data", unused, progress=progress, label="gradient"):
        for sum_, part in zip(total, found, strict=True):
            sum_ += part
        count += n
    return [(sum_ / count).cpu() for sum_ in total]
