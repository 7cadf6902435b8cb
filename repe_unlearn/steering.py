"""Steering: add a vector to activations, or send them to one, while the model runs and where a gate fires."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, nn

from .activations import capture
from .architectures import Architecture
from .contrast import Contrast
from .errors import FileFormatError, InputError, NonFiniteError, NotEnoughDataError, ShapeError
from .facts import Facts
from .fingerprints import fingerprint
from .gate import Gate
from .moments import Moments
from .plan import require_model
from .sites import Site
from .solvers.targets import rmu_directions
from .tensorfile import read_tensors, write_tensors
from .tokens import Select

__all__ = ["Steer", "SteeringPlan", "fact_gate", "steer_by_means", "steer_to_random"]

_KIND = "steering plan"
_VERSION = 1


@dataclass(frozen=True, slots=True, eq=False)
class Steer:
    """The move ``x -> keep · x + vector``: with ``keep`` 1 it adds a vector, with 0 it puts the vector in the place of x.

    Args:
        vector: ``[d]``, kept in float64.
        keep: share of x that stays.

    Raises:
        ShapeError: vector is no floating-point vector.
        NonFiniteError: NaN or infinity.

    Example:
        >>> Steer(torch.tensor([1.0, 0.0]))(torch.tensor([[2.0, 3.0]]))
        tensor([[3., 3.]])
    """

    vector: Tensor
    keep: float = 1.0

    def __post_init__(self) -> None:
        if (
            not isinstance(self.vector, Tensor)
            or self.vector.ndim != 1
            or not self.vector.is_floating_point()
        ):
            got = tuple(self.vector.shape) if isinstance(self.vector, Tensor) else type(self.vector).__name__
            raise ShapeError(f"Steer.vector: got {got}; needed a floating-point vector [d].")
        object.__setattr__(self, "vector", self.vector.detach().to("cpu", torch.float64).clone())
        object.__setattr__(self, "keep", float(self.keep))
        if not (torch.isfinite(self.vector).all() and math.isfinite(self.keep)):
            raise NonFiniteError("a steering vector or its keep is NaN or infinite.")

    @property
    def rank(self) -> int:
        """0 where nothing moves, else the width."""
        return 0 if self.keep == 1 and not self.vector.any() else len(self.vector)

    def partial(self, alpha: float) -> Steer:
        """Return ``x -> x + alpha (self(x) - x)``."""
        return Steer(alpha * self.vector, 1 + alpha * (self.keep - 1))

    def __call__(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """Return the moved activations, same shape and dtype as x [..., d].

        Args:
            x: ``[..., d]``.
            weight: ``[n, 1]`` how far each of the n rows of x moves; 0 leaves it bit for bit, None moves all.

        Raises:
            ShapeError: another width.
        """
        d = len(self.vector)
        if x.shape[-1] != d:
            raise ShapeError(
                f"got activations of width {x.shape[-1]}; the steering vector at this site has {d}."
            )
        rows = x.reshape(-1, d).to(torch.promote_types(x.dtype, torch.float32))
        change = (self.keep - 1) * rows + self.vector.to(rows)
        moved = rows + (change if weight is None else weight.to(rows) * change)
        if weight is not None:
            moved = torch.where(weight != 0, moved, rows)  # an infinite value there would become NaN
        return moved.to(x.dtype).reshape(x.shape)


@dataclass(frozen=True, slots=True, eq=False)
class SteeringPlan:
    """An immutable map from sites to moves, for ``apply``, with the gate behind which they act.

    Unlike an erasure it has no equivalent in the weights as long as there is a gate, and none is offered.

    Args:
        steers: at least one site.
        fingerprint: of the model; another one is refused.
        gate: where the moves act; None everywhere. ``apply(..., gate=)`` takes its place.
        provenance: facts that travel with the file.

    Raises:
        InputError: no site.
    """

    steers: Mapping[Site, Steer]
    fingerprint: str
    gate: Gate | None = None
    provenance: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.steers:
            raise InputError("got a steering plan without sites; needed at least one.")
        object.__setattr__(self, "steers", MappingProxyType(dict(self.steers)))
        object.__setattr__(
            self, "provenance", MappingProxyType({k: str(v) for k, v in self.provenance.items()})
        )

    def __len__(self) -> int:
        return len(self.steers)

    def __repr__(self) -> str:
        gate = "no gate" if self.gate is None else f"gate at {self.gate.site}"
        return f"SteeringPlan({len(self)} sites, {gate}, model={self.fingerprint})"

    @property
    def erasers(self) -> NoReturn:
        """Refuse to be taken for an erasure plan.

        Raises:
            InputError: always.
        """
        raise InputError(
            "a steering plan holds no erasers and cannot be baked or verified as one; use apply(model, plan), or for one "
            "that only adds, export.control_vector(plan.directions(model), ...)."
        )

    def require(self, model: nn.Module) -> None:
        """Refuse a model that this plan was not made for.

        Raises:
            ModelMismatchError: other fingerprint.
            UnknownSiteError: a site names no module.
        """
        require_model(model, self.steers, self.fingerprint)

    def directions(self, model: nn.Module) -> dict[int, Tensor]:
        """Return layer -> vector, for ``export.control_vector``.

        Raises:
            InputError: a gate, a move that does not only add, or a site that is no block's output: such a file can add the
                same vector to every token behind a block, and nothing else.
        """
        if self.gate is not None or any(steer.keep != 1 for steer in self.steers.values()):
            raise InputError(
                "this plan has a gate or replaces activations; a control vector can only add the same to every token. Use "
                "apply(model, plan)."
            )
        arch, found = Architecture.of(model), {}
        for site, steer in self.steers.items():
            place = arch.locate(site)
            if place is None or place[0] != "resid_post":
                raise InputError(
                    f"{site} is not the output of a block, where a control vector acts; steer at resid_post."
                )
            found[place[1]] = steer.vector
        return found

    def save(self, path: str | Path, *, force: bool = False) -> Path:
        """Write one safetensors file, atomically.

        Raises:
            OutputExistsError: the file exists and ``force`` is False.
        """
        tensors = {f"{i}.vector": steer.vector for i, steer in enumerate(self.steers.values())}
        gate = None
        if self.gate is not None:
            tensors["gate.weight"] = self.gate.weight
            gate = {"site": str(self.gate.site), "threshold": self.gate.threshold, "per": self.gate.per}
        header = {
            "sites": [str(site) for site in self.steers],
            "keep": [steer.keep for steer in self.steers.values()],
            "gate": gate,
            "fingerprint": self.fingerprint,
            "provenance": dict(self.provenance),
        }
        return write_tensors(path, tensors, kind=_KIND, version=_VERSION, header=header, force=force)

    @classmethod
    def load(cls, path: str | Path) -> SteeringPlan:
        """Read what ``save`` wrote.

        Raises:
            FileFormatError: truncated, foreign or newer file.
        """
        tensors, header = read_tensors(path, kind=_KIND, version=_VERSION)
        try:
            steers = {
                Site.parse(site): Steer(tensors[f"{i}.vector"], keep)
                for i, (site, keep) in enumerate(zip(header["sites"], header["keep"], strict=True))
            }
            stored, gate = header["gate"], None
            if stored is not None:
                gate = Gate(
                    Site.parse(stored["site"]), tensors["gate.weight"], stored["threshold"], stored["per"]
                )
            return cls(steers, header["fingerprint"], gate, header["provenance"])
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise FileFormatError(f"{path} is not a whole steering plan ({error}); save it again.") from error


def steer_by_means(
    model: nn.Module,
    tokenizer: Any,
    contrast: Contrast,
    layers: Iterable[int],
    *,
    coefficient: float = 1.0,
    select: Select | str | None = None,
    gate: Gate | None = None,
    progress: bool = True,
) -> SteeringPlan:
    """Return the plan that adds ``coefficient · (mean of the second class - mean of the first)`` behind some blocks.

    That is CAA (Rimsky et al., arXiv 2312.06681); with one pair of prompts, ActAdd (Turner et al., arXiv 2308.10248), but
    added at every position. A negative coefficient steers towards the first class.

    Args:
        model: of a supported family.
        tokenizer: its tokenizer.
        contrast: prompts of two classes.
        layers: block numbers, negative ones count from the end.
        coefficient: times the difference.
        select: which tokens the means are of; default the last.
        gate: where to act, such as ``fact_gate``; default everywhere.
        progress: show a progress bar.

    Raises:
        InputError: not two classes, no such layer.
        as ``capture``.

    Example:
        ``plan = steer_by_means(model, tok, Contrast.from_pairs(pairs), [14]); apply(model, plan)``
    """
    if contrast.kind != "classes" or len(contrast.classes) != 2:
        raise InputError(
            f"got a contrast with the classes {list(contrast.classes)}; needed two, to steer between."
        )
    found = _captured(model, tokenizer, contrast, "resid_post", layers, select, progress)
    steers = {}
    for site, m in found.items():
        first, second = m.class_means()
        steers[site] = Steer(coefficient * (second - first))
    facts = {
        "made by": "steer_by_means",
        "from": contrast.classes[0],
        "to": contrast.classes[1],
        "coefficient": coefficient,
    }
    return _plan(model, steers, gate, facts)


def steer_to_random(
    model: nn.Module,
    tokenizer: Any,
    facts: Facts,
    layers: Iterable[int],
    gate: Gate,
    *,
    times: float = 5.0,
    seed: int = 0,
    progress: bool = True,
) -> SteeringPlan:
    """Return the plan that puts one random vector behind some blocks wherever a gate fires, as RMU would train it.

    Without a gate this destroys the model, so one is needed. It hides knowledge while the hooks are there, and removes
    none.

    Args:
        model: of a supported family.
        tokenizer: its tokenizer.
        facts: what is to be forgotten; the length of the vector is taken from its ``seen`` questions.
        layers: block numbers, negative ones count from the end.
        gate: where to act, at one of these sites or before.
        times: length of the vector, in root mean square lengths of the activations (adaptive RMU).
        seed: of the vector; layers share it.
        progress: show a progress bar.

    Raises:
        InputError: ``times`` is not above 0, no such layer.
        NotEnoughDataError: nothing is to be forgotten.
        as ``capture``.

    Example:
        ``plan = steer_to_random(model, tok, facts, [10], fact_gate(model, tok, facts, 10))``
    """
    if not 0 < times < math.inf:
        raise InputError(f"got times={times}; needed a number above 0.")
    contrast = _two_sets(facts)
    found = _captured(model, tokenizer, contrast, "resid_post", layers, None, progress)
    steers = {}
    for site, m in found.items():
        length = times * math.sqrt(float(m.cov_xx.diagonal().sum() + m.mean_x.square().sum()))
        steers[site] = Steer(length * rmu_directions(m.d, 1, seed)[0], keep=0.0)
    return _plan(
        model, steers, gate, {"made by": "steer_to_random", "facts": facts.name, "times": times, "seed": seed}
    )


def fact_gate(
    model: nn.Module,
    tokenizer: Any,
    facts: Facts,
    layer: int,
    *,
    per: Literal["token", "sequence"] = "token",
    progress: bool = True,
) -> Gate:
    """Return the gate before a block that fires on questions after what is to be forgotten, and not on others.

    A linear discriminant at the last token of ``seen`` questions: to be forgotten against retained and neighbours.

    Args:
        model: of a supported family.
        tokenizer: its tokenizer.
        facts: with something to forget and something to keep.
        layer: block number; edits at or behind this block can use the gate.
        per: see ``Gate``.
        progress: show a progress bar.

    Raises:
        NotEnoughDataError: nothing to forget or to keep, or no difference at this layer.
        as ``capture``.

    Example:
        ``gate = fact_gate(model, tokenizer, Facts.builtin("capitals"), 10)``
    """
    found = _captured(model, tokenizer, _two_sets(facts), "resid_pre", [layer], None, progress)
    ((site, moments),) = found.items()
    return Gate.fit(moments, site, fires_on=1, per=per)


def _two_sets(facts: Facts) -> Contrast:
    """Return the questions to keep (class 0) and to forget (class 1)."""
    kept = [q.prompt for q in facts.questions("seen", roles=["retain", "neighbour"])]
    forget = [q.prompt for q in facts.questions("seen", roles=["forget"])]
    if not kept or not forget:
        raise NotEnoughDataError(
            f"{facts.name!r} has {len(forget)} questions to forget and {len(kept)} to keep; needed some of both."
        )
    return Contrast.from_classes({"keep": kept, "forget": forget}, name=facts.name)


def _captured(
    model: nn.Module,
    tokenizer: Any,
    contrast: Contrast,
    kind: Literal["resid_pre", "resid_post"],
    layers: Iterable[int],
    select: Select | str | None,
    progress: bool,
) -> dict[Site, Moments]:
    sites = Architecture.of(model).sites(kind, layers=layers)
    return capture(model, tokenizer, contrast, sites, select=select, progress=progress)


def _plan(
    model: nn.Module, steers: Mapping[Site, Steer], gate: Gate | None, facts: Mapping[str, object]
) -> SteeringPlan:
    return SteeringPlan(steers, fingerprint(model), gate, {k: str(v) for k, v in facts.items()})
