"""One device for everything: on a GPU the same numbers, and no tensor that is made elsewhere.

The second can be checked without a GPU. Under another default device every tensor that is made without saying where
lands there, and the first operation with the data fails: what a slip does on a GPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

import pytest
import torch
from torch import Tensor

from repe_unlearn.concepts import Concepts
from repe_unlearn.diagnostics import diagnose, summarize
from repe_unlearn.eraser import Eraser
from repe_unlearn.hooks import fused
from repe_unlearn.moments import Accumulator, Moments
from repe_unlearn.plan import solve
from repe_unlearn.shrinkage import shrinkage_of
from repe_unlearn.sites import Site
from repe_unlearn.solvers import (
    inlp,
    joint,
    leace,
    leace_many,
    mean_difference,
    oracle,
    pca,
    quadratic,
    random,
    rlace,
    second_order,
    shared,
    splince,
    subspace,
)
from repe_unlearn.thin_moments import ThinMoments

Case: TypeAlias = Callable[[Tensor, Tensor, Tensor], Iterator[Tensor | float]]
"""From x [n, d], class ids z [n] and a second concept y [n] to numbers that must not depend on the device."""

CASES: dict[str, Case] = {}


def case(function: Case) -> Case:
    CASES[function.__name__] = function
    return function


def statistics(m: Moments) -> Iterator[Tensor | float]:
    yield m.n
    yield from (m.mean_x, m.mean_z, m.m_xx, m.m_xz, m.m_zz, m.var_x, m.class_means())


@case
def moments(x: Tensor, z: Tensor, y: Tensor) -> Iterator[Tensor | float]:
    weight = y.abs() + 0.1
    a, b = Moments.of(x[:100], z[:100], classes=3, weight=weight[:100]), Moments.of(x, z, mask=y > 0)
    yield from itertools.chain(statistics(a), statistics(a + b), statistics(a + b - b))
    yield from statistics(Moments.empty(x.shape[1], 3, x.device) + a)


@case
def accumulator(x: Tensor, z: Tensor, y: Tensor) -> Iterator[Tensor | float]:
    sums = Accumulator(classes=3)
    for start in range(0, len(x), 170):
        part = slice(start, start + 170)
        sums.add(x[part], z[part], y[part].abs() if start == 170 else None)
    yield from statistics(sums.moments())


@case
def thin(x: Tensor, z: Tensor, y: Tensor) -> Iterator[Tensor | float]:
    a, b = ThinMoments.of(x[:6], z[:6], classes=3), ThinMoments.of(x[6:9], z[6:9], classes=3)
    yield from (a + b).m_xz.T
    yield from (a + b - b).x
    yield from (ThinMoments.empty(x.shape[1], 3, x.device) + a).x
    for shrinkage in ("olse", "ledoit_wolf", 0.1):
        yield from erased(leace(a + b, shrinkage=shrinkage), x)
    yield summarize(leace(a + b), a + b).energy


@case
def concepts(x: Tensor, z: Tensor, y: Tensor) -> Iterator[Tensor | float]:
    several = Concepts((3, None))
    columns = several.columns(torch.where(y > 1, -1, z), torch.where(z == 2, float("nan"), y))
    yield from erased(leace(several.resolve(Moments.of(x, columns))), x)


def erased(e: Eraser, x: Tensor) -> Iterator[Tensor]:
    yield from (e(x), e.matrix(), e.bias(), fused(e)(x), e.partial(0.5)(x), e.compose(e)(x))
    assert e.is_idempotent


@case
def closed_forms(x: Tensor, z: Tensor, y: Tensor) -> Iterator[Tensor | float]:
    m, other = Moments.of(x, z), Moments.of(x, y)
    yield from erased(leace(m, affine=False, shrinkage=None), x)
    yield from erased(mean_difference(m), x)
    yield from erased(splince(m, preserve=other), x)
    yield from erased(joint(m, other), x)
    yield from erased(shared(m, Moments.of(2 * x + 1, z)), x)
    for metric in ("orthogonal", "whitened"):
        yield from erased(subspace(m, x[:2], metric=metric), x)
    yield pca(m, rank=2)(x)
    yield random(m, rank=2)(x)
    yield oracle(m)(x, z)
    for e in leace_many([m, Moments.of(x.flip(1), z)]):
        yield from erased(e, x)


@case
def a_singular_covariance(x: Tensor, z: Tensor, y: Tensor) -> Iterator[Tensor | float]:
    m = Moments.of(torch.cat([x, x[:, :1]], 1), z)
    for e in (leace(m, shrinkage=0.01), *leace_many([m, m], shrinkage=0.01)):
        yield e(torch.cat([x, x[:, :1]], 1))


@case
def solvers_on_rows(x: Tensor, z: Tensor, y: Tensor) -> Iterator[Tensor | float]:
    for e in (inlp(x, z), inlp(x, z, heldout=y > 0.5), rlace(x, z), second_order(x, z)):
        yield e(x)
    parts = [Moments.of(x[z == c], z[z == c]) for c in range(3)]
    for metric in ("euclidean", "standardized"):
        yield quadratic(parts, metric=metric)(x, z)
    yield shrinkage_of(x, "olse")
    yield shrinkage_of(x, "ledoit_wolf")


@case
def diagnostics(x: Tensor, z: Tensor, y: Tensor) -> Iterator[Tensor | float]:
    m = Moments.of(x[:200], z[:200])
    plan = solve({Site("a"): m}, fingerprint="f")
    for labels in (z, y):
        found = diagnose(plan[Site("a")], x[200:], labels[200:], permutations=19)
        yield from (
            found.energy,
            found.effective_rank,
            found.outlier,
            found.before.correlation,
            found.after.p_value,
        )
    yield plan.diagnostics[Site("a")].energy


def sample(device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    z = torch.arange(510) % 3
    x = torch.randn(510, 9, generator=g, dtype=torch.float64) @ torch.randn(
        9, 9, generator=g, dtype=torch.float64
    )
    x[:, 0] *= 1 + z
    x[:, :2] += 3 * torch.nn.functional.one_hot(z)[:, :2]
    y = torch.randn(510, generator=g, dtype=torch.float64) + x[:, 3]
    return x.to(device), z.to(device), y.to(device)


def same(found: list[Tensor | float], wanted: list[Tensor | float], device: str) -> None:
    assert len(found) == len(wanted)
    for i, (a, b) in enumerate(zip(found, wanted, strict=True)):
        assert not isinstance(a, Tensor) or a.device.type == device, i
        a, b = (torch.as_tensor(value, dtype=torch.float64).cpu() for value in (a, b))
        assert float((a - b).norm()) <= 1e-9 * float(b.norm()) + 1e-12, i


@contextmanager
def elsewhere() -> Iterator[None]:
    """Make new tensors on a device that no data is on, unless they say where."""
    with torch.device("meta"):
        yield


# What is singular, or holds more variance than a concept, is on purpose.
quiet = pytest.mark.filterwarnings("ignore::repe_unlearn.errors.NumericalWarning")


@quiet
@pytest.mark.parametrize("name", list(CASES))
def test_nothing_is_made_on_the_default_device(name: str) -> None:
    inputs = sample()
    wanted = list(CASES[name](*inputs))
    with elsewhere():
        found = list(CASES[name](*inputs))
    same(found, wanted, "cpu")


def test_the_check_sees_a_slip() -> None:
    x, _, _ = sample()
    with elsewhere():
        assert bool((x + torch.ones_like(x)).any())
        with pytest.raises(RuntimeError, match="device meta"):
            x + torch.arange(9)
        assert not torch.equal(x @ torch.eye(9, dtype=x.dtype), x)  # or wrong numbers, which ``same`` sees


@quiet
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", list(CASES))
def test_a_gpu_gives_the_same(name: str) -> None:
    same(list(CASES[name](*sample("cuda"))), list(CASES[name](*sample())), "cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_moments_of_two_devices_merge_on_the_first() -> None:
    x, z, _ = sample()
    a, b = Moments.of(x[:100], z[:100]), Moments.of(x[100:].cuda(), z[100:].cuda())
    assert (a + b).mean_x.device.type == "cpu"
    assert (b + a).mean_x.device.type == "cuda"
    assert torch.allclose((a + b).m_xx, Moments.of(x, z).m_xx, rtol=1e-12)
    thin = ThinMoments.of(x[:5], z[:5], classes=3)
    assert (thin + thin.to("cuda")).x.device.type == "cpu"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_model_on_a_gpu_gives_the_same_plan_and_the_same_erased_logits() -> None:
    from textkit import pairs, text_model, text_tokenizer
    from tiny import token_ids

    from repe_unlearn.activations import capture
    from repe_unlearn.architectures import Architecture
    from repe_unlearn.hooks import apply
    from repe_unlearn.sequential import fit_sequential

    plans, logits = [], []
    for device in ("cpu", "cuda"):
        model = text_model("llama").to(device)
        sites = Architecture.of(model).sites("attn_in", "mlp_out")
        found = capture(model, text_tokenizer(), pairs(), sites, select="mean", progress=False)
        assert {m.mean_x.device.type for m in found.values()} == {device}
        plans.append(fit_sequential(model, text_tokenizer(), pairs(), sites, select="mean", progress=False))
        with apply(model, plans[0]):
            logits.append(model(token_ids().to(device)).logits.cpu())
    assert all(plans[1][site].to("cpu").allclose(plans[0][site], rtol=1e-8) for site in plans[0].sites)
    assert torch.allclose(logits[1], logits[0], rtol=1e-9, atol=1e-9)
