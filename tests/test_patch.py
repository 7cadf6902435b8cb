from __future__ import annotations

import copy
import gc
import math
import weakref
from pathlib import Path

import pytest
import torch
from tiny import D, assert_same, oblique, random_plan, snapshot, tiny, token_ids
from torch import nn

from repe_unlearn import edit as edit_module
from repe_unlearn import patch as patch_module
from repe_unlearn.architectures import Architecture
from repe_unlearn.errors import (
    FileFormatError,
    InputError,
    ModelMismatchError,
    NonFiniteError,
    OutputExistsError,
    ShapeError,
    UnsupportedModelError,
)
from repe_unlearn.fingerprints import fingerprint
from repe_unlearn.folding import bake
from repe_unlearn.patch import Edit, Patch
from repe_unlearn.plan import ErasurePlan


def affine_patch(model: nn.Module) -> Patch:
    """A patch with everything: edits, new biases, zero biases, config updates, a head to untie."""
    arch = Architecture.of(model)
    sites = arch.sites("attn_in", "mlp_out", layers=[1])
    erasers = {s: oblique(seed=i) for i, s in enumerate(sites)} | {
        arch.sites("final")[0]: oblique(affine=False)
    }
    return bake(model, ErasurePlan(erasers, fingerprint(model), {"concept": "gender"}))


@pytest.fixture
def model() -> nn.Module:
    return tiny("llama", tie_word_embeddings=True)


@pytest.fixture
def patch(model: nn.Module) -> Patch:
    made = affine_patch(model)
    assert made.new_biases
    assert made.zero_biases
    assert made.config_updates
    assert made.untie
    return made


# Edit


def test_edits_by_hand() -> None:
    left, right = torch.randn(4, 2, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    thin, dense = Edit(left, right, "thin"), Edit(left @ right, None, "dense")
    weight = torch.randn(4, 3, dtype=torch.float64)
    kept = weight.clone()
    assert thin.shape == dense.shape == (4, 3)
    assert (thin.rank, dense.rank) == (2, None)
    for edit in (thin, dense):
        torch.testing.assert_close(edit.delta(), left @ right)
        torch.testing.assert_close(edit.apply(weight), weight + left @ right)
        assert math.isclose(edit.norm(), float((left @ right).norm()), rel_tol=1e-12)
    assert torch.equal(weight, kept)
    assert torch.equal(dense.delta(), left @ right)  # applying does not write into it
    left.zero_()
    assert thin.norm() > 0  # owns its tensors


@pytest.mark.parametrize(
    ("left", "right"), [((3, 4, 2), (2, 5)), ((4, 2), (3, 2, 5)), ((3, 4, 2), (1, 2, 5))]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_edits_of_stacks(left: tuple[int, ...], right: tuple[int, ...], dtype: torch.dtype) -> None:
    a, b = torch.randn(left, dtype=torch.float64), torch.randn(right, dtype=torch.float64)
    edit, weight = Edit(a, b, "x"), torch.randn(3, 4, 5).to(dtype)
    assert (edit.shape, edit.rank) == ((3, 4, 5), 2)
    assert math.isclose(edit.norm(), float((a @ b).norm()), rel_tol=1e-12)
    new = edit.apply(weight)
    torch.testing.assert_close(new, (weight.double() + a @ b).to(dtype))
    torch.testing.assert_close(Edit(a @ b, None, "dense").apply(weight), new)
    for index in ((), (2,), (1, slice(1, 3))):
        torch.testing.assert_close(edit.part(index).apply(weight[index]), new[index])
        assert edit.part(index).shape == tuple(weight[index].shape)


def test_large_weights_are_edited_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    edit = Edit(torch.randn(7, 2, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64), "x")
    weight, bias = torch.randn(7, 5), torch.randn(7)
    whole = edit.apply(weight)
    monkeypatch.setattr(edit_module, "_AT_ONCE", 12)  # two rows
    torch.testing.assert_close(edit.apply(weight), whole)
    shift = torch.arange(7.0)
    assert torch.equal(Edit(shift, None, "bias").apply(bias), (bias.double() + shift).float())


def test_edits_round_once() -> None:
    edit = Edit(torch.full((1, 1), 2.0**-9), torch.ones(1, 1), "x")
    one = torch.ones(1, 1, dtype=torch.bfloat16)
    assert edit.apply(one).item() == 1.0
    assert edit.apply(one).dtype == torch.bfloat16
    assert edit.apply(one.float()).item() == 1.0 + 2.0**-9  # control


def test_bad_edits() -> None:
    with pytest.raises(
        ShapeError, match=r"left \(4, 2\) and right \(3, 4\); needed \[\.\.\., m, r\] and \[\.\.\., r, n\]"
    ):
        Edit(torch.zeros(4, 2), torch.zeros(3, 4), "x")
    for left, right in (((3, 4, 2), (2, 2, 5)), ((2,), (2, 5)), ((4, 2), (2,))):
        with pytest.raises(ShapeError, match="needed"):
            Edit(torch.zeros(left), torch.zeros(right), "x")
    for left, right in ((torch.tensor([math.nan]), None), (torch.zeros(2, 1), torch.full((1, 2), math.inf))):
        with pytest.raises(NonFiniteError, match=r"an edit \(rule\) holds NaN or infinite"):
            Edit(left, right, "rule")
    with pytest.raises(ShapeError, match=r"for shape \(4, 4\); the parameter has \(4, 5\)"):
        Edit(torch.zeros(4, 2), torch.zeros(2, 4), "x").apply(torch.zeros(4, 5))


# Apply and revert


def test_apply_and_revert_bit_for_bit(model: nn.Module, patch: Patch) -> None:
    before, base = snapshot(model), model(token_ids()).logits
    assert patch.apply_(model) is patch
    assert (model(token_ids()).logits - base).abs().max() > 1e-3
    assert model.config.attention_bias is model.config.mlp_bias is True
    assert model.config.tie_word_embeddings is False
    assert fingerprint(model) != before["fingerprint"]
    for name in (*patch.new_biases, *patch.zero_biases):
        assert isinstance(model.get_parameter(name), nn.Parameter)
        assert not model.get_parameter(name).requires_grad
    assert patch.revert_(model) is patch
    assert_same(before, model)
    assert torch.equal(model(token_ids()).logits, base)
    patch.apply_(model)  # and again
    patch.revert_(model)
    assert_same(before, model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_revert_is_exact_where_subtracting_would_not_be(dtype: torch.dtype) -> None:
    model = tiny("gpt2", dtype=dtype)
    before = snapshot(model)
    patch = bake(model, random_plan(model, Architecture.of(model).sites("attn_in", "mlp_out")))
    name = "transformer.h.0.attn.c_attn.weight"
    patch.apply_(model)
    inverse = Edit(-patch.edits[name].left, patch.edits[name].right, "back").apply(model.get_parameter(name))
    assert not torch.equal(inverse, before["bits"][name])  # control
    patch.revert_(model)
    assert_same(before, model)


def test_order_of_events(model: nn.Module, patch: Patch) -> None:
    before = snapshot(model)
    with pytest.raises(ModelMismatchError, match="this patch is not active on the model; apply_ it first"):
        patch.revert_(model)
    patch.apply_(model)
    edited = snapshot(model)
    with pytest.raises(ModelMismatchError, match="carries a patch already; revert_ that one first"):
        patch.apply_(model)
    other = Patch(patch.edits, patch.fingerprint)
    with pytest.raises(ModelMismatchError, match="carries a patch already"):
        other.apply_(model)
    with pytest.raises(ModelMismatchError, match="not active"):
        other.revert_(model)
    assert_same(edited, model)
    patch.revert_(model)
    with pytest.raises(ModelMismatchError, match="not active"):
        patch.revert_(model)
    assert_same(before, model)


def test_an_interrupted_revert_can_be_repeated(
    model: nn.Module, patch: Patch, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = snapshot(model)
    patch.apply_(model)
    real, calls = patch_module._parameter, []

    def interrupted(*args: object) -> nn.Parameter:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)  # type: ignore[arg-type]

    with monkeypatch.context() as m:
        m.setattr(patch_module, "_parameter", interrupted)
        with pytest.raises(KeyboardInterrupt):
            patch.revert_(model)
    assert fingerprint(model) != before["fingerprint"]
    patch.revert_(model)
    assert_same(before, model)


def test_one_patch_on_two_copies(model: nn.Module, patch: Patch) -> None:
    other = copy.deepcopy(model)
    before = snapshot(other)
    patch.apply_(model)
    assert_same(before, other)
    patch.apply_(other)
    patch.revert_(model)
    assert torch.equal(
        other.get_parameter("lm_head.weight"),
        patch.edits["lm_head.weight"].apply(before["bits"]["lm_head.weight"]),
    )
    patch.revert_(other)
    assert_same(before, other)


def test_a_freed_model_frees_the_originals(patch: Patch) -> None:
    model = tiny("llama", tie_word_embeddings=True)
    patch.apply_(model)
    ref, size = weakref.ref(model), len(patch_module._ORIGINALS)
    del model
    gc.collect()
    assert ref() is None
    assert len(patch_module._ORIGINALS) == size - 1


def test_wrong_model(patch: Patch) -> None:
    for other in (tiny("llama"), tiny("llama", seed=1, tie_word_embeddings=True), tiny("qwen2")):
        before = snapshot(other)
        with pytest.raises(
            ModelMismatchError, match=rf"made for fingerprint {patch.fingerprint}; this model has"
        ):
            patch.apply_(other)
        assert_same(before, other)


# Failures on the way


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
@pytest.mark.parametrize("at", [0, 1, 5, -1])
def test_a_failure_in_the_middle_leaves_every_bit(
    model: nn.Module, patch: Patch, error: BaseException, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, real, calls = snapshot(model), Edit.apply, []
    fatal = at % len(patch)

    def failing(self: Edit, weight: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) == fatal + 1:
            raise error
        return real(self, weight)

    with monkeypatch.context() as m:
        m.setattr(Edit, "apply", failing)
        with pytest.raises(type(error)):
            patch.apply_(model)
    assert len(calls) == fatal + 1
    assert_same(before, model)
    patch.apply_(model).revert_(model)  # and it is not taken for patched
    assert_same(before, model)


def test_edits_that_do_not_fit_leave_every_bit(model: nn.Module, patch: Patch) -> None:
    before = snapshot(model)

    def with_edit(name: str, edit: Edit, **changes: object) -> Patch:
        parts = {k: getattr(patch, k) for k in ("new_biases", "zero_biases", "config_updates", "tied")}
        return Patch({**patch.edits, name: edit}, patch.fingerprint, **{**parts, **changes})  # type: ignore[arg-type]

    row = Edit(torch.zeros(D), None, "x")
    with pytest.raises(
        ModelMismatchError, match=r"edits model\.layers\.9\.mlp\.weight, which this model does not have"
    ):
        with_edit("model.layers.9.mlp.weight", row).apply_(model)
    assert_same(before, model)
    with pytest.raises(ModelMismatchError, match=r"edits model\.norm\.bias, which this model does not have"):
        with_edit("model.norm.bias", row).apply_(model)
    assert_same(before, model)
    with pytest.raises(ShapeError, match=r"for shape \(31,\); the parameter has \(32,\)"):
        with_edit("model.norm.weight", Edit(torch.zeros(D - 1), None, "x")).apply_(model)
    assert_same(before, model)
    with pytest.raises(AttributeError):
        with_edit("model.norm.weight", row, config_updates={"no_such_key": 1}).apply_(model)
    assert_same(before, model)
    with_edit("model.norm.weight", row).apply_(model)  # control: such a patch as such is fine


def test_a_bias_that_exists_is_not_created() -> None:
    model = tiny("llama", attention_bias=True)
    before = snapshot(model)
    name = "model.layers.0.self_attn.q_proj.bias"
    with pytest.raises(ModelMismatchError, match=r"adds .* but the model has that bias already"):
        Patch({name: Edit(torch.ones(D), None, "x")}, fingerprint(model), {name: (D,)}).apply_(model)
    assert_same(before, model)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e5m2])
def test_quantised_weights(dtype: torch.dtype) -> None:
    model = tiny("llama")
    name = "model.layers.0.mlp.up_proj"
    model.get_submodule(name).weight = nn.Parameter(torch.ones(48, D).to(dtype), requires_grad=False)
    edits = {
        "model.norm.weight": Edit(torch.ones(D), None, "x"),
        f"{name}.weight": Edit(torch.ones(48, D), None, "x"),
    }
    norm = model.get_parameter("model.norm.weight").clone()
    with pytest.raises(UnsupportedModelError, match=rf"{name}\.weight is quantised \({dtype}\)"):
        Patch(edits, fingerprint(model)).apply_(model)
    assert torch.equal(model.get_parameter("model.norm.weight"), norm)


def test_meta_weights(patch: Patch) -> None:
    with pytest.raises(UnsupportedModelError, match="meta device"):
        patch.apply_(tiny("llama", tie_word_embeddings=True).to("meta"))


# Report


def test_report_norms_are_those_of_the_dense_change(model: nn.Module, patch: Patch) -> None:
    rows = {row.name: row for row in patch.report(model)}
    assert list(rows) == list(patch.edits)
    before = snapshot(model)["bits"]
    patch.apply_(model)
    for name, row in rows.items():
        change = model.get_parameter(name) - before.get(name, torch.zeros(()))
        assert math.isclose(row.norm, float(change.norm()), rel_tol=1e-9)
        assert row.norm > 1e-3
        assert row.rule == patch.edits[name].rule
        assert row.rank == patch.edits[name].rank
        if name in patch.new_biases:
            assert math.isnan(row.relative)
        else:
            assert math.isclose(row.relative, row.norm / float(before[name].norm()), rel_tol=1e-9)
    assert all(math.isnan(row.relative) for row in patch.report())
    assert [row.norm for row in patch.report()] == [row.norm for row in rows.values()]


def test_report_of_an_edit_to_zeros() -> None:
    """A bias may be all zeros: there is no relative change then, and no error."""
    model = tiny("qwen2")
    model.get_parameter("model.layers.0.self_attn.q_proj.bias").zero_()
    patch = bake(model, random_plan(model, Architecture.of(model).sites("attn_in")))
    rows = {row.name: row.relative for row in patch.report(model)}
    assert math.isnan(rows["model.layers.0.self_attn.q_proj.bias"])
    assert rows["model.layers.0.self_attn.k_proj.bias"] > 0


def test_values_are_frozen(patch: Patch) -> None:
    with pytest.raises(AttributeError):
        patch.fingerprint = "x"  # type: ignore[misc]
    with pytest.raises(TypeError):
        patch.edits["x"] = None  # type: ignore[index]
    with pytest.raises(InputError, match="a patch without edits"):
        Patch({}, "0" * 16)
    assert (
        repr(patch)
        == f"Patch({len(patch)} edited tensors, {len(patch.new_biases)} of them new biases, model={patch.fingerprint})"
    )


# Files


def test_round_trip(model: nn.Module, patch: Patch, tmp_path: Path) -> None:
    path = patch.save(tmp_path / "edit.safetensors")
    loaded = Patch.load(path)
    for part in (
        "fingerprint",
        "new_biases",
        "zero_biases",
        "config_updates",
        "tied",
        "exactness",
        "provenance",
        "untie",
    ):
        assert getattr(loaded, part) == getattr(patch, part), part
    assert list(loaded.edits) == list(patch.edits)
    for name, edit in patch.edits.items():
        assert torch.equal(loaded.edits[name].delta(), edit.delta())
        assert (loaded.edits[name].rule, loaded.edits[name].rank) == (edit.rule, edit.rank)
    before = snapshot(model)
    patch.apply_(model)
    expected = snapshot(model)["bits"]
    patch.revert_(model)
    loaded.apply_(model)
    for name, bits in snapshot(model)["bits"].items():
        assert torch.equal(bits, expected[name])
    loaded.revert_(model)
    assert_same(before, model)
    with pytest.raises(OutputExistsError):
        patch.save(path)
    patch.save(path, force=True)
    assert [p.name for p in tmp_path.iterdir()] == ["edit.safetensors"]


def test_rank_zero_round_trip(tmp_path: Path) -> None:
    empty = Patch({"a.weight": Edit(torch.zeros(4, 0), torch.zeros(0, 3), "nothing")}, "0" * 16)
    loaded = Patch.load(empty.save(tmp_path / "p"))
    assert loaded.edits["a.weight"].shape == (4, 3)
    assert loaded.edits["a.weight"].norm() == 0.0
    assert not loaded.edits["a.weight"].delta().any()


def test_damaged_files(patch: Patch, tmp_path: Path) -> None:
    path = patch.save(tmp_path / "whole")
    data = path.read_bytes()
    for cut in (0, 4, 8, 100, len(data) // 2, len(data) - 1):
        (tmp_path / "cut").write_bytes(data[:cut])
        with pytest.raises(FileFormatError, match="cut is not a whole safetensors file"):
            Patch.load(tmp_path / "cut")
    with pytest.raises(FileFormatError, match="is not a file"):
        Patch.load(tmp_path / "nowhere")
    plan = random_plan(tiny("llama"), Architecture.of(tiny("llama")).sites("final")).save(tmp_path / "plan")
    with pytest.raises(FileFormatError, match="holds 'erasure plan'; needed 'patch'"):
        Patch.load(plan)


def test_a_file_with_nan_or_a_missing_tensor(patch: Patch, tmp_path: Path) -> None:
    from repe_unlearn.tensorfile import read_tensors, write_tensors

    tensors, header = read_tensors(patch.save(tmp_path / "whole"), kind="patch", version=1)
    rest = {k: v for k, v in header.items() if k not in ("kind", "version")}

    def written(changed: dict, head: dict) -> Path:
        return write_tensors(tmp_path / "p", changed, kind="patch", version=1, header=head, force=True)

    assert len(Patch.load(written(tensors, rest))) == len(patch)  # control
    broken = [
        ({**tensors, "0.left": tensors["0.left"] * math.nan}, rest),
        ({k: v for k, v in tensors.items() if k != "0.left"}, rest),
        ({**tensors, "0.left": tensors["0.left"][:, :1]}, rest),
        (tensors, {k: v for k, v in rest.items() if k != "rules"}),
        (tensors, {**rest, "names": rest["names"][1:]}),
        (tensors, {**rest, "names": [], "rules": []}),
    ]
    for changed, head in broken:
        with pytest.raises(FileFormatError, match="is not a whole patch"):
            Patch.load(written(changed, head))
