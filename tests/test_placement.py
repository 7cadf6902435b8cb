"""Models whose weights lie elsewhere: offloaded ones work, and sharded or wrapped ones are refused with the reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from textkit import pairs, text_model, text_tokenizer
from tiny import assert_same, hook_count, oblique, snapshot, token_ids
from torch import nn

from repe_unlearn.activations import capture
from repe_unlearn.architectures import Architecture
from repe_unlearn.errors import UnsupportedModelError
from repe_unlearn.fingerprints import fingerprint
from repe_unlearn.folding import bake
from repe_unlearn.hooks import apply
from repe_unlearn.moments import Moments
from repe_unlearn.placement import input_device, require_whole, stored_parameters
from repe_unlearn.plan import ErasurePlan
from repe_unlearn.sequential import fit_sequential
from repe_unlearn.sites import Site

FIELDS = ("mean_x", "mean_z", "m_xx", "m_xz", "m_zz")


def in_memory(model: nn.Module, _folder: Path) -> nn.Module:
    from accelerate import cpu_offload

    return cpu_offload(model, execution_device=torch.device("cpu"))


def on_disk(model: nn.Module, folder: Path) -> nn.Module:
    from accelerate import disk_offload

    return disk_offload(model, str(folder), execution_device=torch.device("cpu"))


def by_map(model: nn.Module, folder: Path) -> nn.Module:
    """Some blocks stay, the others go to disk."""
    from accelerate import dispatch_model

    device_map = {
        "model.embed_tokens": "cpu",
        "model.rotary_emb": "cpu",
        "model.norm": "cpu",
        "lm_head": "cpu",
    }
    device_map |= {f"model.layers.{i}": "cpu" if i == 0 else "disk" for i in range(3)}
    return dispatch_model(model, device_map, main_device="cpu", offload_dir=str(folder))


@pytest.mark.filterwarnings("ignore::repe_unlearn.errors.NumericalWarning")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("offload", [in_memory, on_disk, by_map])
def test_offloaded_models(offload: Callable, tied: bool, tmp_path: Path) -> None:
    plain, tokenizer, contrast = text_model("llama", tie_word_embeddings=tied), text_tokenizer(), pairs(12)
    sites = Architecture.of(plain).sites("resid_pre", "attn_in", "mlp_in", "final")
    ids = token_ids()
    expected = capture(plain, tokenizer, contrast, sites, progress=False)
    plan = fit_sequential(plain, tokenizer, contrast, sites[1:], select="mean", progress=False)
    with apply(plain, plan), torch.no_grad():
        logits = plain(ids).logits
    model = offload(text_model("llama", tie_word_embeddings=tied), tmp_path)
    assert any(p.is_meta for p in model.parameters())  # or nothing is tested
    assert input_device(model) == torch.device("cpu")
    assert fingerprint(model) == fingerprint(plain)
    hooks = hook_count(model)
    got = capture(model, tokenizer, contrast, sites, progress=False)
    for site in sites:
        assert all(torch.equal(getattr(got[site], f), getattr(expected[site], f)) for f in FIELDS)
    again = fit_sequential(model, tokenizer, contrast, sites[1:], select="mean", progress=False)
    for site in sites[1:]:
        assert torch.equal(again.erasers[site].left, plan.erasers[site].left)
    with apply(model, plan), torch.no_grad():
        assert torch.equal(model(ids).logits, logits)
    assert hook_count(model) == hooks
    with torch.no_grad():
        assert not torch.equal(model(ids).logits, logits)  # control: the plan does something
    with pytest.raises(UnsupportedModelError, match="not in memory"):
        bake(model, ErasurePlan({sites[3]: oblique()}, fingerprint(model)))


def test_weights_that_were_never_loaded() -> None:
    with torch.device("meta"):
        model = nn.Linear(3, 3)
    with pytest.raises(UnsupportedModelError, match="no accelerate hook holds them"):
        input_device(model)
    assert [name for name, _ in stored_parameters(model)] == ["weight", "bias"]
    with pytest.raises(UnsupportedModelError, match="'weight' is on the meta device"):
        fingerprint(model)
    assert input_device(nn.Identity()) == torch.device("cpu")


@pytest.fixture
def alone(tmp_path: Path):
    """A process group of one."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_wrapped_and_sharded_models_are_refused() -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.nn.parallel import DistributedDataParallel

    tokenizer, contrast = text_tokenizer(), pairs(4)
    trainable = text_model("llama").requires_grad_(True)
    before = snapshot(trainable)
    wrapped = DistributedDataParallel(trainable)
    parallel = nn.DataParallel(trainable)
    sharded = fully_shard(text_model("llama"))
    old = FullyShardedDataParallel(nn.Linear(4, 4), device_id=torch.device("cpu"))
    plan = ErasurePlan({Site("model.norm"): oblique()}, "0" * 16)
    for model, reason in (
        (wrapped, r"wrapped in DistributedDataParallel.*pass model\.module"),
        (parallel, r"wrapped in DataParallel.*pass model\.module"),
        (sharded, r"FSDP2 or tensor parallelism \(DTensor weights\).*device_map='auto'"),
        (old, r"sharded over ranks by FSDP;"),
    ):
        hooks = hook_count(model)
        for action in (
            lambda m: capture(m, tokenizer, contrast, [Site("model.norm")], progress=False),
            lambda m: fit_sequential(m, tokenizer, contrast, [Site("model.norm")], progress=False),
            lambda m: apply(m, plan),
            lambda m: bake(m, plan),
            fingerprint,
        ):
            with pytest.raises(UnsupportedModelError, match=reason):
                action(model)
        assert hook_count(model) == hooks
    # what the message says to do works, and a process group by itself is no obstacle
    m = capture(wrapped.module, tokenizer, contrast, [Site("model.norm")], progress=False)[Site("model.norm")]
    assert isinstance(m, Moments)
    assert_same(before, trainable)


def test_tensor_parallel_models_are_refused() -> None:
    model = text_model("llama")
    require_whole(model)
    require_whole(nn.Linear(2, 2))
    split = nn.Linear(2, 2)
    split.tp_size = 4  # type: ignore[assignment]  # what transformers sets for tp_plan="auto"
    with pytest.raises(UnsupportedModelError, match="tensor parallelism over 4 ranks"):
        require_whole(split)
