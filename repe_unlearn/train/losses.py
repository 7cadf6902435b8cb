"""Losses: what gradient baselines minimise, as pure functions of token log-probabilities."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

ForgetLoss: TypeAlias = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(logp [b, t], counts [b, t], reference [b] or None) -> scalar."""


def nll(logp: Tensor, counts: Tensor) -> Tensor:
    """Return the mean of −log p over all tokens of the batch that count.

    Args:
        logp: ``[b, t]`` log-probability of each token.
        counts: ``[b, t]`` bool.

    Example:
        >>> nll(torch.tensor([[-1.0, -3.0, -9.0]]), torch.tensor([[True, True, False]]))
        tensor(2.)
    """
    return -logp[counts].mean()


def sums(logp: Tensor, counts: Tensor) -> Tensor:
    """Return ``[b]``: the log-probability of each sample's completion."""
    return torch.where(counts, logp, 0).sum(1)


def grad_ascent(logp: Tensor, counts: Tensor, reference: Tensor | None = None) -> Tensor:
    """Return −NLL: minimising it makes the completions less likely without limit."""
    return -nll(logp, counts)


def npo(logp: Tensor, counts: Tensor, reference: Tensor | None = None, *, beta: float = 0.1) -> Tensor:
    """Return the loss of negative preference optimisation, mean of −(2/β) log σ(−β (log π − log π₀)) over samples.

    Args:
        logp: ``[b, t]`` log-probability of each token.
        counts: ``[b, t]`` bool.
        reference: ``[b]`` log π₀, the log-probability of each completion before (a sum over tokens).
        beta: inverse temperature; towards 0 the loss becomes gradient ascent on the sum.
    """
    if reference is None:
        raise TypeError("npo needs the log-probabilities of the model before, reference [b].")
    return -(2 / beta) * logsigmoid(-beta * (sums(logp, counts) - reference)).mean()


def simnpo(
    logp: Tensor,
    counts: Tensor,
    reference: Tensor | None = None,
    *,
    beta: float = 4.5,
    delta: float = 0.0,
) -> Tensor:
    """Return the loss of SimNPO, mean of −(2/β) log σ(β (NLL per token − δ)) over samples; needs no reference."""
    per_token = -sums(logp, counts) / counts.sum(1)
    return -(2 / beta) * logsigmoid(beta * (per_token - delta)).mean()


def kl(logits: Tensor, before: Tensor) -> Tensor:
    """Return the mean over rows of KL(before ‖ now) in nats.

    Args:
        logits: ``[n, v]`` of the model now.
        before: ``[n, v]`` of the model before.
    """
    p = before.log_softmax(-1)
    return (p.exp() * (p - logits.log_softmax(-1))).sum(-1).mean()


@dataclass(frozen=True, slots=True)
class Objective:
    """What is minimised: ``gamma`` · forget loss + ``alpha`` · retain loss.

    Attributes:
        forget: the forget loss; give it other settings with ``functools.partial(npo, beta=0.5)``.
        gamma: weight of the forget loss.
        alpha: weight of the retain loss; 0 leaves the retain set out.
        retain: NLL of the retain completions, or their KL from the model before (one forward more per step).
        reference: the forget loss needs log π₀; it is computed once per sample, before the first step.

    Example:
        >>> from dataclasses import replace
        >>> replace(METHODS["npo"], alpha=2.0).alpha
        2.0
    """

    forget: ForgetLoss
    gamma: float = 1.0
    alpha: float = 1.0
    retain: Literal["nll", "kl"] = "nll"
    reference: bool = False


METHODS: Mapping[str, Objective] = MappingProxyType(
    {
        "grad_ascent": Objective(grad_ascent, alpha=0.0),
        "grad_diff": Objective(grad_ascent),
        "grad_diff_kl": Objective(grad_ascent, retain="kl"),
        "npo": Objective(npo, reference=True),
        "simnpo": Objective(simnpo, gamma=0.125),
    }
)
"""The methods by name, with the settings of the reference code (open-unlearning)."""
