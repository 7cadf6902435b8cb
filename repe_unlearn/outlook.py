"""Foresee: where a closed-form edit will work and how strong it should be, from one pass and no run of an edited model."""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .activations import gather
from .architectures import Architecture
from .closed_form import Place, check_target, places_of, wanted
from .contrast import Contrast
from .errors import InputError, NotEnoughDataError
from .facts import Facts, Question, Role
from .moments import Moments
from .shards import Rows
from .sites import Site
from .solvers.spectrum import Prediction, Tradeoff, choose
from .solvers.targets import Target
from .tables import html_table

__all__ = ["Outlook", "foresee"]

_ROLES: tuple[Role, ...] = ("forget", "retain", "neighbour")
_ALPHAS = tuple(10 ** (k / 8) for k in range(-8, 25))


@dataclass(frozen=True, slots=True, eq=False)
class Outlook:
    """What the strongest edit within a budget will do, weight by weight, if it is the only one.

    A share of little is little: what an early block writes at the last token hardly depends on the subject, and an edit
    that takes all of that away changes no answer. So weights are ranked by ``reach``.

    Attributes:
        predictions: input of a writer -> what the edit will do at the last token of ``seen`` questions; writers for
            which no edit is within the budget are left out.
        wanted: how large the wanted change is, as a share of the energy of the stream behind the block.
        layers: block of each.
        distortion: the budget of all chosen blocks together, a share of what is at retain and neighbour positions.
        share: how many blocks share it; the predictions are of edits within ``distortion / share`` each.
    """

    predictions: Mapping[Site, Prediction]
    wanted: Mapping[Site, float]
    layers: Mapping[Site, int]
    distortion: float
    share: int = 1

    def reach(self, site: Site) -> float:
        """Return how much of the wanted change the edit makes, as a share of the energy of the stream."""
        return (1 - self.predictions[site].remaining) * self.wanted[site]

    @property
    def best(self) -> tuple[Site, Prediction]:
        """The weight that reaches furthest."""
        return max(self.predictions.items(), key=lambda item: self.reach(item[0]))

    @property
    def chosen(self) -> tuple[int, ...]:
        """The blocks to edit: those with a weight that reaches at least three quarters as far as the best one."""
        most = self.reach(self.best[0])
        return tuple(sorted({self.layers[s] for s in self.predictions if self.reach(s) >= 0.75 * most}))

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
                "reach": self.reach(site),
                "wanted": self.wanted[site],
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
            f"Outlook({len(self.predictions)} weights; best {site}: changes {self.reach(site):.0%} of the stream, "
            f"{p.remaining:.0%} of what is wanted remains; "
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
    target: str | Target = "mean_retain",
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
        target: what is wanted, as for ``closed_form``.
        distortion: largest change at retain and at neighbour positions, as a share of what is there, of all blocks
            together that are chosen: each gets an equal part.
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
    check_target(target)
    asked = _asked(facts, target)
    contrast = Contrast.from_classes(
        {role: [q.prompt for q in questions] for role, questions in asked.items()}, name=facts.name
    )
    wordings = [q.template for questions in asked.values() for q in questions]
    arch = Architecture.of(model)
    places = places_of(model, arch, range(arch.n_layers) if layers is None else layers, writers)
    beside = {place: _beside(arch, place) for place in places}
    sites = dict.fromkeys(site for p in places for site in (p.keys, p.site, *beside[p]))
    rows = gather(model, tokenizer, contrast, list(sites), progress=progress)
    rises: dict[Site, list[Prediction]] = {}
    sizes: dict[Site, float] = {}
    for place in tqdm(places, desc="spectrum", unit="weight", disable=not progress, leave=False):
        parts = {
            role: _Part.of(rows[place.keys], rows[place.site], contrast, k, wordings)
            for k, role in enumerate(contrast.classes)
        }
        forget, source = parts["forget"], parts["decoy" if target == "mean_decoy" else "retain"]
        what, z = wanted(target, (forget.outputs, forget.wordings), (source.outputs, source.wordings))
        weight = place.linear.each(lambda w: w)
        moments = Moments.of(forget.keys, z)
        tradeoff = Tradeoff.of(
            weight,
            moments,
            parts["retain"].moments,
            target=what,
            ridge=ridge,
            neighbour=parts["neighbour"].moments if "neighbour" in parts else None,
            beta=beta,
        )
        rises[place.keys] = [tradeoff.at(alpha) for alpha in alphas]
        written, stream = (_energy(rows[site], contrast) for site in beside[place])
        # What a post-norm or a multiplier makes of the module's output, it makes of a change of it, too.
        size = tradeoff.wanted / float(forget.outputs.square().sum(1).mean())
        sizes[place.keys] = size * written / stream
    numbers = {place.keys: place.layer for place in places}
    # Every block that is chosen takes its part of the budget, so choosing more leaves less to each.
    share = 1
    while True:
        found = Outlook(_within(rises, distortion / share), sizes, numbers, distortion, share)
        if not found.predictions:
            raise InputError(
                f"no edit of any of {len(places)} weights stays within distortion={distortion:g}"
                + (f", shared by {share} blocks" if share > 1 else "")
                + "; allow more, or other layers."
            )
        if len(found.chosen) <= share:
            return found
        share = len(found.chosen)


def _within(rises: Mapping[Site, Sequence[Prediction]], distortion: float) -> dict[Site, Prediction]:
    """Return the strongest edit of every weight within a budget; a weight that has none is not for editing."""
    found = {}
    for site, predictions in rises.items():
        with contextlib.suppress(InputError):
            _, found[site] = choose({site: predictions}, distortion=distortion)
    return found


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """What a weight reads and writes at the questions of one role."""

    keys: Tensor
    outputs: Tensor
    wordings: Sequence[str]

    @classmethod
    def of(cls, keys: Rows, outputs: Rows, contrast: Contrast, index: int, wordings: Sequence[str]) -> _Part:
        labels = torch.tensor(contrast.labels)
        mine = labels[keys.owner] == index
        return cls(
            keys.x[mine].double(),
            outputs.x[labels[outputs.owner] == index].double(),
            [wordings[int(i)] for i in keys.owner[mine]],
        )

    @property
    def moments(self) -> Moments:
        return Moments.of(self.keys, self.outputs)


def _asked(facts: Facts, target: str | Target) -> dict[Role, list[Question]]:
    """Return the questions of every role that has some."""
    forgotten = {fact.relation for fact in facts if fact.role == "forget"}
    roles: tuple[Role, ...] = (*_ROLES, "decoy") if target == "mean_decoy" else _ROLES
    asked: dict[Role, list[Question]] = {role: [] for role in roles}
    for q in facts.questions("seen", roles=roles):
        fact = facts.facts[q.fact]
        if fact.role not in ("retain", "decoy") or fact.relation in forgotten:
            asked[fact.role].append(q)
    if not asked["forget"] or not asked["retain"]:
        raise NotEnoughDataError(
            f"{facts.name!r} needs facts with the role forget, and facts of the same relation with the role retain."
        )
    if target == "mean_decoy" and not asked["decoy"]:
        raise NotEnoughDataError("target='mean_decoy' needs facts with the role 'decoy'; there are none.")
    return {role: questions for role, questions in asked.items() if questions}


def _beside(arch: Architecture, place: Place) -> tuple[Site, Site]:
    """Return where what the edited module adds to the stream is seen, and the stream behind its block.

    Where the target is about the stream itself both are the stream.
    """
    (stream,) = arch.sites("resid_post", layers=[place.layer])
    if place.site == stream:
        return stream, stream
    (written,) = arch.sites("attn_out" if place.kind == "attn_out" else "mlp_out", layers=[place.layer])
    return written, stream


def _energy(rows: Rows, contrast: Contrast) -> float:
    """Return the mean square length at forget positions."""
    mine = torch.tensor(contrast.labels)[rows.owner] == contrast.classes.index("forget")
    return float(rows.x[mine].double().square().sum(1).mean())
