from __future__ import annotations

import gc
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import greenlet
import pytest
import torch
from textkit import pairs, text_model, text_tokenizer
from tiny import LAYERS, assert_same, hook_count, snapshot
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from repe_unlearn import sequential
from repe_unlearn.activations import capture
from repe_unlearn.architectures import Architecture, Kind
from repe_unlearn.eraser import Eraser
from repe_unlearn.errors import InputError, NoConceptWarning, NonFiniteError, UnknownSiteError
from repe_unlearn.folding import bake
from repe_unlearn.hooks import apply
from repe_unlearn.moments import Moments
from repe_unlearn.parking import in_bytes
from repe_unlearn.plan import ErasurePlan, solve
from repe_unlearn.sequential import fit_sequential
from repe_unlearn.sites import Site
from repe_unlearn.solvers import leace, mean_difference

KINDS: tuple[Kind, ...] = ("attn_in", "mlp_in", "attn_out", "mlp_out", "final")
TOKENS = 300  # about a tenth of all prompts, so there are many batches

look = partial(capture, select="mean", batch_tokens=TOKENS, progress=False)
fit = partial(fit_sequential, select="mean", batch_tokens=TOKENS, progress=False)


def left(m: Moments) -> float:
    """What is left of the covariance with z, without a unit."""
    return float(m.m_xz.norm() / (m.m_xx.trace() * m.m_zz.trace()).sqrt())


def same(a: ErasurePlan, b: ErasurePlan) -> bool:
    """True when two plans hold the same bits."""
    return a.sites == b.sites and all(
        torch.equal(getattr(a[site], part), getattr(b[site], part))
        for site in a.sites
        for part in ("left", "right", "shift")
    )


def live() -> int:
    """Count paused greenlets."""
    gc.collect(0)
    found = [
        o for o in gc.get_objects() if type(o) is greenlet.greenlet
    ]  # isinstance would wake lazy objects
    return sum(bool(g) and not g.dead and g is not greenlet.getcurrent() for g in found)


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    return text_model("llama")


@pytest.fixture(scope="module")
def all_sites(llama: nn.Module) -> tuple[Site, ...]:
    return Architecture.of(llama).sites(*KINDS)


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("llama", {}),
        ("gemma2", {}),
        ("gpt2", {}),
        ("gpt_neox", {}),
        ("gpt_neox", {"use_parallel_residual": False}),
    ],
)
def test_everything_is_erased_at_every_site_at_once(model_type: str, changes: dict) -> None:
    model, tokenizer, contrast = text_model(model_type, **changes), text_tokenizer(), pairs()
    arch = Architecture.of(model)
    sites = arch.sites(*(kind for kind in KINDS if kind in arch.kinds))
    before = snapshot(model)
    plan = fit(model, tokenizer, contrast, sites)
    assert_same(before, model)
    assert hook_count(model) == 0
    assert set(plan.sites) == set(sites)
    untouched = look(model, tokenizer, contrast, sites)
    with apply(model, plan):
        erased = look(model, tokenizer, contrast, sites)
    assert all(left(m) > 1e-3 for m in untouched.values())  # control: there was something
    assert max(left(m) for m in erased.values()) <= 1e-10
    with apply(model, solve(untouched, model=model)):  # control: one fit per site is not enough
        apart = look(model, tokenizer, contrast, sites)
    assert max(left(m) for m in apart.values()) > 1e-5
    first = plan.sites[0]
    assert left(apart[first]) <= 1e-10  # what nothing comes before is right all the same


@pytest.mark.parametrize("select", ["last", "all", "all,sinks=0,specials"])
@pytest.mark.parametrize("solver", [leace, mean_difference, partial(leace, affine=False)])
def test_selections_and_solvers(llama: nn.Module, select: str, solver: Callable) -> None:
    tokenizer, contrast = text_tokenizer("left"), pairs()
    sites = Architecture.of(llama).sites("mlp_in", "attn_out")
    plan = fit(llama, tokenizer, contrast, sites, solver, select=select)
    with apply(llama, plan):
        erased = look(llama, tokenizer, contrast, sites, select=select)
    assert max(left(m) for m in erased.values()) <= 1e-10


def test_a_baked_sequential_plan_erases_too(llama: nn.Module) -> None:
    model, tokenizer, contrast = text_model("llama"), text_tokenizer(), pairs()
    sites = Architecture.of(model).sites("attn_out", "mlp_out")
    patch = bake(model, fit(model, tokenizer, contrast, sites)).apply_(model)
    assert max(left(m) for m in look(model, tokenizer, contrast, sites).values()) <= 1e-10
    patch.revert_(model)
    assert min(left(m) for m in look(model, tokenizer, contrast, sites).values()) > 1e-3


def test_the_result_depends_neither_on_batches_nor_on_the_order_of_sites(
    llama: nn.Module, all_sites: tuple[Site, ...]
) -> None:
    tokenizer, contrast = text_tokenizer(), pairs()
    plan = fit(llama, tokenizer, contrast, all_sites)
    again = [
        fit(llama, tokenizer, contrast, reversed(all_sites)),
        fit(llama, tokenizer, contrast, [*all_sites, *all_sites], batch_tokens=10**6),
        fit(llama, text_tokenizer("left"), contrast, all_sites, batch_tokens=1),
    ]
    for other in again:
        assert other.sites == plan.sites  # the order of execution
        assert all(other[site].allclose(plan[site], rtol=1e-7) for site in plan.sites)
    single = fit(llama, tokenizer, contrast, all_sites[:1])
    assert single[all_sites[0]].allclose(plan[all_sites[0]])
    assert not single[all_sites[0]].allclose(plan[all_sites[4]])  # control: allclose tells maps apart


def test_the_order_is_that_of_the_forward(llama: nn.Module) -> None:
    kinds = [
        Architecture.of(llama).locate(s)
        for s in fit(llama, text_tokenizer(), pairs(), _shuffled(llama)).sites
    ]
    per_block = ["attn_in", "attn_out", "mlp_in", "mlp_out"]
    assert kinds == [*((k, i) for i in range(LAYERS) for k in per_block), ("final", LAYERS)]


def _shuffled(model: nn.Module) -> list[Site]:
    sites = Architecture.of(model).sites(*KINDS)
    return [sites[i] for i in torch.randperm(len(sites), generator=torch.Generator().manual_seed(0))]


def test_one_pass_whatever_the_number_of_sites(llama: nn.Module, all_sites: tuple[Site, ...]) -> None:
    tokenizer, contrast = text_tokenizer(), pairs()
    calls = [0] * LAYERS

    def count(layer: int) -> Callable:
        def hook(*_: object) -> None:
            calls[layer] += 1

        return hook

    blocks = llama.get_submodule("model.layers")
    handles = [block.register_forward_pre_hook(count(i)) for i, block in enumerate(blocks)]
    try:
        work = sequential.prepare(llama, tokenizer, contrast, "mean", TOKENS)
        assert len(work) > 5
        fit(llama, tokenizer, contrast, all_sites)
        assert calls == [len(work)] * LAYERS
        calls[:] = [0] * LAYERS
        fit(llama, tokenizer, contrast, [s for s in all_sites if ".1." in s.path])
        assert calls == [len(work), len(work), 0]  # stops at the deepest site
        calls[:] = [0] * LAYERS
        for site in all_sites[:3]:  # control: the counter sees a pass per site
            fit(llama, tokenizer, contrast, [site])
        assert calls[0] == 3 * len(work)
    finally:
        for handle in handles:
            handle.remove()


def test_provenance(llama: nn.Module, all_sites: tuple[Site, ...]) -> None:
    solver = partial(leace, affine=False)
    plan = fit(
        llama, text_tokenizer(), pairs(8), all_sites[:2], solver, provenance={"note": "x", "fit": "mine"}
    )
    assert plan.provenance["solver"] == "leace(affine=False)"
    assert plan.provenance["concept"] == "gender"
    assert plan.provenance["classes"] == "male, female"
    assert plan.provenance["prompts"] == "16"
    assert plan.provenance["select"] == "mean"
    assert (plan.provenance["note"], plan.provenance["fit"]) == ("x", "mine")
    assert all(isinstance(plan[site], Eraser) for site in plan.sites)


def test_gradients_pass_a_fitted_plan() -> None:
    model = text_model("llama", dtype=torch.float32).requires_grad_(True)
    plan = fit(model, text_tokenizer(), pairs(8), Architecture.of(model).sites("mlp_in"))
    with apply(model, plan):
        with torch.inference_mode():
            model(torch.tensor([[5, 6, 7]]))
        model(torch.tensor([[5, 6, 7]])).logits.sum().backward()
    assert model.get_parameter("model.embed_tokens.weight").grad is not None


# Nothing is left behind


def third(what: BaseException, seen: list[int]) -> Callable[[Moments], Eraser]:
    def solver(m: Moments) -> Eraser:
        seen.append(live())
        if len(seen) == 3:
            raise what
        return leace(m)

    return solver


@pytest.mark.parametrize("what", [KeyboardInterrupt(), RuntimeError("solver"), InputError("solver")])
def test_an_error_in_a_solver_leaves_nothing(
    llama: nn.Module, all_sites: tuple[Site, ...], what: BaseException
) -> None:
    before, seen = live(), []
    with pytest.raises(type(what)) as caught:
        fit(llama, text_tokenizer(), pairs(), all_sites, third(what, seen))
    assert min(seen) > before + 5  # control: the counter sees the paused runs
    if isinstance(what, InputError):
        assert caught.value.__notes__ == ["at site model.layers.0.post_attention_layernorm"]
    del caught
    assert live() == before
    assert hook_count(llama) == 0
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


@pytest.mark.parametrize("moment", ["start", "update"])
def test_an_interrupt_in_the_progress_bar_leaves_nothing(
    llama: nn.Module, all_sites: tuple[Site, ...], moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, ticks, before = sequential.tqdm, [], live()

    class Interrupted(real):
        def __init__(self, *args: object, **kwargs: object) -> None:
            if moment == "start":
                raise KeyboardInterrupt
            super().__init__(*args, **kwargs)

        def update(self, n: float | None = 1) -> bool | None:
            ticks.append(n)
            if len(ticks) == 12:
                ticks.append(live())
                raise KeyboardInterrupt
            return super().update(n)

    monkeypatch.setattr(sequential, "tqdm", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        fit(llama, text_tokenizer(), pairs(), all_sites)
    assert moment == "start" or ticks[-1] > before + 5  # control: runs were paused
    assert live() == before
    assert hook_count(llama) == 0
    assert torch.is_grad_enabled()


def test_an_error_in_the_model_leaves_nothing(all_sites: tuple[Site, ...]) -> None:
    for module, first in (("model.embed_tokens", True), ("model.layers.1.mlp", False)):
        model, before, calls = text_model("llama"), live(), []

        def fail(*_: object, first: bool = first, calls: list = calls) -> None:
            calls.append(1)
            if first or len(calls) == 3:
                raise RuntimeError("out of memory")

        model.get_submodule(module).register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            fit(model, text_tokenizer(), pairs(), all_sites)
        assert live() == before
        assert hook_count(model) == 1  # the failing one
        assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("parameter", "site"),
    [
        ("model.layers.1.input_layernorm.weight", "model.layers.1.input_layernorm"),
        ("model.layers.0.mlp.down_proj.weight", "model.layers.0.mlp.down_proj"),
        ("model.norm.weight", "model.norm"),
    ],
)
def test_nan_weights_are_named(all_sites: tuple[Site, ...], parameter: str, site: str) -> None:
    model, before = text_model("llama"), live()
    model.get_parameter(parameter)[3] = float("nan")
    with pytest.raises(NonFiniteError, match=rf"the activations at {site} hold NaN"):
        fit(model, text_tokenizer(), pairs(), all_sites)
    assert live() == before
    assert hook_count(model) == 0


def test_sites_that_are_never_reached(llama: nn.Module) -> None:
    before = live()
    with pytest.raises(InputError, match="never reached lm_head"):
        fit(llama, text_tokenizer(), pairs(8), [Site("model.norm"), Site("lm_head")])
    with pytest.raises(UnknownSiteError, match="no module of that name"):
        fit(llama, text_tokenizer(), pairs(8), [Site("model.norm"), Site("model.layers.7.mlp")])
    with pytest.raises(InputError, match="got no site"):
        fit(llama, text_tokenizer(), pairs(8), [])
    assert live() == before
    assert hook_count(llama) == 0


def test_a_site_without_the_concept_is_left_alone(llama: nn.Module) -> None:
    """The last letter of both sentences of a pair is the same, so the first layer's input knows nothing."""
    sites = Architecture.of(llama).sites("attn_in")
    with pytest.warns(NoConceptWarning, match="uncorrelated to rounding over 96 samples"):
        plan = fit(llama, text_tokenizer(), pairs(), sites, select="last")
    assert [plan[site].rank for site in plan.sites] == [0, 1, 1]
    with apply(llama, plan) as handle:
        assert handle.sites == sites[1:]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(llama, text_tokenizer(), pairs(), sites[1:], select="last")


def test_progress_bar(
    llama: nn.Module, all_sites: tuple[Site, ...], capfd: pytest.CaptureFixture[str]
) -> None:
    fit(llama, text_tokenizer(), pairs(8), all_sites)
    assert capfd.readouterr().err == ""
    plan = fit_sequential(llama, text_tokenizer(), pairs(8), all_sites, select="mean")
    assert "fit" in capfd.readouterr().err
    assert isinstance(plan, ErasurePlan)


# A memory limit, and files


def waiting(known: set[int]) -> int:
    """Return the bytes of all float32 storages but the known ones, as the garbage collector sees them."""
    found = {
        t.untyped_storage()._cdata: t.untyped_storage().nbytes()
        for t in gc.get_objects()
        if type(t) is torch.Tensor and t.dtype == torch.float32
    }
    return sum(size for storage, size in found.items() if storage not in known)


def test_a_limit_is_kept_and_changes_no_bit(tmp_path: Path) -> None:
    model, tokenizer, contrast = text_model("llama", dtype=torch.float32), text_tokenizer(), pairs()
    sites = Architecture.of(model).sites(*KINDS)
    known = {t.untyped_storage()._cdata for t in gc.get_objects() if type(t) in (torch.Tensor, nn.Parameter)}
    held: list[tuple[int, int]] = []

    def watching(m: Moments) -> Eraser:
        files = sum(file.stat().st_size for file in tmp_path.glob("*/*"))
        held.append((waiting(known), files))
        return leace(m)

    def run(memory: int | str | None) -> tuple[ErasurePlan, list[tuple[int, int]]]:
        held.clear()
        plan = fit(model, tokenizer, contrast, sites, watching, memory=memory, scratch=tmp_path)
        assert not list(tmp_path.iterdir())
        return plan, list(held)

    free, unlimited = run(None)
    total = min(size for size, _ in unlimited)
    eraser_slack = 20_000
    for memory in (total // 2, "100kB", 0):
        plan, limited = run(memory)
        assert max(size for size, _ in limited) <= in_bytes(memory) + eraser_slack
        assert min(files for _, files in limited) >= total - in_bytes(memory) - eraser_slack
        assert same(plan, free)
    assert total > 500_000  # control: without a limit it is more
    assert max(files for _, files in unlimited) == 0
    assert not same(
        fit(model, tokenizer, contrast.sample(40), sites), free
    )  # control: same tells plans apart


def test_what_surely_fits_is_not_watched(llama: nn.Module, all_sites: tuple[Site, ...]) -> None:
    def modes(memory: int | str | None) -> list[bool]:
        seen: list[bool] = []

        def solver(m: Moments) -> Eraser:
            seen.append(_get_current_dispatch_mode() is not None)
            return leace(m)

        fit(llama, text_tokenizer(), pairs(), all_sites[:3], solver, memory=memory)
        return seen

    assert modes(None) == modes("4GiB") == [False] * 3
    assert modes("1MB") == [True] * 3  # control


@pytest.mark.parametrize("what", [KeyboardInterrupt(), RuntimeError("solver")])
def test_an_error_leaves_no_file(
    llama: nn.Module, all_sites: tuple[Site, ...], what: BaseException, tmp_path: Path
) -> None:
    before, files = live(), []

    def solver(m: Moments) -> Eraser:
        files.append(len(list(tmp_path.glob("*/*"))))
        if len(files) == 3:
            raise what
        return leace(m)

    with pytest.raises(type(what)):
        fit(llama, text_tokenizer(), pairs(), all_sites, solver, memory=0, scratch=tmp_path)
    assert min(files) > 5  # control: there were files
    assert not list(tmp_path.iterdir())
    assert live() == before
    assert hook_count(llama) == 0
    assert _get_current_dispatch_mode() is None


def test_memory_and_scratch_are_checked_first(llama: nn.Module, tmp_path: Path) -> None:
    sites = [Site("model.norm")]
    with pytest.raises(InputError, match="got memory='lots'"):
        fit(llama, text_tokenizer(), pairs(8), sites, memory="lots")
    with pytest.raises(InputError, match="needed an existing folder"):
        fit(llama, text_tokenizer(), pairs(8), sites, scratch=tmp_path / "none")


# Several processes

WORKER = """
import sys
import torch.distributed as dist
from test_sequential import KINDS, fit, pairs, text_model, text_tokenizer
from repe_unlearn.architectures import Architecture

dist.init_process_group("gloo")
model = text_model("llama")
for tokens in (300, 10**6):
    plan = fit(model, text_tokenizer(), pairs(), Architecture.of(model).sites(*KINDS), batch_tokens=tokens)
    plan.save(f"{sys.argv[1]}/{tokens}-{dist.get_rank()}")
dist.destroy_process_group()
"""


def test_two_processes_fit_what_one_does(
    llama: nn.Module, all_sites: tuple[Site, ...], tmp_path: Path
) -> None:
    """With 300 tokens each has several batches; with a million there is one batch, and the second rank has none."""
    script = tmp_path / "worker.py"
    script.write_text(WORKER, encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    result = subprocess.run(
        [*command, script, tmp_path],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    alone = fit(llama, text_tokenizer(), pairs(), all_sites)
    half = fit(llama, text_tokenizer(), pairs().sample(40), all_sites)
    for tokens in (300, 10**6):
        first, second = (ErasurePlan.load(tmp_path / f"{tokens}-{rank}") for rank in (0, 1))
        assert same(first, second)
        assert first.sites == alone.sites
        assert all(first[site].allclose(alone[site], rtol=1e-7) for site in alone.sites)
    assert not all(half[site].allclose(alone[site], rtol=1e-7) for site in alone.sites)  # control
