"""Mixtures of experts: the axes and the lists of readers and writers in their rows, proved by editing by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from rowkit import CASES, MOE, gap, outputs, weights
from tiny import assert_same, random_plan, snapshot
from torch import Tensor, nn

from repe_unlearn.architectures import Architecture, Experts, Kind, Weight
from repe_unlearn.errors import NotBakeableError
from repe_unlearn.folding import bake
from repe_unlearn.hooks import apply

cases = pytest.mark.parametrize("name", MOE)
kinds = pytest.mark.parametrize("kind", ["mlp_in", "mlp_out"])


def layer_with_experts(arch: Architecture) -> int:
    return next(i for i, layout in enumerate(arch.layouts) if layout.name.startswith("mixture"))


def edit(block: nn.Module, weight: Weight, matrix: Tensor, kind: Kind) -> None:
    """Put the map x -> matrix x before a reader, or after a writer."""
    reads = kind == "mlp_in"
    if isinstance(weight, Experts):
        stacked, in_last = block.get_parameter(weight.path), weight.axes == "eoi"
        if in_last:  # W[e] x
            stacked.copy_(stacked @ matrix if reads else matrix @ stacked)
        else:  # x W[e]
            stacked.copy_(matrix.T @ stacked if reads else stacked @ matrix.T)
        if weight.bias is not None and not reads:
            bias = block.get_parameter(weight.bias)
            bias.copy_(bias @ matrix.T)
        return
    plain = block.get_parameter(f"{weight}.weight")
    plain.copy_(plain @ matrix if reads else matrix @ plain)


def hooked_and_edited(name: str, kind: Kind, listed: tuple[Weight, ...]) -> float:
    """Return how far hooks at a site are from editing the listed weights by hand."""
    case = CASES[name]
    model = case.model()
    arch = Architecture.of(model)
    layer = layer_with_experts(arch)
    plan = random_plan(model, arch.sites(kind, layers=[layer]), affine=False)
    base = outputs(case, model)
    with apply(model, plan):
        hooked = outputs(case, model)
    assert gap(base, hooked) > 1e-3
    matrix = plan[plan.sites[0]].matrix()
    for weight in listed:
        edit(model.get_submodule(arch.block(layer)), weight, matrix, kind)
    return gap(hooked, outputs(case, model))


def of_row(name: str, kind: Kind) -> tuple[Weight, ...]:
    arch = Architecture.of(CASES[name].model())
    return weights(arch.layouts[layer_with_experts(arch)], kind)


@cases
@kinds
def test_the_row_lists_all_readers_and_writers_with_their_axes(name: str, kind: Kind) -> None:
    listed = of_row(name, kind)
    assert any(isinstance(weight, Experts) for weight in listed)
    assert hooked_and_edited(name, kind, listed) <= 1e-6  # routers compute in float32
    for dropped in listed:  # control: each one is needed
        assert hooked_and_edited(name, kind, tuple(w for w in listed if w != dropped)) > 1e-4, dropped


@kinds
def test_axes_are_told_apart_where_shapes_are_not(kind: Kind) -> None:
    """In gpt-oss the experts are as wide as the model: the wrong axis fits, and is caught."""
    listed = of_row("gpt_oss", kind)
    turned = tuple(replace(w, axes="eoi") if isinstance(w, Experts) else w for w in listed)
    square = CASES["gpt_oss"].model().get_parameter("model.layers.0.mlp.experts.down_proj")
    assert square.shape[1] == square.shape[2]
    if kind == "mlp_out":
        assert hooked_and_edited("gpt_oss", kind, turned) > 1e-3


@cases
@kinds
def test_stacked_experts_are_refused_by_name_and_nothing_is_edited(name: str, kind: Kind) -> None:
    model = CASES[name].model()
    arch = Architecture.of(model)
    layer = layer_with_experts(arch)
    before = snapshot(model)
    plan = random_plan(model, arch.sites("attn_in", kind, layers=[layer]), affine=False)
    with pytest.raises(NotBakeableError) as caught:
        bake(model, plan)
    assert caught.value.site == arch.sites(kind, layers=[layer])[0]
    stacked = next(weight.path for weight in of_row(name, kind) if isinstance(weight, Experts))
    assert f"{arch.block(layer)}.{stacked}" in caught.value.reason
    assert "apply()" in caught.value.instead
    assert_same(before, model)


@pytest.mark.parametrize("name", ["deepseek_v3", "llama4_text", "qwen3_moe-mixed"])
@kinds
def test_dense_blocks_between_them_are_baked(name: str, kind: Kind) -> None:
    case = CASES[name]
    model = case.model()
    arch = Architecture.of(model)
    dense = [i for i, layout in enumerate(arch.layouts) if layout.name.startswith("dense")]
    assert 0 < len(dense) < arch.n_layers
    plan = random_plan(model, arch.sites(kind, layers=dense), affine=False)
    with apply(model, plan):
        hooked = outputs(case, model)
    base = outputs(case, model)
    patch = bake(model, plan).apply_(model)
    assert gap(hooked, outputs(case, model)) <= 1e-6
    assert gap(base, hooked) > 1e-3
    assert len(patch.edits) == len(dense) * (2 if kind == "mlp_in" else 1)
