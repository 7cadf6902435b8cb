"""Foresee: where a closed-form edit will work and how strong it should be, from one pass and no run of an edited model."""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from tqdm.auto import tqdm

from .activations import gather
from .architectures import Architecture
from .closed_form import places_of
from .contrast import Contrast
from .errors import InputError, NotEnoughDataError
from .facts import Facts, Role
from .moments import Moments
from .sites import Site
from .solvers import targets
from .solvers.spectrum import Prediction, Tradeoff, choose
from .solvers.targets import Target
from .tables import html_table

__all__ = ["Outlook", "foresee"]

_ROLES: tuple[Role, ...] = ("forget", "retain", "neighbour")
_ALPHAS = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)


@dataclass(frozen=True, slots=True, eq=False)
class Outlook:
    """What the strongest edit within a budget will do, weight by weight, if it is the only one.

    Attributes:
        predictions: input of a writer -> what the edit will do at the last token of ``seen`` questions; writers for
            which no edit is within the budget are left out.
        layers: block of each.
        distortion: the budget, a share of what is at retain and neighbour positions.
    """

    predictions: Mapping[Site, Prediction]
    layers: Mapping[Site, int]
    distortion: float

    @property
    def best(self) -> tuple[Site, Prediction]:
        """The weight that takes most away."""
        return min(self.predictions.items(), key=lambda item: item[1].remaining)

    @property
    def chosen(self) -> tuple[int, ...]:
        """The blocks to edit: those with a weight that takes away at least three quarters of what the best one does."""
        most = 1 - self.best[1].remaining
        return tuple(
            sorted({self.layers[s] for s, p in self.predictions.items() if 1 - p.remaining >= 0.75 * most})
        )

    @property
    def alpha(self) -> float:
        """The weight of retain: the geometric mean over the chosen blocks of what each needs to stay within the budget."""
        chosen = set(self.chosen)
        logs = [math.log(p.alpha) for s, p in self.predictions.items() if self.layers[s] in chosen]
        return math.exp(statistics.fmean(logs))

    def rows(self) -> list[dict[str, Any]]:
        """Return one record per weight."""
        return [
            {
                "site": str(site),
                "layer": self.layers[site],
                "alpha": p.alpha,
                "remaining": p.remaining,
                "distortion": p.distortion,
                "neighbour": p.neighbour,
                "dof": p.dof,
                "relative": p.relative,
            }
            for site, p in self.predictions.items()
        ]

    def __repr__(self) -> str:
        site, p = self.best
        return (
            f"Outlook({len(self.predictions)} weights; best {site}: {p.remaining:.0%} of what is wanted remains; "
            f"layers {', '.join(map(str, self.chosen))}, alpha {self.alpha:.2g})"
        )

    def _repr_html_(self) -> str:
        rows = self.rows()
        shown = [[f"{v:.3g}" if isinstance(v, float) else v for v in row.values()] for row in rows]
        return html_table(repr(self), rows[0], shown)


def foresee(
    model: nn.Module,
    tokenizer: Any,
    facts: Facts,
    *,
    layers: Iterable[int] | None = None,
    writers: Sequence[Literal["mlp_out", "attn_out"]] = ("mlp_out",),
    target: Target | None = None,
    distortion: float = 0.01,
    ridge: float = 14.0,
    beta: float = 30.0,
    alphas: Iterable[float] = _ALPHAS,
    progress: bool = True,
) -> Outlook:
    """Return what ``closed_form`` would do with single weights at the last token of ``seen`` questions, editing none.

    Each weight alone, with the others as they are: where several are edited in turn, later ones find less to do. It is
    exact at these positions and says nothing of other prompts; where ``dof`` is near the number of forget questions
    the edit fits those, so measure afterwards.

    Memory: what the weights read and write at all questions, float32; two eigendecompositions per weight.

    Args:
        model: of a supported family, weights in memory and not quantised.
        tokenizer: its tokenizer.
        facts: with something to forget and, of the same relations, to retain; neighbours count where there are any.
        layers: block numbers; default all.
        writers: ``mlp_out``, ``attn_out`` or both; default the MLP alone, which writes most of an answer.
        target: what is wanted; default ``targets.mean_retain()``, over all wordings together.
        distortion: largest change at retain and at neighbour positions, as a share of what is there.
        ridge: as for ``closed_form``.
        beta: weight of neighbours, as for ``closed_form``.
        alphas: weights of retain to choose from, one per weight.
        progress: show progress bars.

    Raises:
        NotEnoughDataError: nothing to forget or nothing to retain.
        InputError: no edit of any weight is within the budget; no such layer.
        UnsupportedModelError: a mixture of experts.

    Example:
        ``outlook = foresee(model, tokenizer, facts, layers=range(8, 24)); outlook.chosen, outlook.alpha``
    """
    forgotten = {fact.relation for fact in facts if fact.role == "forget"}
    asked: dict[str, list[str]] = {role: [] for role in _ROLES}
    for q in facts.questions("seen", roles=_ROLES):
        fact = facts.facts[q.fact]
        if fact.role != "retain" or fact.relation in forgotten:
            asked[fact.role].append(q.prompt)
    if not asked["forget"] or not asked["retain"]:
        raise NotEnoughDataError(
            f"{facts.name!r} needs facts with the role forget, and facts of the same relation with the role retain."
        )
    contrast = Contrast.from_classes({role: texts for role, texts in asked.items() if texts}, name=facts.name)
    labels = torch.tensor(contrast.labels)
    arch = Architecture.of(model)
    places = places_of(model, arch, range(arch.n_layers) if layers is None else layers, writers)
    sites = dict.fromkeys(site for place in places for site in (place.keys, place.site))
    rows = gather(model, tokenizer, contrast, list(sites), progress=progress)
    found: dict[Site, Prediction] = {}
    for place in tqdm(places, desc="spectrum", unit="weight", disable=not progress, leave=False):
        keys, outputs = rows[place.keys], rows[place.site]
        parts = [
            Moments.of(
                keys.x[labels[keys.owner] == k].double(), outputs.x[labels[outputs.owner] == k].double()
            )
            for k in range(len(contrast.classes))
        ]
        weight = place.linear.each(lambda w: w)
        tradeoff = Tradeoff.of(
            weight,
            parts[0],
            parts[1],
            target=target or targets.mean_retain(),
            ridge=ridge,
            neighbour=parts[2] if len(parts) > 2 else None,
            beta=beta,
        )
        predictions = [tradeoff.at(alpha) for alpha in alphas]
        with contextlib.suppress(InputError):  # none is within the budget: this weight is not for editing
            _, found[place.keys] = choose({0: predictions}, distortion=distortion)
    if not found:
        raise InputError(
            f"no edit of any of {len(places)} weights stays within distortion={distortion:g}; allow more, or other layers."
        )
    return Outlook(found, {place.keys: place.layer for place in places}, distortion)
