"""Perturbation: round, prune or shake the weights, and see whether the knowledge shows again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from repe_unlearn.answers import BATCH_TOKENS, answers
from repe_unlearn.audit.edits import replaced
from repe_unlearn.audit.scores import Scores
from repe_unlearn.audit.tries import asked, values
from repe_unlearn.errors import InputError
from repe_unlearn.facts import Facts, Form
from repe_unlearn.quantisation import input_major, to_integers
from repe_unlearn.train.trainee import choose

Change = Callable[[Tensor, int, torch.Generator], Tensor]
"""(weight, axis of its inputs, random numbers) -> a new weight."""


def integers(bits: int, group: int = 32) -> Change:
    """Return the change that rounds to integers and back: symmetric, to nearest, one step per group of inputs."""
    return lambda weight, axis, _: to_integers(weight, bits=bits, group=group, axis=axis)


def pruned(share: float) -> Change:
    """Return the change that sets the smallest weights of every matrix to zero.

    Args:
        share: of them, in [0, 1).
    """
    if not 0 <= share < 1:
        raise InputError(f"got share={share}; needed at least 0 and less than 1.")

    def change(weight: Tensor, axis: int, generator: torch.Generator) -> Tensor:
        size, count = weight.abs().flatten(), int(share * weight.numel())
        kept = torch.ones_like(size, dtype=torch.bool)
        kept[size.argsort(stable=True)[:count]] = False
        return weight * kept.view_as(weight)

    return change


def noisy(sigma: float) -> Change:
    """Return the change that adds Gaussian noise.

    Args:
        sigma: expected norm of the noise, relative to that of the weight.
    """
    if not sigma >= 0:
        raise InputError(f"got sigma={sigma}; needed at least 0.")

    def change(weight: Tensor, axis: int, generator: torch.Generator) -> Tensor:
        # On the CPU, so that one seed gives one result on every device.
        noise = torch.randn(weight.shape, generator=generator).to(weight.device)
        rms = weight.float().square().mean().sqrt()
        return (weight + sigma * rms * noise).to(weight.dtype)

    return change


CHANGES: Mapping[str, Change] = MappingProxyType(
    {
        "int8": integers(8),
        "int4": integers(4),
        "prune10": pruned(0.1),
        "prune30": pruned(0.3),
        "noise": noisy(0.1),
    }
)


def perturbation(
    model: nn.Module,
    tokenizer: Any,
    facts: Facts,
    *,
    change: str | Change = "int4",
    forms: Sequence[Form] = ("seen", "unseen"),
    seed: int = 0,
    batch_tokens: int = BATCH_TOKENS,
    progress: bool = True,
) -> Scores:
    """Return the scores of facts to be forgotten and of decoys while all linear maps of the model are perturbed.

    An edit that is small beside a rounding step disappears in rounding, and what it hid comes back. Embeddings (and a
    head that is tied to them), norms and biases stay. The model is restored bit for bit: its own weights are set aside
    and never written, so memory for a copy of them is needed.

    Args:
        model: a causal language model with its weights in memory.
        tokenizer: its tokenizer.
        facts: with the role forget, and best also decoy.
        change: ``"int8"``, ``"int4"`` (groups of 32 inputs), ``"prune10"``, ``"prune30"`` (per cent of every matrix),
            ``"noise"`` (a tenth of every matrix's norm), or ``integers(bits, group)``, ``pruned(share)``,
            ``noisy(sigma)``, or a function of your own.
        forms: wordings to ask in.
        seed: of the noise.
        batch_tokens: positions per batch.
        progress: show a progress bar.

    Raises:
        InputError: an unknown change.
        UnsupportedModelError: weights that are quantised or not in memory.
        as ``answers``.

    Example:
        ``[perturbation(model, tokenizer, facts, change=name) for name in CHANGES]``
    """
    if isinstance(change, str) and change not in CHANGES:
        raise InputError(f"got change={change!r}; needed one of {', '.join(CHANGES)}, or a function.")
    name, function = (change, CHANGES[change]) if isinstance(change, str) else (_name(change), change)
    questions = asked(facts, forms)
    with replaced(model, dict(_changed(model, function, seed))):
        said = answers(
            model, tokenizer, facts, questions=questions, batch_tokens=batch_tokens, progress=progress
        )
    settings = {"change": name, "seed": str(seed)}
    return Scores(f"perturb.{name}", "T2", values(said), "share", facts=settings)


def _name(change: Change) -> str:
    return getattr(change, "__name__", "own").strip("<>")


def _changed(model: nn.Module, change: Change, seed: int) -> Iterator[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    turned = set(input_major(model))
    for name in choose(model, "all", matrices=True):
        weight = model.get_parameter(name).detach()
        yield name, change(weight, -2 if name in turned else -1, generator)
