"""What the tests of weight edits share: rows of keys and outputs, and every target with its explicit formula."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from repe_unlearn.edit import Edit
from repe_unlearn.eraser import Eraser
from repe_unlearn.moments import Moments
from repe_unlearn.solvers import Target, ridge_edit, targets

D, M = 5, 8
SETTINGS = {"alpha": 0.7, "ridge": 0.03, "beta": 0.4}


@dataclass(frozen=True)
class Rows:
    """Keys [n, m] and block outputs [n, d] of three sets, and the weight [d, m]."""

    weight: Tensor
    keys: dict[str, Tensor]
    outputs: dict[str, Tensor]

    def moments(self, name: str) -> Moments:
        return Moments.of(self.keys[name], self.outputs[name])

    def solve(self, target: Target, **changes: object) -> Edit:
        settings = {**SETTINGS, "neighbour": self.moments("neighbour"), **changes}
        return ridge_edit(
            self.weight,
            self.moments("forget"),
            self.moments("retain"),
            target=target,
            **settings,  # type: ignore[arg-type]
        )


def rows(seed: int = 0, *, forget: int = 11, retain: int = 30, neighbour: int = 7, m: int = M) -> Rows:
    g = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    weight, spread, offset = rand(D, m), 2 ** rand(m), rand(m)
    keys = {
        name: (rand(n, m) + offset + shift) * spread
        for name, n, shift in (
            ("forget", forget, 1.0),
            ("retain", retain, 0.0),
            ("neighbour", neighbour, 0.5),
        )
    }
    outputs = {name: k @ weight.T + 3 * rand(len(k), D) + rand(D) for name, k in keys.items()}
    return Rows(weight, keys, outputs)


def lam(r: Rows, ridge: float = SETTINGS["ridge"]) -> float:
    return ridge * float(r.keys["retain"].square().sum(1).mean()) / r.weight.shape[1]


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


U = torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0], dtype=torch.float64)
BASIS = torch.tensor([[1.0, 2], [0, 1], [-1, 0], [2, 2], [0, 1]], dtype=torch.float64)
OBLIQUE = Eraser(BASIS[:, :1], torch.tensor([[0.2, 1.0, 0.3, 0.4, -1.0]]).double(), U)
WISHED = torch.randn(11, D, generator=torch.Generator().manual_seed(9), dtype=torch.float64)

# name -> (target, wanted changes [n, d] from keys k, outputs h, mean output of retain and the weight)
Explicit = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
TARGETS: dict[str, tuple[Callable[[Rows], Target], Explicit]] = {
    "rmu": (lambda r: targets.rmu(7 * U, 2.5), lambda k, h, hr, w: 2.5 * U / U.norm() - h),
    "adaptive rmu": (
        lambda r: targets.rmu(U),
        lambda k, h, hr, w: 5 * h.square().sum(1).mean().sqrt() * U / U.norm() - h,
    ),
    "mean of retain": (lambda r: targets.mean_retain(), lambda k, h, hr, w: hr - h),
    "given mean": (lambda r: targets.mean_of(U), lambda k, h, hr, w: U - h),
    "zero": (lambda r: targets.zero(), lambda k, h, hr, w: -k @ w.T),
    "eraser": (lambda r: targets.project(OBLIQUE), lambda k, h, hr, w: OBLIQUE(h) - h),
    "basis": (
        lambda r: targets.project(BASIS, U),
        lambda k, h, hr, w: -(h - U) @ torch.linalg.pinv(BASIS).T @ BASIS.T,
    ),
    "basis, own mean": (
        lambda r: targets.project(BASIS),
        lambda k, h, hr, w: -(h - h.mean(0)) @ torch.linalg.pinv(BASIS).T @ BASIS.T,
    ),
    "redirect": (lambda r: targets.redirect(U, -2.0), lambda k, h, hr, w: (-2 * U).expand(len(k), D)),
    "values": (
        lambda r: targets.values(Moments.of(r.keys["forget"], WISHED)),
        lambda k, h, hr, w: WISHED - k @ w.T,
    ),
}


def wanted_rows(r: Rows, name: str) -> Tensor:
    return TARGETS[name][1](
        r.keys["forget"], r.outputs["forget"], r.outputs["retain"].mean(0), r.weight
    ).contiguous()
