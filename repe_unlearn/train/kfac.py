"""K-FAC: the curvature of a linear layer as a Kronecker product, inverted in closed form."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from repe_unlearn.errors import InputError
from repe_unlearn.sites import Site
from repe_unlearn.taps import Tap, tap

from .gradients import Labels, by_sample, ridge_of
from .samples import Tokens
from .trainee import Trainee


def kfac(
    trained: Trainee,
    tokens: Sequence[Tokens],
    g: Sequence[Tensor],
    pad_id: int,
    damping: float,
    labels: Labels,
    generator: torch.Generator,
    *,
    progress: bool,
) -> list[Tensor]:
    """Return ``(A ⊗ B + λI)⁻¹ g`` for every weight: A the moments of its inputs, B those of its output gradients.

    A and B are sums over the positions that the layer sees (the last of each text, from which nothing is predicted, is
    not run). Their product over (positions × tokens that count) stands for the Gauss-Newton matrix of the NLL per
    token, exactly so for one sample of one position.

    Raises:
        InputError: a chosen parameter is no weight of a linear layer.
    """
    turned = [_turned(trained.model, name) for name in trained.names]
    moments: dict[Site, Tensor] = {}
    positions: Counter[Site] = Counter()

    def add(site: Site, x: Tensor) -> None:
        rows = x.detach().reshape(-1, x.shape[-1]).double()
        moments[site] = moments.get(site, 0) + rows.T @ rows
        positions[site] += len(rows)

    def reader(site: Site) -> Tap:
        if site.side == "input":
            return lambda x: add(site, x)

        def watch(y: Tensor) -> None:
            y.register_hook(lambda gradient: add(site, gradient))

        return watch

    paths = [name.removesuffix(".weight") for name in trained.names]
    pairs = [(Site(path, "input"), Site(path, "output")) for path in paths]
    with tap(trained.model, {site: reader(site) for pair in pairs for site in pair}):
        found = by_sample(trained, tokens, pad_id, labels, generator, progress=progress, label="curvature")
        count = sum(n for _, n in found)
    if unseen := [a.path for a, b in pairs if a not in moments or b not in moments]:
        raise InputError(
            f"the forward never reached {unseen[0]}; choose weights that the retain texts go through."
        )
    factors = [(moments[a], moments[b] / (positions[a] * count)) for a, b in pairs]
    ridge = ridge_of(sum(float(a.trace() * b.trace()) for a, b in factors), len(tokens), damping)
    solved = []
    for part, (a, b), flip in zip(g, factors, turned, strict=True):
        part = part.to(a.device)
        x = kronecker_solve(a, b, part.T if flip else part, ridge)
        solved.append((x.T if flip else x).cpu())
    return solved


def kronecker_solve(a: Tensor, b: Tensor, g: Tensor, ridge: float) -> Tensor:
    """Return the X with ``B X A + ridge · X = G``.

    Args:
        a: ``[in, in]`` symmetric, positive semidefinite.
        b: ``[out, out]`` the same.
        g: ``[out, in]``.
        ridge: > 0.
    """
    s_a, u_a = torch.linalg.eigh(a)
    s_b, u_b = torch.linalg.eigh(b)
    values = s_b.clamp_min(0)[:, None] * s_a.clamp_min(0)[None]
    return u_b @ ((u_b.T @ g @ u_a) / (values + ridge)) @ u_a.T


def _turned(model: nn.Module, name: str) -> bool:
    """Tell whether a linear layer stores its weight as [in, out]; refuse what is no linear layer."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf == "weight" and isinstance(module, nn.Linear):
        return False
    if leaf == "weight" and type(module).__name__ == "Conv1D":
        return True
    raise InputError(
        f"got {name}, which is no weight of a linear layer; K-FAC needs one. Choose others, or curvature='samples'."
    )
