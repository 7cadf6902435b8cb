"""The loop that all gradient baselines share, and unlearning by losses on the output."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from repe_unlearn.encoding import longest_text, pad_id_of
from repe_unlearn.errors import InputError, NonFiniteError, NotEnoughDataError
from repe_unlearn.facts import Sample
from repe_unlearn.patch import Patch

from .losses import METHODS, Objective, kl, nll, sums
from .samples import TokenBatch, Tokens, in_order, shuffled, tokenise
from .trainee import Trainee, choose, trainee


@dataclass(frozen=True, slots=True)
class Step:
    """One step of an optimiser: both losses before it, without their weights, and the norm of the gradient.

    ``retain`` is NaN where there is no retain loss.
    """

    forget: float
    retain: float
    gradient: float


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """What a gradient baseline returns.

    Attributes:
        patch: the change of the weights.
        history: one entry per step.
        seconds: wall time, tokenisation included.
    """

    patch: Patch
    history: tuple[Step, ...]
    seconds: float

    def __repr__(self) -> str:
        return f"Run({self.patch!r}, {len(self.history)} steps, {self.seconds:.1f} s)"


def unlearn(
    model: nn.Module,
    tokenizer: Any,
    forget: Sequence[Sample],
    retain: Sequence[Sample] | None = None,
    *,
    method: str | Objective = "npo",
    steps: int = 125,
    lr: float = 1e-5,
    batch: int = 8,
    accumulate: int = 4,
    parameters: str | Sequence[str] = "all",
    lora_rank: int | None = None,
    weight_decay: float = 0.01,
    clip: float | None = 1.0,
    seed: int = 0,
    progress: bool = True,
) -> Run:
    """Return a patch trained by AdamW to make the forget completions unlikely; the model itself is never written.

    The defaults are those of the reference code (open-unlearning: 32 samples per step, 10 epochs of 400 samples), but
    for its warm-up and decay of the learning rate. Losses count completion tokens only.

    Memory besides the model: chosen parameters × 4 floats (copy, gradient, two moments), and with ``lora_rank`` one
    dense copy and gradient of each chosen matrix while a step runs. The patch holds float64.

    Args:
        model: a causal language model with its weights in memory.
        tokenizer: its fast tokenizer.
        forget: what is to be forgotten.
        retain: what is to stay; needed unless the method has ``alpha=0``.
        method: ``"grad_ascent"``, ``"grad_diff"``, ``"grad_diff_kl"``, ``"npo"``, ``"simnpo"``, or an ``Objective``.
        steps: of the optimiser, >= 1.
        lr: learning rate; low-rank factors usually want ten times as much or more.
        batch: samples of each set per forward.
        accumulate: forwards of each set per step.
        parameters: which to train: ``"all"``, a regular expression that occurs in their names, or names such as
            ``mlp_writers(model, layers)``.
        lora_rank: train a change of this rank of every chosen matrix; norms, biases and embeddings stay.
        weight_decay: of AdamW.
        clip: largest norm of the gradient; None leaves it as it is.
        seed: of the order of samples and of the low-rank factors; the same seed gives the same patch.
        progress: show a progress bar.

    Returns:
        The patch, the losses of every step, and the time.

    Raises:
        InputError: unknown method or parameters, text that is too long, an unusable setting.
        NotEnoughDataError: no samples.
        NonFiniteError: a loss or gradient became NaN or infinite.
        UnsupportedModelError: no causal language model, or weights that are quantised or not in memory.

    Example:
        ``run = unlearn(model, tokenizer, forget, retain, method="npo", parameters=mlp_writers(model, range(8, 16)))``
    """
    begun = time.perf_counter()
    if isinstance(method, str) and method not in METHODS:
        raise InputError(f"got method={method!r}; needed one of {', '.join(METHODS)}, or an Objective.")
    objective = METHODS[method] if isinstance(method, str) else method
    name = method if isinstance(method, str) else getattr(objective.forget, "__name__", "own objective")
    positive(batch=batch, accumulate=accumulate)
    if objective.alpha and not retain:
        raise NotEnoughDataError(f"got no retain samples; {name} needs some, or an Objective with alpha=0.")
    names = choose(model, parameters, matrices=lora_rank is not None)
    pad_id, limit = pad_id_of(tokenizer), longest_text(model)
    f = tokenise(forget, tokenizer, max_length=limit)
    r = tokenise(retain, tokenizer, max_length=limit) if retain and objective.alpha else []
    order = torch.Generator().manual_seed(seed)
    with trainee(model, names, rank=lora_rank, seed=seed) as trained:
        reference = reference_sums(trained, f, pad_id, batch) if objective.reference else None
        forgotten = shuffled(f, batch, pad_id, order)
        kept = shuffled(r, batch, pad_id, order) if r else iter(())

        def terms() -> Iterator[tuple[float, Tensor]]:
            b = next(forgotten).to(trained.device)
            before = None if reference is None else reference[b.index].to(trained.device)
            yield objective.gamma, objective.forget(*trained.logp(b), before)
            if r:
                yield objective.alpha, _retain_loss(trained, next(kept).to(trained.device), objective)

        history = descend(
            trained.leaves,
            terms,
            steps=steps,
            lr=lr,
            accumulate=accumulate,
            weight_decay=weight_decay,
            clip=clip,
            progress=progress,
            label=name,
        )
        facts = {
            "gamma": objective.gamma,
            "alpha": objective.alpha,
            "retain_loss": objective.retain,
            "steps": steps,
            "lr": lr,
            "batch": batch * accumulate,
            "weight_decay": weight_decay,
            "clip": clip,
            "lora_rank": lora_rank,
            "seed": seed,
            "forget": len(f),
            "retain": len(r),
        }
        patch = trained.patch(f"{name}, {steps} steps of AdamW", facts)
    return Run(patch, history, time.perf_counter() - begun)


def _retain_loss(trained: Trainee, batch: TokenBatch, objective: Objective) -> Tensor:
    if objective.retain == "nll":
        return nll(*trained.logp(batch))
    logits, _, counts = trained.logits(batch)
    with torch.no_grad():
        before = trained.logits(batch, original=True)[0]
    return kl(logits[counts], before[counts])


def reference_sums(trained: Trainee, tokens: Sequence[Tokens], pad_id: int, size: int) -> Tensor:
    """Return ``[n]``: the log-probability of every completion under the model before."""
    found = torch.empty(len(tokens), dtype=torch.float64)
    with torch.no_grad():
        for batch in in_order(tokens, size, pad_id):
            logp, counts = trained.logp(batch.to(trained.device), original=True)
            found[batch.index] = sums(logp, counts).double().cpu()
    return found


def descend(
    leaves: Sequence[Tensor],
    terms: Callable[[], Iterator[tuple[float, Tensor]]],
    *,
    steps: int,
    lr: float,
    accumulate: int,
    weight_decay: float,
    clip: float | None,
    progress: bool,
    label: str,
    after: Callable[[int], object] | None = None,
) -> tuple[Step, ...]:
    """Train leaves by AdamW and return the losses of every step.

    Args:
        leaves: what to train.
        terms: gives (weight, loss) of forgetting and then of retaining, if there is that; each loss is differentiated before the next is asked for, so one graph is in memory at a time.
        steps: of the optimiser.
        lr: learning rate.
        accumulate: how often ``terms`` is called per step.
        weight_decay: of AdamW.
        clip: largest norm of the gradient, or None.
        progress: show a progress bar.
        label: of the progress bar.
        after: called after every step with its number, from 1 on.

    Raises:
        NonFiniteError: a loss or gradient became NaN or infinite.
        InputError: an unusable setting.
    """
    positive(steps=steps, accumulate=accumulate)
    for key, value in {"lr": lr, "clip": clip}.items():
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise InputError(f"got {key}={value!r}; needed a positive number.")
    # The plain one passes over all weights eight times: longer than a forward and backward pass of a short batch.
    fused = all(leaf.device.type in ("cpu", "cuda") for leaf in leaves)
    optimiser = torch.optim.AdamW(leaves, lr=lr, weight_decay=weight_decay, fused=fused)
    history = []
    bar = tqdm(range(1, steps + 1), desc=label, unit="step", disable=not progress, leave=False)
    for step in bar:
        optimiser.zero_grad(set_to_none=True)
        values = [0.0, math.nan]
        for _ in range(accumulate):
            for place, (weight, loss) in enumerate(terms()):
                (weight / accumulate * loss).backward()
                so_far = 0.0 if math.isnan(values[place]) else values[place]
                values[place] = so_far + _finite(loss, step, "loss") / accumulate
        used = [leaf for leaf in leaves if leaf.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(used, math.inf if clip is None else clip)
        history.append(Step(values[0], values[1], _finite(norm, step, "gradient")))
        optimiser.step()
        bar.set_postfix(forget=f"{values[0]:.3g}", retain=f"{values[1]:.3g}")
        if after is not None:
            after(step)
    for leaf in leaves:
        if not bool(torch.isfinite(leaf).all()):
            raise NonFiniteError("the trained weights hold NaN or infinite values; lower lr.")
    return tuple(history)


def _finite(value: Tensor, step: int, what: str) -> float:
    number = float(value.detach())
    if not math.isfinite(number):
        raise NonFiniteError(
            f"the {what} became {number} at step {step}; the model is as it was. Lower lr, or load it in float32."
        )
    return number


def positive(**values: object) -> None:
    """Raise InputError unless every value is a whole number >= 1."""
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise InputError(f"got {name}={value!r}; needed a whole number >= 1.")
