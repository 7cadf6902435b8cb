"""Mixtures of experts: the axes and the lists of readers and writers in their rows, proved by editing by hand and by baking."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rowkit import CASES, MOE, gap, outputs, patched_row, weights
from safetensors.torch import load_file
from tiny import assert_same, random_plan, snapshot
from torch import Tensor, nn

from repe_unlearn.architectures import Architecture, Experts, Kind, Read, Weight
from repe_unlearn.errors import InputError, NotBakeableError, ShapeError
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
    assert hooked_and_edited(name, kind, listed) <= 1e-10
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


# Baked


def hooked_and_baked(name: str, kind: Kind, monkeypatch: pytest.MonkeyPatch, *listed: Weight) -> float:
    """Return how far hooks are from a patch that is baked from a row with these weights."""
    case = CASES[name]
    model = case.model()
    arch = Architecture.of(model)
    layer = layer_with_experts(arch)
    part = arch.layouts[layer].part(kind)
    plan = random_plan(model, arch.sites(kind, layers=[layer]), affine=False)
    with apply(model, plan):
        hooked = outputs(case, model)
    field = "readers" if isinstance(part, Read) else "writers"
    layouts = tuple(
        replace(layout, **{kind: replace(part, **{field: listed})}) if layout.part(kind) == part else layout
        for layout in arch.family.layouts
    )
    with patched_row(monkeypatch, case.model_type, layouts=layouts):
        bake(model, plan).apply_(model)
    return gap(hooked, outputs(case, model))


@cases
@kinds
def test_a_weight_that_is_left_out_is_detected(
    name: str, kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = of_row(name, kind)
    assert hooked_and_baked(name, kind, monkeypatch, *listed) <= 1e-10  # control
    for dropped in listed if len(listed) > 1 else ():
        kept = tuple(weight for weight in listed if weight != dropped)
        assert hooked_and_baked(name, kind, monkeypatch, *kept) > 1e-4, dropped


def test_a_wrong_axis_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Square experts: nothing but the result shows it. Where shapes differ, they show it too."""
    (square,) = of_row("gpt_oss", "mlp_out")
    assert isinstance(square, Experts)
    assert hooked_and_baked("gpt_oss", "mlp_out", monkeypatch, replace(square, axes="eoi")) > 1e-3
    router, stack = of_row("gpt_oss", "mlp_in")
    assert isinstance(stack, Experts)
    with pytest.raises(ShapeError, match="does not fit its input side"):
        hooked_and_baked("gpt_oss", "mlp_in", monkeypatch, router, replace(stack, axes="eoi"))


def test_one_expert_that_is_not_edited_is_detected() -> None:
    case = CASES["mixtral"]
    model = case.model()
    plan = random_plan(model, Architecture.of(model).sites("mlp_out"), affine=False)
    with apply(model, plan):
        hooked = outputs(case, model)
    stack = model.get_parameter("model.layers.1.mlp.experts.down_proj")
    old = stack[2].clone()
    bake(model, plan).apply_(model)
    assert gap(hooked, outputs(case, model)) <= 1e-10
    stack[2] = old
    assert gap(hooked, outputs(case, model)) > 1e-4


@pytest.mark.parametrize("bias", ["gate_up_proj_bias", "down_proj_bias"])
def test_a_missing_bias_of_the_experts_is_detected(bias: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind: Kind = "mlp_in" if bias.startswith("gate") else "mlp_out"
    case = CASES["gpt_oss"]
    model = case.model()
    plan = random_plan(model, Architecture.of(model).sites(kind))
    with apply(model, plan):
        hooked = outputs(case, model)
    patch = bake(model, plan)
    short = replace(patch, edits={n: e for n, e in patch.edits.items() if not n.endswith(bias)})
    short.apply_(model)
    assert gap(hooked, outputs(case, model)) > 1e-4
    short.revert_(model)
    patch.apply_(model)
    assert gap(hooked, outputs(case, model)) <= 1e-10


@pytest.mark.parametrize("name", ["mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "qwen3_next"])
def test_a_constant_needs_weights_that_sum_to_one(name: str) -> None:
    model = CASES[name].model()
    before = snapshot(model)
    with pytest.raises(NotBakeableError, match=r"need not sum to 1.*affine=False"):
        bake(model, random_plan(model, Architecture.of(model).sites("mlp_out")))
    assert_same(before, model)


@cases
def test_linear_erasers_at_every_site_bake_with_full_coverage(name: str) -> None:
    """The way out that the refusals of affine erasers name; every reader and writer is counted."""
    model = CASES[name].model()
    arch = Architecture.of(model)
    wanted: tuple[Kind, ...] = ("attn_in", "mlp_in", "attn_out", "mlp_out")

    def baked(layers: list[int] | None, *kinds: Kind) -> tuple[set[str], bool]:
        """Return the edited weights, and whether each count is n of n."""
        patch = bake(model, random_plan(model, arch.sites(*kinds, layers=layers), rank=1, affine=False))
        assert not patch.new_biases
        counts = (part.partition(" ")[0].split("/") for part in patch.provenance["coverage"].split(", "))
        whole = all(done == there for done, there in counts)
        return {name for name in patch.edits if not name.endswith("bias")}, whole

    listed = {
        f"{arch.block(i)}.{w.path if isinstance(w, Experts) else f'{w}.weight'}"
        for i, layout in enumerate(arch.layouts)
        for kind in wanted
        for w in weights(layout, kind)
    }
    assert baked(None, *wanted, "final") == (listed | {"lm_head.weight"}, True)
    assert not baked([0], "attn_out")[1]  # control


def test_edits_of_a_stack_share_one_factor() -> None:
    model = CASES["mixtral"].model()
    arch = Architecture.of(model)
    patch = bake(model, random_plan(model, arch.sites("mlp_in", "mlp_out"), affine=False))
    reader = patch.edits["model.layers.0.mlp.experts.gate_up_proj"]
    writer = patch.edits["model.layers.0.mlp.experts.down_proj"]
    assert (reader.left.ndim, reader.right.ndim) == (3, 2)  # type: ignore[union-attr]
    assert (writer.left.ndim, writer.right.ndim) == (2, 3)  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["gemma3", "gpt_neox", "vit", "t5", "llama", *MOE])
@pytest.mark.parametrize("tied", [True, False])
def test_names_on_disk(name: str, tied: bool, tmp_path: Path) -> None:
    model = CASES[name].model(dtype=torch.float32, **({} if tied else {"tie_word_embeddings": False}))
    model.save_pretrained(tmp_path)
    disk = load_file(tmp_path / "model.safetensors")
    arch = Architecture.of(model)
    found = {}
    for parameter, p in model.named_parameters():
        parts = arch.on_disk(parameter, p.shape)
        assert sum(p[index].numel() for _, index in parts) == p.numel()
        for key, index in parts:
            assert torch.equal(disk[key], p[index]), key
            found[key] = p[index]
    buffers = {key for key in disk if key.endswith("e_score_correction_bias")}
    assert set(found) == set(disk) - buffers
    stacked = next(
        (n for n, p in model.named_parameters() if p.ndim == 3 and len(arch.on_disk(n, p.shape)) > 1), ""
    )
    if stacked:
        with pytest.raises(InputError, match=r"got shape \(\).*hold every expert apart"):
            arch.on_disk(stacked)


@pytest.mark.parametrize(
    "name", ["deepseek_v3", "glm4_moe", "llama4_text", "qwen3_moe-mixed", "qwen3_next-mixed"]
)
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
    assert gap(hooked, outputs(case, model)) <= 1e-10
    assert gap(base, hooked) > 1e-3
    assert len(patch.edits) == len(dense) * (2 if kind == "mlp_in" else 1)
