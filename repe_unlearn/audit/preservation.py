"""Preservation: what an edit costs on text that has nothing to do with the concept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from repe_unlearn.errors import InputError


@dataclass(frozen=True, slots=True)
class Cost:
    """Change of the next-token distribution against the untouched model, over all positions of the texts.

    Attributes:
        kl_mean, kl_p95: mean and 95th percentile of KL(base || edited) in nats per token.
        perplexity: of the edited model.
        base_perplexity: of the untouched model.
        top1: share of positions where both name the same next token.
        tokens: number of positions.
    """

    kl_mean: float
    kl_p95: float
    perplexity: float
    base_perplexity: float
    top1: float
    tokens: int


Condition = Callable[[], AbstractContextManager[Any]]


def costs(
    model: nn.Module, tokenizer: Any, texts: Sequence[str], conditions: dict[str, Condition]
) -> dict[str, Cost]:
    """Return the cost of every condition on neutral texts; the base distribution is computed once per text.

    Args:
        model: the untouched model.
        tokenizer: its tokenizer.
        texts: neutral texts, each at least two tokens.
        conditions: name -> context manager under which the model is edited, e.g. ``lambda: apply(model, plan)``.

    Raises:
        InputError: no text of two tokens or more.
    """
    encoded = [tokenizer(text, return_tensors="pt")["input_ids"] for text in texts]
    encoded = [ids for ids in encoded if ids.shape[1] >= 2]
    if not encoded:
        raise InputError(
            "got no neutral text of two tokens or more; needed some to measure KL and perplexity."
        )
    device = next(model.parameters()).device
    with torch.inference_mode():
        base = [_log_probs(model, ids.to(device)) for ids in encoded]
        base_nll = torch.cat([_nll(p, ids) for p, ids in zip(base, encoded, strict=True)])
        result = {}
        for name, condition in conditions.items():
            kls, nlls, same = [], [], []
            with condition():
                for ids, p in zip(encoded, base, strict=True):
                    q = _log_probs(model, ids.to(device))
                    kls.append((p.exp() * (p - q)).sum(-1).clamp_min(0).double())
                    nlls.append(_nll(q, ids))
                    same.append(p.argmax(-1) == q.argmax(-1))
            kl = torch.cat(kls)
            result[name] = Cost(
                kl_mean=float(kl.mean()),
                kl_p95=float(torch.quantile(kl, 0.95)),
                perplexity=float(torch.cat(nlls).mean().exp()),
                base_perplexity=float(base_nll.mean().exp()),
                top1=float(torch.cat(same).double().mean()),
                tokens=len(kl),
            )
    return result


def _log_probs(model: nn.Module, ids: Tensor) -> Tensor:
    """Return log probabilities ``[t, vocab]`` of the next token at every position."""
    return model(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)


def _nll(log_probs: Tensor, ids: Tensor) -> Tensor:
    """Return the negative log likelihood of each token but the first, in nats."""
    targets = ids[0, 1:].to(log_probs.device)
    return -log_probs[:-1].gather(1, targets[:, None])[:, 0].double()
