"""RMU by gradient descent: steer the forget texts at one layer to a fixed vector, hold the retain texts."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from repe_unlearn.activations import StopForward
from repe_unlearn.architectures import Architecture
from repe_unlearn.encoding import longest_text, pad_id_of
from repe_unlearn.errors import InputError, NotEnoughDataError
from repe_unlearn.facts import Sample
from repe_unlearn.sites import Site
from repe_unlearn.taps import tap

from .loop import Run, descend, positive
from .samples import TokenBatch, Tokens, shuffled, tokenise
from .trainee import Trainee, choose, mlp_writers, trainee

Positions: TypeAlias = Literal["tokens", "completion", "padded"]


def rmu(
    model: nn.Module,
    tokenizer: Any,
    forget: Sequence[Sample] | Mapping[str, Sequence[Sample]],
    retain: Sequence[Sample],
    *,
    layer: int = 7,
    layers: Sequence[int] | None = None,
    c: float | Literal["adaptive"] = 20.0,
    scale: float = 5.0,
    alpha: float = 1200.0,
    steps: int = 80,
    lr: float = 5e-5,
    batch: int = 4,
    positions: Positions = "tokens",
    sinks: int = 1,
    uniform: bool = False,
    weight_decay: float = 0.0,
    clip: float | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Run:
    """Return a patch of some MLP writers that sends forget texts at one layer to ``c·u`` and holds retain texts.

    Minimises mse(h(x_f), c·u) + alpha · mse(h(x_r), h₀(x_r)) by AdamW, h the stream behind block ``layer``. Defaults
    are those of the reference code (wmdp) but for what is named under ``positions``, ``sinks`` and ``uniform``.
    Forwards stop behind block ``layer``, so later blocks cost nothing, and h₀ comes from the model's own weights,
    which are never written, once per retain text: no second model is in memory.

    Args:
        model: of a supported family, with or without its head.
        tokenizer: its fast tokenizer.
        forget: samples, or topic -> samples: each topic has a vector of its own, and steps take turns.
        retain: samples.
        layer: block behind which the stream is steered.
        layers: blocks whose MLP writers are trained, none behind ``layer``; default ``layer`` and the two before it.
        c: norm of the target; ``"adaptive"``: ``scale`` times the mean norm of h on the topic's first batch.
        scale: of adaptive RMU.
        alpha: weight of the retain loss.
        steps: of the optimiser.
        lr: learning rate.
        batch: samples of each set per step.
        positions: which positions count: all real tokens, only those of completions, or also padding, as in the
            reference code.
        sinks: leave out this many first positions of every text: the stream there is far larger than elsewhere, the
            same in all texts, and moving it destroys the model. The reference code has 0.
        uniform: draw u from [0, 1) per coordinate as the reference code does, so that all topics share most of it;
            default Gaussian, orthogonal between topics.
        weight_decay: of AdamW.
        clip: largest norm of the gradient; None leaves it as it is.
        seed: of u and of the order of samples.
        progress: show a progress bar.

    Returns:
        The patch, the losses of every step, and the time. Cached: retain positions × width numbers.

    Raises:
        InputError: a layer that does not exist or lies behind ``layer``, text that is too long or has no position
            that counts, an unusable setting.
        NotEnoughDataError: no samples.
        NonFiniteError: a loss or gradient became NaN or infinite.
        UnsupportedModelError: weights that are quantised or not in memory.

    Example:
        ``run = rmu(model, tokenizer, from_texts(bio), from_texts(wiki), layer=7, c="adaptive")``
    """
    begun = time.perf_counter()
    topics = dict(forget) if isinstance(forget, Mapping) else {"forget": forget}
    if not topics or not all(topics.values()) or not retain:
        raise NotEnoughDataError("got no forget or no retain samples; needed at least one of each.")
    positive(batch=batch)
    if positions not in ("tokens", "completion", "padded"):
        raise InputError(f"got positions={positions!r}; needed 'tokens', 'completion' or 'padded'.")
    if c != "adaptive" and not (isinstance(c, int | float) and c >= 0):
        raise InputError(f"got c={c!r}; needed a norm >= 0 or 'adaptive'.")
    arch = Architecture.of(model)
    (site,) = arch.sites("resid_post", layers=[layer])
    names = choose(model, mlp_writers(model, _trained_layers(arch, layer, layers)))
    pad_id, limit = pad_id_of(tokenizer), longest_text(model)
    f = {topic: tokenise(samples, tokenizer, max_length=limit) for topic, samples in topics.items()}
    r = tokenise(retain, tokenizer, max_length=limit)
    for tokens in (*f.values(), r):
        _require_positions(tokens, positions, sinks)
    order = torch.Generator().manual_seed(seed)
    with trainee(model, names, seed=seed, head=False) as trained:
        stream = _Stream(trained, site, positions, sinks)
        aims = _Aims(tuple(f), stream, c, scale, order, uniform)
        forgotten = {topic: shuffled(tokens, batch, pad_id, order) for topic, tokens in f.items()}
        kept, turns = shuffled(r, batch, pad_id, order), itertools.cycle(f)

        def terms() -> Iterator[tuple[float, Tensor]]:
            topic = next(turns)
            b = next(forgotten[topic]).to(trained.device)
            yield 1.0, (stream.rows(b) - aims.of(topic, b)).square().mean()
            b = next(kept).to(trained.device)
            yield alpha, (stream.rows(b) - stream.before(b)).square().mean()

        history = descend(
            trained.leaves,
            terms,
            steps=steps,
            lr=lr,
            accumulate=1,
            weight_decay=weight_decay,
            clip=clip,
            progress=progress,
            label="rmu",
        )
        facts = {
            "site": site,
            "c": c if c != "adaptive" else f"adaptive, {scale} x the norm",
            "alpha": alpha,
            "steps": steps,
            "lr": lr,
            "batch": batch,
            "positions": positions,
            "sinks": sinks,
            "uniform": uniform,
            "seed": seed,
        }
        patch = trained.patch(f"RMU at {site}, {steps} steps of AdamW", facts)
    return Run(patch, history, time.perf_counter() - begun)


def directions(n: int, d: int, generator: torch.Generator, *, uniform: bool = False) -> Tensor:
    """Return ``[n, d]`` random unit vectors: Gaussian and orthogonal, or (``uniform``) drawn from [0, 1)."""
    if uniform:
        rows = torch.rand(n, d, generator=generator)
        return rows / rows.norm(dim=1, keepdim=True)
    return torch.linalg.qr(torch.randn(d, n, generator=generator)).Q.T


class _Stream:
    """Reads the stream behind a block at the positions that count; the forward stops there."""

    def __init__(self, trained: Trainee, site: Site, positions: Positions, sinks: int):
        self._trained, self._site, self._positions, self._sinks = trained, site, positions, sinks
        self._before: dict[int, Tensor] = {}  # sample -> its rows under the model before

    def rows(self, batch: TokenBatch, *, original: bool = False) -> Tensor:
        """Return ``[m, d]``: the positions that count, sample by sample."""
        return self._whole(batch, original)[self._counts(batch)]

    def before(self, batch: TokenBatch) -> Tensor:
        """Return the same rows under the model before; each sample is run once."""
        if self._positions == "padded":  # what stands at padding depends on the batch
            return self.rows(batch, original=True)
        index = batch.index.tolist()
        if any(i not in self._before for i in index):
            whole, counts = self._whole(batch, original=True), self._counts(batch)
            for b, i in enumerate(index):
                self._before[i] = whole[b, counts[b]]
        return torch.cat([self._before[i] for i in index])

    def _whole(self, batch: TokenBatch, original: bool) -> Tensor:
        seen: list[Tensor] = []

        def see(x: Tensor) -> None:
            seen.append(x)
            raise StopForward

        with (
            tap(self._trained.model, {self._site: see}),
            torch.set_grad_enabled(not original),
            contextlib.suppress(StopForward),
        ):
            self._trained.run(batch, original=original)
        return seen[0].to(torch.promote_types(seen[0].dtype, torch.float32))

    def _counts(self, batch: TokenBatch) -> Tensor:
        if self._positions == "padded":
            counts = torch.ones_like(batch.counts)
        else:
            counts = batch.counts.clone() if self._positions == "completion" else batch.mask.bool()
        counts[:, : self._sinks] = False
        return counts


class _Aims:
    """The vectors to which topics are steered, each made when its first batch comes."""

    def __init__(
        self,
        topics: Sequence[str],
        stream: _Stream,
        c: float | Literal["adaptive"],
        scale: float,
        generator: torch.Generator,
        uniform: bool,
    ):
        self._topics, self._stream, self._c, self._scale = topics, stream, c, scale
        self._generator, self._uniform = generator, uniform
        self._units: Tensor | None = None
        self._aims: dict[str, Tensor] = {}

    def of(self, topic: str, batch: TokenBatch) -> Tensor:
        """Return ``c·u`` of a topic."""
        if topic not in self._aims:
            h = self._stream.rows(batch, original=True)
            if self._units is None:
                n, d = len(self._topics), h.shape[1]
                self._units = directions(n, d, self._generator, uniform=self._uniform).to(h)
            unit = self._units[self._topics.index(topic)]
            length = self._c if isinstance(self._c, int | float) else self._scale * h.norm(dim=1).mean()
            self._aims[topic] = length * unit
        return self._aims[topic]


def _trained_layers(arch: Architecture, layer: int, layers: Sequence[int] | None) -> list[int]:
    """Return the layers to train, counted from the front."""
    last = layer % arch.n_layers
    if layers is None:
        return list(range(max(0, last - 2), last + 1))
    found = [arch.locate(site) for site in arch.sites("resid_post", layers=layers)]
    numbers = [place[1] for place in found if place is not None]
    if not numbers or max(numbers) > last:
        raise InputError(
            f"got layers={list(layers)} for layer={layer}; needed some, and none behind it: the loss does not see them."
        )
    return numbers


def _require_positions(tokens: Sequence[Tokens], positions: Positions, sinks: int) -> None:
    for i, t in enumerate(tokens):
        if positions != "padded" and not any((t.counts if positions == "completion" else t.ids)[sinks:]):
            raise InputError(
                f"sample {i} ({len(t.ids)} tokens) has no position that counts with positions={positions!r} and "
                f"sinks={sinks}; leave it out or lower sinks."
            )
