"""Ablate the edit: project out what an edit added to the stream, and see whether the knowledge shows again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from repe_unlearn.activations import BATCH_TOKENS, Rows, gather
from repe_unlearn.answers import Answers, answers
from repe_unlearn.architectures import Architecture
from repe_unlearn.audit.edits import Written, replaced, written
from repe_unlearn.audit.scores import Scores
from repe_unlearn.audit.tries import asked, curves, shares, strongest, values
from repe_unlearn.contrast import Contrast
from repe_unlearn.errors import InputError, NotEnoughDataError
from repe_unlearn.facts import Facts, Form
from repe_unlearn.linears import floating
from repe_unlearn.sites import Site
from repe_unlearn.taps import Tap, tap

OUTLIER = 3.0  # standard deviations
DIRECTIONS = (1, 2, 3, 4)
STARTS = 4


@dataclass(frozen=True, slots=True, eq=False)
class Ablation:
    """Directions to project out of a running model.

    Attributes:
        label: what they are, in words.
        at: site -> ``[d, k]``, orthonormal columns.
    """

    label: str
    at: Mapping[Site, Tensor]


def ablations(
    model: nn.Module,
    tokenizer: Any,
    facts: Facts,
    *,
    base: nn.Module | None = None,
    layers: Sequence[int] | None = None,
    batch_tokens: int = BATCH_TOKENS,
    progress: bool = True,
) -> tuple[Ablation, ...]:
    """Return the ways of ablating the edit of a model that ``ablation`` tries.

    One per layer: how the mean of the stream at the last token of prompts to be forgotten differs from that of retained
    ones, projected out from that block on. If the model before the edit is known, also the 1 to 4 leading left singular
    vectors of the change of every weight that writes into the stream, projected out of what it writes.

    Prompts whose activation is 3 standard deviations or more larger or smaller than usual do not count for the means,
    nor does a first position, where the stream is that of an attention sink.

    Args:
        model: the edited model, of a supported family.
        tokenizer: its tokenizer.
        facts: with the roles forget and retain.
        base: the model before the edit.
        layers: where the projection of the mean difference begins; default up to 4, evenly spaced from the first edited
            block on (from the first block where the edit is not known).
        batch_tokens: positions per batch.
        progress: show progress bars.

    Raises:
        NotEnoughDataError: no prompts of one of the two roles.
        UnsupportedArchitectureError: the family has no row.
        ModelMismatchError: ``base`` is another model.
    """
    arch = Architecture.of(model)
    edits = () if base is None else written(model, base, most=max(DIRECTIONS))
    if layers is None:
        first = min((w.layer for w in edits), default=0)
        layers = np.unique(np.linspace(first, arch.n_layers - 1, STARTS).round().astype(int)).tolist()
    stream = arch.sites("resid_post")
    starts = arch.sites("resid_post", layers=layers)
    found = []
    differences = _mean_differences(model, tokenizer, facts, starts, batch_tokens, progress)
    for site, direction in differences.items():
        behind = stream[stream.index(site) :]
        label = f"mean difference, from block {stream.index(site)} on"
        found.append(Ablation(label, dict.fromkeys(behind, direction)))
    return (*found, *(_singular(edits, k) for k in DIRECTIONS if edits))


def _singular(edits: Sequence[Written], k: int) -> Ablation:
    parts: dict[Site, list[Tensor]] = {}
    for one in edits:
        parts.setdefault(one.site, []).append(one.left[:, :k])
    at = {site: _basis(torch.cat(columns, 1)) for site, columns in parts.items()}
    return Ablation(
        f"{k} leading {'direction' if k == 1 else 'directions'} of the edit, out of what is edited", at
    )


def _basis(columns: Tensor) -> Tensor:
    """Return an orthonormal basis of what some columns span."""
    u, s, _ = torch.linalg.svd(columns, full_matrices=False)
    return u[:, s > 1e-6 * s[0]]


def _mean_differences(
    model: nn.Module, tokenizer: Any, facts: Facts, sites: Sequence[Site], batch_tokens: int, progress: bool
) -> dict[Site, Tensor]:
    prompts = {
        q.prompt: facts.facts[q.fact].role for q in facts.questions("seen", roles=["forget", "retain"])
    }
    if set(prompts.values()) != {"forget", "retain"}:
        raise NotEnoughDataError(
            f"{facts.name!r} has no facts to be forgotten or none to be retained; the mean difference needs both roles."
        )
    contrast = Contrast.from_labels(list(prompts), list(prompts.values()), classes=["retain", "forget"])
    rows = gather(
        model, tokenizer, contrast, sites, select="last", batch_tokens=batch_tokens, progress=progress
    )
    return {site: difference(found) for site, found in rows.items()}


def difference(rows: Rows) -> Tensor:
    """Return the unit vector ``[d, 1]`` from the mean of class 0 to that of class 1, without outliers of the norm."""
    means = []
    for label in (0, 1):
        x = rows.x[rows.z == label].double()
        size = x.norm(dim=1)
        spread = size.std(correction=0)
        means.append(x[(size - size.mean()).abs() <= OUTLIER * spread].mean(0))
    v = means[1] - means[0]
    return (v / v.norm())[:, None]


def random_ablations(which: Sequence[Ablation], seed: int = 0) -> tuple[Ablation, ...]:
    """Return the control of some ablations: at the same sites as many directions, drawn at random.

    Sites that share directions share the random ones too.
    """
    generator = torch.Generator().manual_seed(seed)
    found = []
    for one in which:
        drawn: dict[int, Tensor] = {}
        for u in one.at.values():
            if id(u) not in drawn:
                drawn[id(u)] = torch.linalg.qr(torch.randn(u.shape, generator=generator, dtype=u.dtype))[0]
        at = {site: drawn[id(u)] for site, u in one.at.items()}
        found.append(Ablation(f"random: {one.label}", at))
    return tuple(found)


def ablation(
    model: nn.Module,
    tokenizer: Any,
    facts: Facts,
    *,
    base: nn.Module | None = None,
    which: Sequence[Ablation] | None = None,
    forms: Sequence[Form] = ("seen", "unseen"),
    seed: int = 0,
    batch_tokens: int = BATCH_TOKENS,
    progress: bool = True,
) -> Scores:
    """Return the scores of facts to be forgotten and of decoys while the strongest ablation of the edit is active.

    All ablations are tried, and one is taken for all facts by a rule that treats decoys like facts to be forgotten, see
    ``strongest``; so trying many makes no leak. Beside it stands what a random subspace of equal rank at the same sites
    brings back, in the settings; it does not compete. The model is not written and no hook is left on it.

    Give ``which`` for other models, so that all are attacked alike: the original with the directions of the edited
    model (an ablation that harms it is too strong to say anything), the edited one with ``random_ablations``.

    Args:
        model: the model to attack; a causal language model of a supported family.
        tokenizer: its tokenizer.
        facts: with the roles forget and retain, and best also decoy.
        base: the model before the edit, for the singular vectors of the edit.
        which: what to project out; default ``ablations(model, tokenizer, facts, base=base)``.
        forms: wordings to ask in.
        seed: of the random subspace.
        batch_tokens: positions per batch.
        progress: show progress bars.

    Raises:
        InputError: no ablation.
        as ``ablations`` and ``answers``.

    Example:
        ``found = ablations(edited, tokenizer, facts, base=base)``;
        ``ablation(edited, tokenizer, facts, which=found).of(facts, "forget").mean()``
    """
    questions = asked(facts, forms)
    if which is None:
        which = ablations(model, tokenizer, facts, base=base, batch_tokens=batch_tokens, progress=progress)
    if not which:
        raise InputError("got no ablation to try; needed at least one.")

    def tried(one: Ablation) -> Answers:
        with tap(model, {site: _without(u) for site, u in one.at.items()}):
            return answers(
                model, tokenizer, facts, questions=questions, batch_tokens=batch_tokens, progress=False
            )

    tries: dict[int, Answers] = {}
    for i, one in enumerate(tqdm(which, desc="ablation", unit="try", disable=not progress, leave=False)):
        tries[i] = tried(one)
    best = strongest(tries)
    # No try: it says what projecting out anything would have brought back.
    control = tried(random_ablations([which[best]], seed)[0])
    settings = {
        "ablation": which[best].label,
        "share on forgotten facts": f"{tries[best].mean(shares(tries[best]), 'forget'):.2f}",
        "a random subspace of equal rank": f"{control.mean(shares(control), 'forget'):.2f}",
        "tried": "; ".join(one.label for one in which),
        "choice": "highest mean over facts to be forgotten and decoys together",
    }
    scores = values(tries[best])
    shown = curves(
        "Ablate the edit",
        tries,
        x_label="try",
        point_labels=tuple(one.label for one in which),
        marker_only=True,
        caption="What comes back while directions are projected out of the running model; the best try is the leak.",
    )
    return Scores("ablation", "T1", scores, "share", shown, settings)


def _without(basis: Tensor) -> Tap:
    def project(x: Tensor) -> Tensor:
        u = basis.to(x.device, torch.promote_types(x.dtype, torch.float32))
        new = x - ((x.to(u.dtype) @ u) @ u.T).to(x.dtype)
        # The first position is an attention sink: far larger than the rest, and without it a model breaks.
        return torch.cat([x[:, :1], new[:, 1:]], 1)

    return project


def reverted(
    model: nn.Module,
    tokenizer: Any,
    facts: Facts,
    *,
    base: nn.Module,
    ks: Sequence[int] = DIRECTIONS,
    forms: Sequence[Form] = ("seen", "unseen"),
    seed: int = 0,
    batch_tokens: int = BATCH_TOKENS,
    progress: bool = True,
) -> Scores:
    """Return the scores after the largest components of the edit are subtracted from the weights again.

    This says how few directions carry an edit. It is no evidence that the edited model still knows: what is put back
    comes from ``base``, and a model that never knew gains from it too. The model is restored bit for bit.

    Args:
        model: the edited model, of a supported family.
        tokenizer: its tokenizer.
        facts: with the role forget, and best also decoy.
        base: the model before the edit.
        ks: how many components of every weight that writes into the stream.
        forms: wordings to ask in.
        seed: not used, nothing is random here.
        batch_tokens: positions per batch.
        progress: show progress bars.

    Raises:
        InputError: no weight that writes into the stream differs between the two, or no ``ks``.
        as ``answers``.
    """
    questions = asked(facts, forms)
    edits = written(model, base, most=max(ks, default=1))
    if not edits or not ks:
        raise InputError(
            f"got {len(edits)} edited weights that write into the stream and ks={list(ks)}; needed at least one each."
        )
    tries: dict[int, Answers] = {}
    for k in tqdm(ks, desc="revert a part", unit="try", disable=not progress, leave=False):
        smaller = {
            one.name: one.without(floating(model, one.name), floating(base, one.name), k) for one in edits
        }
        with replaced(model, smaller):
            tries[k] = answers(
                model, tokenizer, facts, questions=questions, batch_tokens=batch_tokens, progress=False
            )
    best = strongest(tries)
    settings = {
        "components": str(best),
        "tried": ", ".join(map(str, ks)),
        "evidence": "none: it uses the base",
    }
    scores = values(tries[best])
    shown = curves("Revert a part of the edit", tries, x_label="components subtracted")
    return Scores("revert", "T2", scores, "share", shown, settings)
