"""Trainee: a model of which some parameters are replaced by float32 copies that can be trained."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from repe_unlearn.architectures import Architecture, Experts, Write
from repe_unlearn.edit import Edit
from repe_unlearn.errors import InputError, UnsupportedModelError
from repe_unlearn.fingerprints import fingerprint
from repe_unlearn.head import only_last
from repe_unlearn.linears import floating
from repe_unlearn.patch import Patch
from repe_unlearn.placement import input_device

from .samples import TokenBatch


def mlp_writers(model: nn.Module, layers: Iterable[int] | None = None) -> tuple[str, ...]:
    """Return the names of the weights by which the MLPs write into the residual stream (``down_proj`` and its like).

    They come from the row of the model's family, never from their place in a list of parameters.

    Args:
        model: of a supported family.
        layers: block numbers, negative ones count from the end; default all.

    Raises:
        InputError: a layer that does not exist, or an MLP that does not write on its own.
        UnsupportedArchitectureError: the family has no row.
    """
    arch = Architecture.of(model)
    names = []
    for site in arch.sites("mlp_out", layers=layers):
        found = arch.locate(site)
        assert found is not None
        part = arch.part("mlp_out", found[1])
        assert isinstance(part, Write)
        base = f"{arch.block(found[1])}."
        names += [base + (w.path if isinstance(w, Experts) else f"{w}.weight") for w in part.writers]
    return tuple(dict.fromkeys(names))


def choose(model: nn.Module, parameters: str | Sequence[str], *, matrices: bool = False) -> tuple[str, ...]:
    """Return the names of the parameters that are meant, in the order of the model; tied ones once.

    Args:
        model: any.
        parameters: ``"all"``, a regular expression that occurs in the names, or a list of names.
        matrices: weights of linear maps only: no norms, biases or embeddings.

    Raises:
        InputError: no parameter has such a name.
        UnsupportedModelError: one is quantised or not in memory.
    """
    known = dict(model.named_parameters())
    if isinstance(parameters, str):
        try:
            chosen = [name for name in known if parameters == "all" or re.search(parameters, name)]
        except re.error as error:
            raise InputError(f"got parameters={parameters!r}, no regular expression ({error}).") from error
    else:
        unknown = [name for name in parameters if name not in known]
        if unknown:
            raise InputError(
                f"got parameter names {unknown[:3]}, which this model does not have (a tied weight goes by its first "
                f"name); it has {', '.join(list(known)[:3])}, ..."
            )
        chosen = [name for name in known if name in set(parameters)]
    if matrices:
        tables = {f"{path}.weight" for path, m in model.named_modules() if isinstance(m, nn.Embedding)}
        chosen = [name for name in chosen if known[name].ndim > 1 and name not in tables]
    if not chosen:
        raise InputError(
            f"got parameters={parameters!r}, which leaves no {'matrix' if matrices else 'parameter'} of this model; "
            f"its names look like {', '.join(list(known)[:3])}."
        )
    for name in chosen:
        floating(model, name)
    return tuple(chosen)


class Trainee:
    """The model with other values for some parameters. Make one with ``trainee``.

    Attributes:
        leaves: what an optimiser trains: copies in float32 (float64 of float64 weights), or low-rank factors.
        names: of the parameters that are replaced.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], rank: int | None, seed: int):
        self.model, self.names, self.device = model, tuple(names), input_device(model)
        self._old = {name: floating(model, name) for name in names}
        self._accepted = inspect.signature(model.forward).parameters
        generator = torch.Generator().manual_seed(seed)
        self.leaves: list[Tensor] = []
        for weight in self._old.values():
            wide = torch.promote_types(weight.dtype, torch.float32)
            if rank is None:
                self.leaves.append(weight.to(wide, copy=True).requires_grad_())
                continue
            # As peft does: one factor uniform, the other zero, so that the first step starts from the model.
            *stack, rows, cols = weight.shape
            right = torch.rand(*stack, rank, cols, generator=generator, dtype=wide) * 2 - 1
            right = (right / math.sqrt(cols)).to(weight.device).requires_grad_()
            left = torch.zeros(*stack, rows, rank, dtype=wide, device=weight.device).requires_grad_()
            self.leaves += [left, right]
        self._low_rank = rank is not None

    def values(self) -> dict[str, Tensor]:
        """Return the parameters in the model's dtype, as functions of ``leaves``."""
        if not self._low_rank:
            pairs = zip(self._old.items(), self.leaves, strict=True)
            return {name: leaf.to(old.dtype) for (name, old), leaf in pairs}
        factors = zip(self.leaves[::2], self.leaves[1::2], strict=True)
        return {
            name: (old.to(left.dtype) + left @ right).to(old.dtype)
            for (name, old), (left, right) in zip(self._old.items(), factors, strict=True)
        }

    def run(self, batch: TokenBatch, *, original: bool = False, **options: Any) -> Any:
        """Return what the forward returns for a batch; ``original``: with the model's own weights."""
        inputs = {"input_ids": batch.ids, "attention_mask": batch.mask, **options}
        if "use_cache" in self._accepted:
            inputs["use_cache"] = False
        values = {} if original else self.values()
        return functional_call(self.model, values, (), inputs)

    def logits(self, batch: TokenBatch, *, original: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits ``[b, k, v]`` in float32, the ids ``[b, k]`` they predict and which of them count.

        ``k`` positions: the head is not run where no sample has a token that counts, nor anything on the last token,
        from which nothing is predicted.
        """
        keep = batch.ids.shape[1] - int(batch.counts.any(0).nonzero()[0])
        run = self.run(batch.without_last(), original=original, **only_last(self.model, keep))
        logits = run.logits[:, -keep:]
        wide = torch.promote_types(logits.dtype, torch.float32)
        return logits.to(wide), batch.ids[:, -keep:], batch.counts[:, -keep:]

    def logp(self, batch: TokenBatch, *, original: bool = False) -> tuple[Tensor, Tensor]:
        """Return the log-probability ``[b, k]`` of the tokens, and which of them count."""
        logits, ids, counts = self.logits(batch, original=original)
        return -nn.functional.cross_entropy(logits.mT, ids, reduction="none"), counts

    def patch(self, rule: str, provenance: Mapping[str, object]) -> Patch:
        """Return the difference between the trained values and the model."""
        if self._low_rank:
            factors = zip(self.leaves[::2], self.leaves[1::2], strict=True)
            edits = {n: Edit(b, a, rule) for n, (b, a) in zip(self._old, factors, strict=True)}
        else:
            edits = {
                name: Edit(leaf.detach().double() - old.double(), None, rule)
                for (name, old), leaf in zip(self._old.items(), self.leaves, strict=True)
            }
        return made(self.model, edits, rule, provenance)


def made(
    model: nn.Module, edits: Mapping[str, Edit], rule: str, provenance: Mapping[str, object] = {}
) -> Patch:
    """Return a patch of a model with the facts that travel along."""
    facts = {"rule": rule, **{key: str(value) for key, value in provenance.items()}}
    return Patch(edits, fingerprint(model), provenance=facts)


@contextmanager
def trainee(
    model: nn.Module,
    names: Sequence[str],
    *,
    rank: int | None = None,
    seed: int = 0,
    head: bool = True,
) -> Iterator[Trainee]:
    """Freeze a model and give a trainee of it; afterwards, and after any error, the model is as it was.

    The model's own weights are never written: each forward puts the copies in their place and takes them out again.
    Inside, the model is in eval mode (no dropout) and none of its own parameters takes a gradient.

    Args:
        model: a causal language model.
        names: parameters to train, from ``choose``.
        rank: train low-rank factors of the change instead.
        seed: of the factors.
        head: the logits will be needed.

    Raises:
        UnsupportedModelError: the model does not predict the next token.
        InputError: the rank is not a positive number.
    """
    config = getattr(model, "config", None)
    predicts = getattr(model, "can_generate", lambda: True)()
    if head and (not predicts or getattr(config, "is_encoder_decoder", False)):
        raise UnsupportedModelError(
            f"{type(model).__name__} does not predict the next token of a text; load AutoModelForCausalLM."
        )
    if rank is not None and (not isinstance(rank, int) or rank < 1):
        raise InputError(f"got lora_rank={rank!r}; needed None or a whole number >= 1.")
    flags = [(p, p.requires_grad) for p in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.requires_grad_(False)
        model.eval()
        with torch.enable_grad():
            yield Trainee(model, names, rank, seed)
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for module, mode in modes:
            module.training = mode
