"""Runs: forward passes over pairs, with what is needed of them and nothing left on the model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from repe_unlearn.architectures import Architecture
from repe_unlearn.errors import InputError
from repe_unlearn.head import only_last
from repe_unlearn.localize.pairs import Aligned
from repe_unlearn.localize.parts import Part
from repe_unlearn.placement import input_device, require_whole
from repe_unlearn.sites import Site
from repe_unlearn.taps import Tap, tap

Metric = Literal["logit_difference", "log_probability"]


@dataclass(frozen=True, slots=True)
class Noise:
    """Gaussian noise on the embeddings of the subject, in place of a corrupt prompt (causal tracing).

    Args:
        scale: in standard deviations of the embeddings that the clean prompts have.
        samples: how often it is drawn for every pair; results are averaged.
        seed: of the draws.
    """

    scale: float = 3.0
    samples: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.scale > 0 or self.samples < 1:
            raise InputError(f"got {self}; needed scale > 0 and samples >= 1.")


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Pairs of one length, so that nothing is padded. ``n`` pairs, ``t`` positions.

    Attributes:
        members: index of every pair.
        pairs: the pairs.
        clean, corrupt: ``[n, t]`` token ids (of two lengths where only the last position is patched).
        noise: ``[n, t, d]`` what is added to the embeddings of the corrupt prompts, or None.
    """

    members: list[int]
    pairs: list[Aligned]
    clean: Tensor
    corrupt: Tensor
    noise: Tensor | None = None


class Runner:
    """Runs one model on pairs; every pass takes its taps off again whatever happens."""

    def __init__(self, model: nn.Module, metric: Metric):
        if metric not in ("logit_difference", "log_probability"):
            raise InputError(f"got metric={metric!r}; needed logit_difference or log_probability.")
        require_whole(model)
        self.model, self.metric = model, metric
        self.arch = Architecture.of(model)
        self.device = input_device(model)
        self.embedding = Site(self.arch.path(self.arch.family.embeddings[0]))
        accepted = inspect.signature(model.forward).parameters
        self._options: dict[str, Any] = {"use_cache": False} if "use_cache" in accepted else {}
        self._options |= only_last(model, 1)

    def groups(self, pairs: Sequence[Aligned], noise: Noise | None) -> list[Group]:
        """Return the pairs grouped by length, each ``noise.samples`` times where there is noise."""
        if self.metric == "logit_difference" and any(pair.wrong is None for pair in pairs):
            raise InputError("a pair has no wrong answer; give one, or use metric='log_probability'.")
        by_length: dict[tuple[int, int], list[int]] = {}
        for i, pair in enumerate(pairs):
            by_length.setdefault((len(pair.clean), len(pair.corrupt)), []).append(i)
        made = [
            Group(
                members,
                [pairs[i] for i in members],
                torch.tensor([pairs[i].clean for i in members], device=self.device),
                torch.tensor([pairs[i].corrupt for i in members], device=self.device),
            )
            for members in by_length.values()
        ]
        return made if noise is None else self._noisy(made, noise)

    def _noisy(self, groups: list[Group], noise: Noise) -> list[Group]:
        embedded = [self.record(group.clean, [self.embedding])[1][self.embedding] for group in groups]
        spread = torch.cat([x.flatten() for x in embedded]).float().std() * noise.scale
        generator = torch.Generator().manual_seed(noise.seed)
        made = []
        for group, x in zip(groups, embedded, strict=True):
            for _ in range(noise.samples):
                drawn = torch.zeros(x.shape)
                for row, pair in enumerate(group.pairs):
                    size = (len(pair.subject), x.shape[-1])
                    drawn[row, pair.subject] = torch.randn(size, generator=generator)
                added = (drawn.to(x.device) * spread).to(x.dtype)
                made.append(Group(group.members, group.pairs, group.clean, group.corrupt, added))
        return made

    def record(
        self, ids: Tensor, sites: Sequence[Site], noise: Tensor | None = None
    ) -> tuple[Tensor, dict[Site, Tensor]]:
        """Return the last logits ``[n, v]`` and a copy of the tensor at every site."""
        seen: dict[Site, Tensor] = {}

        def keep(site: Site) -> Tap:
            def see(x: Tensor) -> None:
                seen[site] = x.detach().clone()  # some models add to what a module returned, in place

            return see

        with torch.no_grad(), self._noise(noise), tap(self.model, {site: keep(site) for site in sites}):
            logits = self.logits(ids)
        missing = [str(site) for site in sites if site not in seen]
        if missing:
            raise InputError(f"the forward never reached {', '.join(missing[:3])}.")
        return logits, seen

    def gradients(
        self,
        ids: Tensor,
        parts: Sequence[Part],
        value: Callable[[Tensor], Tensor],
        *,
        edits: Mapping[Site, Callable[[Tensor], Tensor]] | None = None,
        noise: Tensor | None = None,
    ) -> dict[Part, Tensor]:
        """Return the gradient of the sum of ``value(logits)`` at every part; ``edits`` change tensors on the way."""
        zeros: dict[Site, Tensor] = {}

        def leaf(site: Site) -> Tap:
            def see(x: Tensor) -> Tensor:
                new = x if edits is None or site not in edits else edits[site](x)
                zeros[site] = torch.zeros_like(new, requires_grad=True)
                return new + zeros[site]

            return see

        sites = {part.site: leaf(part.site) for part in parts}
        for site in set(edits or {}) - set(sites):
            sites[site] = edits[site]  # type: ignore[index]
        with torch.enable_grad(), self._noise(noise), tap(self.model, sites):
            total = value(self.logits(ids)).sum()
            found = torch.autograd.grad(total, [zeros[part.site] for part in parts])
        return dict(zip(parts, found, strict=True))

    def patched(
        self,
        ids: Tensor,
        stream: Tensor,
        part: Part,
        replace: Callable[[Tensor], Tensor],
        tuples: Mapping[int, int],
    ) -> Tensor:
        """Return the last logits of runs that begin at a part's block with a known stream.

        Args:
            ids: ``[b, t]`` token ids.
            stream: ``[b, t, d]`` what the block gets.
            part: where to patch.
            replace: tensor at the part -> what takes its place.
            tuples: of ``shapes``.
        """
        (start,) = self.arch.sites("resid_pre", layers=[part.layer])

        def begin(x: Tensor) -> Tensor:
            return replace(stream) if part.site == start else stream

        taps: dict[Site, Tap] = {start: begin}
        if part.site != start:
            taps[part.site] = replace
        with torch.no_grad(), self._skipping(part.layer, tuples), tap(self.model, taps):
            return self.logits(ids)

    def shapes(self, ids: Tensor) -> dict[int, int]:
        """Return for every block how many things it returns: 0 for a tensor, else the length of a tuple."""
        found: dict[int, int] = {}
        with ExitStack() as stack, torch.no_grad():
            for layer in range(self.arch.n_layers):
                block = self.model.get_submodule(self.arch.block(layer))

                def see(_module: nn.Module, _args: object, output: object, layer: int = layer) -> None:
                    found[layer] = len(output) if isinstance(output, tuple) else 0

                stack.callback(block.register_forward_hook(see).remove)
            self.logits(ids[:1])
        return found

    def logits(self, ids: Tensor) -> Tensor:
        """Return the logits after the last token, ``[n, v]``."""
        return self.model(input_ids=ids, **self._options).logits[:, -1]

    def value(self, logits: Tensor, pairs: Sequence[Aligned]) -> Tensor:
        """Return the metric of every row ``[n]``, in float32 or wider."""
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        rows = torch.arange(len(pairs), device=wide.device)
        answer = torch.tensor([pair.answer for pair in pairs], device=wide.device)
        if self.metric == "log_probability":
            return wide.log_softmax(-1)[rows, answer]
        wrong = torch.tensor([pair.wrong for pair in pairs], device=wide.device)
        return wide[rows, answer] - wide[rows, wrong]

    @contextmanager
    def _noise(self, noise: Tensor | None) -> Iterator[None]:
        taps: dict[Site, Tap] = {} if noise is None else {self.embedding: lambda x: x + noise}
        with tap(self.model, taps):
            yield

    @contextmanager
    def _skipping(self, layer: int, tuples: Mapping[int, int]) -> Iterator[None]:
        """Blocks before a layer hand on what they get: the stream that leaves them is replaced anyhow."""

        def hand_on(length: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                x = args[0] if args else kwargs["hidden_states"]
                return (x, *[None] * (length - 1)) if length else x

            return forward

        with ExitStack() as stack:
            for i in range(layer):
                block = self.model.get_submodule(self.arch.block(i))
                stack.callback(_restore, block, block.__dict__.get("forward"))
                block.__dict__["forward"] = hand_on(tuples[i])
            yield


def _restore(block: nn.Module, forward: Any) -> None:
    """Give a block its own forward back (accelerate keeps one on the instance)."""
    if forward is None:
        block.__dict__.pop("forward", None)
    else:
        block.__dict__["forward"] = forward
