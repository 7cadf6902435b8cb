"""Methods: every way to unlearn that the package knows, by name, each from the same material to a Patch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import nn

from . import train
from .architectures import Architecture
from .closed_form import closed_form, default_layers
from .edit import Edit
from .errors import InputError, NotEnoughDataError
from .facts import Facts, Sample
from .facts_files import Corpus
from .fingerprints import fingerprint
from .linears import floating
from .localize import (
    attribute,
    fact_pairs,
    neuron_activity,
    rank_neurons,
    selective_pruning,
    suppress_heads,
    suppress_neurons,
)
from .patch import Patch
from .train.loop import positive
from .train.trainee import choose

__all__ = ["METHODS", "Method", "Request", "method_named"]


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """What is asked of a method: a model, and what it is to forget and to keep.

    Attributes:
        model: in memory and not quantised; no method writes to it.
        tokenizer: its fast tokenizer.
        source: what the samples were made from.
        corpus: free text to keep, or None.
        forget: samples to forget.
        retain: samples to keep, neighbours included.
        seed: of everything random.
        progress: show progress bars.
    """

    model: nn.Module
    tokenizer: Any
    source: Facts | Corpus
    corpus: Corpus | None
    forget: tuple[Sample, ...]
    retain: tuple[Sample, ...]
    seed: int = 0
    progress: bool = True

    @classmethod
    def of(
        cls,
        model: nn.Module,
        tokenizer: Any,
        source: Facts | Corpus,
        retain: Corpus | None = None,
        *,
        seed: int = 0,
        progress: bool = True,
    ) -> Request:
        """Return the request to forget what ``source`` says; of facts only ``seen`` wordings go in, and no decoys.

        Args:
            model: the model.
            tokenizer: its tokenizer.
            source: facts with their roles, or free text to forget.
            retain: free text to keep; needed with free text, and added to what facts retain.
            seed: of everything random.
            progress: show progress bars.

        Raises:
            NotEnoughDataError: nothing to forget, or nothing to keep.
        """
        kept = () if retain is None else retain.samples()
        if isinstance(source, Facts):
            forget = source.samples("seen", roles=["forget"])
            kept = (*source.samples("seen", roles=["retain", "neighbour"]), *kept)
        else:
            forget = source.samples()
        if not forget or not kept:
            what = "retain" if forget else "forget"
            raise NotEnoughDataError(
                f"{source.name!r} has nothing to {what}; needed facts with the role {what}"
                f"{' or neighbour' if forget else ''}, or a corpus to retain."
            )
        return cls(model, tokenizer, source, retain, forget, kept, seed, progress)


@dataclass(frozen=True, slots=True, eq=False)
class Method:
    """One way to unlearn.

    Attributes:
        name: key in ``METHODS``.
        summary: one line.
        make: from a request and options to a patch.
        options: names of its options.
        defaults: settings for models of some hundred million parameters, used where no others are given.
        reference: settings of the published code, for models of some billion parameters; ``run(..., **m.reference)``.
    """

    name: str
    summary: str
    make: Callable[..., Patch]
    options: tuple[str, ...]
    defaults: Mapping[str, Any]
    reference: Mapping[str, Any]

    def settings(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return the defaults with these options in their place.

        Raises:
            InputError: an option that the method does not have.
        """
        if unknown := sorted(set(options) - set(self.options)):
            raise InputError(
                f"{self.name} has no option {unknown[0]!r}; needed some of {', '.join(sorted(self.options))}."
            )
        return {**self.defaults, **options}

    def run(
        self,
        model: nn.Module,
        tokenizer: Any,
        source: Facts | Corpus,
        retain: Corpus | None = None,
        *,
        seed: int = 0,
        progress: bool = True,
        **options: Any,
    ) -> Patch:
        """Return the patch of this method; the model is left as it is, bit for bit.

        Args:
            model: in memory and not quantised.
            tokenizer: its fast tokenizer.
            source: facts, of which only ``seen`` wordings are used, or free text to forget.
            retain: free text to keep.
            seed: of everything random.
            progress: show progress bars.
            options: in place of ``defaults``.

        Raises:
            InputError: an unknown option, or one of an unusable value.
            NotEnoughDataError: nothing to forget or to keep.
            and what the method raises.

        Example:
            ``patch = METHODS["npo"].run(model, tokenizer, Facts.builtin("capitals"), steps=40)``
        """
        chosen = self.settings(options)
        request = Request.of(model, tokenizer, source, retain, seed=seed, progress=progress)
        patch = self.make(request, **chosen)
        facts = {"method": self.name, "seed": str(seed), "forgets": source.name}
        return replace(patch, provenance={**patch.provenance, **facts})


def method_named(name: str) -> Method:
    """Return one of ``METHODS``.

    Raises:
        InputError: there is none of this name.
    """
    if name not in METHODS:
        raise InputError(f"got the method {name!r}; needed one of {', '.join(METHODS)}.")
    return METHODS[name]


def _closed_form(r: Request, **options: Any) -> Patch:
    return closed_form(r.model, r.tokenizer, r.source, r.corpus, seed=r.seed, progress=r.progress, **options)


def _loss(
    r: Request,
    *,
    objective: str,
    alpha: float | None = None,
    gamma: float | None = None,
    beta: float | None = None,
    **options: Any,
) -> Patch:
    chosen = train.METHODS[objective]
    weights = {"alpha": alpha, "gamma": gamma}
    chosen = replace(chosen, **{name: value for name, value in weights.items() if value is not None})
    if beta is not None:
        loss: Callable[..., torch.Tensor] = chosen.forget  # npo and simnpo, which have a beta
        chosen = replace(chosen, forget=partial(loss, beta=beta))
    run = train.unlearn(
        r.model,
        r.tokenizer,
        r.forget,
        r.retain,
        method=chosen,
        seed=r.seed,
        progress=r.progress,
        **_parameters(r.model, options),
    )
    return run.patch


def _rmu(r: Request, *, layer: int | None = None, c: float | Literal["adaptive"], **options: Any) -> Patch:
    layer = Architecture.of(r.model).n_layers // 3 if layer is None else layer
    run = train.rmu(
        r.model,
        r.tokenizer,
        r.forget,
        r.retain,
        layer=layer,
        c=c,
        seed=r.seed,
        progress=r.progress,
        **options,
    )
    return run.patch


def _influence(r: Request, **options: Any) -> Patch:
    chosen = _parameters(r.model, options)
    return train.influence(
        r.model, r.tokenizer, r.forget, r.retain, seed=r.seed, progress=r.progress, **chosen
    )


def _fisher(r: Request, **options: Any) -> Patch:
    chosen = _parameters(r.model, options)
    return train.fisher_dampening(r.model, r.tokenizer, r.forget, r.retain, progress=r.progress, **chosen)


def _pruning(
    r: Request, *, layers: Sequence[int] | None = None, fraction: float = 0.03, eps: float = 1e-5
) -> Patch:
    forget, retain = (
        neuron_activity(r.model, r.tokenizer, [s.text for s in samples], layers=layers, progress=r.progress)
        for samples in (r.forget, r.retain)
    )
    return selective_pruning(r.model, forget, retain, fraction=fraction, eps=eps)


def _neurons(
    r: Request,
    *,
    count: int = 100,
    scale: float = 0.0,
    layers: Sequence[int] | None = None,
    steps: int = 5,
    shared: float = 0.5,
) -> Patch:
    """Knowledge neurons (Dai et al., arXiv 2104.08696, section 5.2): those that raise the answers to a whole relation."""
    _require_facts(r, "neuron_suppression")
    positive(count=count)
    depth = Architecture.of(r.model).n_layers
    ranked = rank_neurons(
        r.model,
        r.tokenizer,
        [(s.prompt, s.completion) for s in r.forget],
        steps=steps,
        threshold=0.0,
        shared=shared,
        # Integrating costs a pass per layer and step; what a fact's answer hangs on is written late (as in Dai et al.).
        layers=range(default_layers(depth).start, depth) if layers is None else layers,
        progress=r.progress,
    )
    if not ranked:
        raise InputError(f"no neuron raises the answers in {shared:.0%} of the wordings; lower shared.")
    mode: Literal["negative", "zero"] = "negative" if scale else "zero"
    return suppress_neurons(r.model, ranked[:count], mode=mode, scale=scale)


def _heads(
    r: Request,
    *,
    count: int = 10,
    scale: float = 0.0,
    layers: Sequence[int] | None = None,
    pairs: int = 24,
    steps: int = 5,
) -> Patch:
    """Heads that bring the right answer back when only they see the right subject."""
    facts = _require_facts(r, "head_suppression")
    positive(count=count)
    found = fact_pairs(r.model, r.tokenizer, facts, most=pairs, progress=r.progress)
    effect = attribute(
        r.model, r.tokenizer, found, "heads", path="inputs", steps=steps, layers=layers, progress=r.progress
    )
    ranked = [(layer, int(head)) for layer, head, share in effect.top(effect.recovery.numel()) if share > 0]
    if not ranked:
        raise InputError(f"no head works for the answers to {facts.name!r}; give more pairs or other layers.")
    mode: Literal["negative", "zero"] = "negative" if scale else "zero"
    return suppress_heads(r.model, ranked[:count], mode=mode, scale=scale)


def _require_facts(r: Request, name: str) -> Facts:
    if not isinstance(r.source, Facts):
        raise InputError(f"{name} needs facts, whose answers it looks for in the model; got free text.")
    return r.source


def _random(
    r: Request,
    *,
    relative: float = 0.02,
    rank: int | None = None,
    layers: Sequence[int] | None = None,
    parameters: str | Sequence[str] | None = None,
) -> Patch:
    if not 0 < relative < float("inf") or (rank is not None and rank < 1):
        raise InputError(f"got relative={relative}, rank={rank}; needed a size above 0 and a rank from 1 on.")
    names = _parameters(r.model, {"layers": layers, "parameters": parameters})["parameters"]
    generator = torch.Generator().manual_seed(r.seed)
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    edits = {}
    for name in choose(r.model, names, matrices=rank is not None):
        weight, rule = floating(r.model, name), f"random, {relative:g} of the weight"
        if rank is None:
            edit = Edit(draw(*weight.shape), None, rule)
        else:
            *stack, rows, cols = weight.shape
            edit = Edit(draw(*stack, rows, rank), draw(*stack, rank, cols), rule)
        factor = relative * float(weight.double().norm()) / edit.norm()
        edits[name] = Edit(factor * edit.left, edit.right, rule)
    return Patch(edits, fingerprint(r.model))


def _parameters(model: nn.Module, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options with ``layers``, whose MLP writers are meant, turned into ``parameters``; default all of these."""
    rest = {name: value for name, value in options.items() if name not in ("layers", "parameters")}
    layers, parameters = options.get("layers"), options.get("parameters")
    if layers is not None and parameters is not None:
        raise InputError(
            "got both layers and parameters; needed one: layers means the MLP writers of these layers."
        )
    if parameters is None:
        parameters = train.mlp_writers(model, layers)
    return {**rest, "parameters": parameters}


def _options(function: Callable[..., Any], *more: str, without: Sequence[str] = ()) -> tuple[str, ...]:
    """Return the keyword-only arguments of a function that a user may set."""
    found = inspect.signature(function).parameters.values()
    fixed = {"seed", "progress", "method", "provenance", *without}
    return (*(p.name for p in found if p.kind is p.KEYWORD_ONLY and p.name not in fixed), *more)


def _table(*methods: Method) -> Mapping[str, Method]:
    return MappingProxyType({method.name: method for method in methods})


def _by_loss(name: str, summary: str, **defaults: Any) -> Method:
    known = _options(train.unlearn, "layers", "alpha", "gamma", *(["beta"] if "npo" in name else []))
    # Ten epochs of 400 samples in steps of 32: the reference code's, for models of 1 to 8 billion parameters.
    reference = {"steps": 125, "lr": 1e-5, "batch": 8, "accumulate": 4, "parameters": "all"}
    small = {"steps": 40, "lr": 1e-4, "batch": 16, "accumulate": 1, **defaults}
    return Method(name, summary, partial(_loss, objective=name), known, small, reference)


def _by_solving(name: str, becomes: str, **defaults: Any) -> Method:
    known = _options(closed_form, without=["batch_tokens"])
    return Method(name, f"one solve per layer: forget positions {becomes}", _closed_form, known, defaults, {})


_RMU_SMALL = {"steps": 120, "lr": 1e-3, "batch": 8, "alpha": 100.0}
_RMU_REFERENCE = {"layer": 7, "steps": 80, "lr": 5e-5, "batch": 4, "alpha": 1200.0}

METHODS: Mapping[str, Method] = _table(
    _by_solving("closed_form", "become like the mean of retain in the same wording"),
    _by_solving("closed_form_decoy", "become like subjects that nobody knows", target="mean_decoy"),
    _by_solving("closed_form_rmu", "hold one random vector c·u", target="rmu"),
    _by_solving("closed_form_zero", "are written nothing to", target="zero"),
    _by_solving("closed_form_redirect", "move away from forget towards retain", target="redirect"),
    Method(
        "rmu",
        "gradient RMU: forget texts at one layer go to c·u, retain texts stay",
        _rmu,
        _options(train.rmu, without=["scale"]),
        {**_RMU_SMALL, "c": 20.0},
        {**_RMU_REFERENCE, "c": 20.0},
    ),
    Method(
        "rmu_adaptive",
        "gradient RMU with c a multiple of the norm that is there",
        partial(_rmu, c="adaptive"),
        _options(train.rmu, without=["c"]),
        {**_RMU_SMALL, "scale": 5.0},
        {**_RMU_REFERENCE, "scale": 5.0},
    ),
    _by_loss("grad_ascent", "make the answers unlikely; nothing holds the rest", steps=10),
    _by_loss("grad_diff", "make the answers unlikely and keep those to retain likely", steps=30),
    _by_loss("npo", "negative preference optimisation beside a retain loss"),
    _by_loss("simnpo", "NPO without a reference, per token, beside a retain loss"),
    Method(
        "influence",
        "one Newton step up the forget loss, in the curvature of retain",
        _influence,
        _options(train.influence, "layers"),
        {"curvature": "kfac", "damping": 0.1, "gain": 4.0},
        {},
    ),
    Method(
        "fisher_dampening",
        "shrink the weights that matter far more to forget than to retain",
        _fisher,
        _options(train.fisher_dampening, "layers"),
        {"alpha": 3.0, "bound": 1.0},
        {"alpha": 10.0, "bound": 1.0, "parameters": "all"},
    ),
    Method(
        "selective_pruning",
        "switch off the neurons that are busier on forget than on retain",
        _pruning,
        _options(_pruning),
        {"fraction": 0.005},
        {"fraction": 0.03},
    ),
    Method(
        "neuron_suppression",
        "switch off the neurons whose activity makes the answers likely (knowledge neurons)",
        _neurons,
        _options(_neurons),
        {"count": 100},
        {},
    ),
    Method(
        "head_suppression",
        "switch off the attention heads that carry the subject to the answer",
        _heads,
        _options(_heads),
        {"count": 10},
        {},
    ),
    Method("random", "control: a random edit of a given size", _random, _options(_random), {}, {}),
)
"""The methods by name; a new one is one more line here."""
