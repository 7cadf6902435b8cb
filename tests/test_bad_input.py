"""Bad input, one kind after the other, through the public names alone: one clear error, and nothing left behind."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import safetensors.torch
import torch
from auditkit import NEUTRAL, spoken
from folders import save
from textkit import pairs, text_model, text_tokenizer
from tiny import assert_same, hook_count, snapshot
from torch import nn
from transformers import PreTrainedTokenizerFast

import repe_unlearn as ru
from repe_unlearn import errors

CONTRAST = pairs(24)
quiet = {"select": "mean", "progress": False}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return text_tokenizer()


@pytest.fixture(scope="module")
def shared() -> nn.Module:
    return text_model("llama", dtype=torch.float32)


@pytest.fixture
def model(shared: nn.Module, tmp_path: Path) -> Iterator[nn.Module]:
    """A model that must come out of the test as it went in, while no file appears beside it."""
    before, files = snapshot(shared), tree(tmp_path)
    yield shared
    assert_same(before, shared)
    assert hook_count(shared) == 0
    assert tree(tmp_path) == files


def tree(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_size for p in folder.rglob("*")}


@pytest.fixture(scope="module")
def sites(shared: nn.Module) -> tuple[ru.Site, ...]:
    return ru.Architecture.of(shared).sites("attn_in", "mlp_in")


@pytest.fixture(scope="module")
def plan(shared: nn.Module, tokenizer: PreTrainedTokenizerFast, sites: tuple[ru.Site, ...]) -> ru.ErasurePlan:
    return ru.fit_sequential(shared, tokenizer, CONTRAST, sites, **quiet)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory, plan: ru.ErasurePlan, shared: nn.Module) -> Path:
    """A folder with a plan, a patch and the model they are for."""
    kept = tmp_path_factory.mktemp("kept")
    plan.save(kept / "plan.safetensors")
    ru.bake(shared, plan).save(kept / "patch.safetensors")
    save(kept / "model", shared)
    return kept


# NaN activations


@pytest.mark.parametrize("run", [ru.capture, ru.gather, ru.fit_sequential])
def test_nan_activations(
    run: Callable, model: nn.Module, tokenizer: PreTrainedTokenizerFast, sites: tuple[ru.Site, ...]
) -> None:
    def spoil(_module: nn.Module, _args: object, output: torch.Tensor) -> torch.Tensor:
        return output.masked_fill(torch.arange(output.shape[-1]) == 3, torch.nan)

    with model.get_submodule("model.layers.1.mlp").register_forward_hook(spoil):
        with pytest.raises(
            errors.NonFiniteError, match=r"activations at model\.layers\.2\.input_layernorm hold NaN"
        ):
            run(model, tokenizer, CONTRAST, sites, **quiet)
        run(model, tokenizer, CONTRAST, sites[:4], **quiet)  # control: what comes before the fault works


def test_nan_in_tensors_of_ones_own() -> None:
    x, z = torch.randn(8, 4), torch.arange(8) % 2
    assert ru.solvers.leace(ru.Moments.of(x, z)).rank == 1
    with pytest.raises(errors.NonFiniteError, match="NaN"):
        ru.Moments.of(x.masked_fill(x == x[0, 0], torch.nan), z)
    with pytest.raises(errors.NonFiniteError, match="NaN"):
        ru.Eraser(torch.full((4, 1), torch.nan), torch.ones(1, 4), torch.zeros(4))


# One-class labels, fewer prompts than classes, empty prompts


def test_one_class_labels() -> None:
    with pytest.raises(errors.NotEnoughDataError, match="label"):
        ru.Contrast.from_labels(["He is late.", "He ran."], ["male", "male"])
    with pytest.raises(errors.NotEnoughDataError, match=r"z is constant over all 6 samples \(one class\)"):
        ru.solvers.leace(ru.Moments.of(torch.randn(6, 3), torch.zeros(6, dtype=torch.long), classes=2))


def test_fewer_prompts_than_classes() -> None:
    with pytest.raises(
        errors.NotEnoughDataError, match="2 prompts for 3 classes; each class needs at least one"
    ):
        ru.Contrast.from_labels(["a cat", "a dog"], ["cat", "dog"], classes=["cat", "dog", "cow"])


@pytest.mark.parametrize("empty", ["", "  \n"])
def test_empty_prompts(empty: str) -> None:
    with pytest.raises(errors.InputError, match="example 1: the text is empty or only whitespace"):
        ru.Contrast.from_pairs([("He ran.", empty)])
    with pytest.raises(errors.InputError, match="example 2: the text is empty"):
        ru.Contrast.from_labels(["a", "b", empty], ["x", "y", "x"])


@pytest.mark.parametrize("run", [ru.capture, ru.fit_sequential])
def test_prompts_of_which_no_token_is_left(
    run: Callable, model: nn.Module, tokenizer: PreTrainedTokenizerFast, sites: tuple[ru.Site, ...]
) -> None:
    contrast = ru.Contrast.from_pairs([("ab", "cd"), ("abcdef", "b")])
    with pytest.raises(errors.NotEnoughDataError, match=r"no token of prompt 0 \('ab', 3 tokens\) is left"):
        run(model, tokenizer, contrast, sites, select="mean,sinks=3", progress=False)


# Wrong width


def test_wrong_width(model: nn.Module, plan: ru.ErasurePlan, sites: tuple[ru.Site, ...]) -> None:
    narrow = ru.Eraser(torch.eye(16)[:, :1], torch.eye(16)[:1], torch.zeros(16))
    with pytest.raises(errors.ShapeError, match="16"):
        narrow(torch.randn(3, 32))
    with pytest.raises(errors.ShapeError, match="merge"):
        ru.Moments.of(torch.randn(4, 3), torch.arange(4) % 2) + ru.Moments.of(
            torch.randn(4, 5), torch.arange(4) % 2
        )
    wrong = plan.replace({sites[0]: narrow})
    with pytest.raises(errors.ShapeError, match="width 16 does not fit"):
        ru.bake(model, wrong)
    with (
        pytest.raises(errors.ShapeError, match="activations of width 32; the eraser at this site needs 16"),
        ru.apply(model, wrong),
    ):
        model(torch.tensor([[1, 2, 3]]))


# A plan for another model


def test_a_plan_for_another_model(
    plan: ru.ErasurePlan, tokenizer: PreTrainedTokenizerFast, kept: Path
) -> None:
    other = text_model("llama", dtype=torch.float32, seed=1)
    before = snapshot(other)
    patch = ru.Patch.load(kept / "patch.safetensors")
    fit, heldout = spoken().split(0.4)
    for use in (
        lambda: ru.apply(other, plan),
        lambda: ru.bake(other, plan),
        lambda: patch.apply_(other),
        lambda: ru.verify(other, tokenizer, plan, fit=fit, heldout=heldout, neutral=NEUTRAL, progress=False),
    ):
        with pytest.raises(errors.ModelMismatchError, match=rf"{plan.fingerprint}.*{ru.fingerprint(other)}"):
            use()
    assert_same(before, other)
    assert hook_count(other) == 0


def test_a_patch_for_another_checkpoint(kept: Path, tmp_path: Path) -> None:
    other = save(tmp_path / "other", text_model("llama", dtype=torch.float32, seed=1))
    before = tree(tmp_path)
    patch = ru.Patch.load(kept / "patch.safetensors")
    with pytest.raises(errors.ModelMismatchError, match="fingerprint"):
        ru.export.checkpoint(other, patch, tmp_path / "out", progress=False)
    assert tree(tmp_path) == before


# Truncated or foreign safetensors


@pytest.mark.parametrize(("reader", "name"), [(ru.ErasurePlan.load, "plan"), (ru.Patch.load, "patch")])
def test_truncated_and_foreign_files(reader: Callable, name: str, kept: Path, tmp_path: Path) -> None:
    good = (kept / f"{name}.safetensors").read_bytes()
    file = tmp_path / "file.safetensors"
    for size in (0, 5, 100, len(good) // 2, len(good) - 1):
        file.write_bytes(good[:size])
        with pytest.raises(errors.FileFormatError, match="not a whole safetensors file"):
            reader(file)
    file.write_text("once upon a time")
    with pytest.raises(errors.FileFormatError, match="not a whole safetensors file"):
        reader(file)
    with pytest.raises(errors.FileFormatError, match="safetensors file of something else"):
        reader(kept / "model" / "model.safetensors")
    other = {"plan": "patch", "patch": "plan"}[name]
    with pytest.raises(errors.FileFormatError, match=r"holds .* needed"):
        reader(kept / f"{other}.safetensors")
    with pytest.raises(errors.FileFormatError, match="is not a file"):
        reader(tmp_path / "none.safetensors")
    file.write_bytes(good)
    reader(file)  # control


def test_a_truncated_checkpoint(kept: Path, tmp_path: Path) -> None:
    import shutil

    source = shutil.copytree(kept / "model", tmp_path / "model")
    weights = source / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    before = tree(tmp_path)
    with pytest.raises(errors.FileFormatError, match="truncated"):
        ru.load(source, progress=False)
    patch = ru.Patch.load(kept / "patch.safetensors")
    with pytest.raises(errors.FileFormatError, match=r"model\.safetensors"):
        ru.export.checkpoint(source, patch, tmp_path / "out", progress=False)
    assert tree(tmp_path) == before


# An unknown site


def test_an_unknown_site(
    model: nn.Module, tokenizer: PreTrainedTokenizerFast, plan: ru.ErasurePlan, sites: tuple[ru.Site, ...]
) -> None:
    nowhere = ru.Site("model.layers.7.input_layernorm")
    lost = plan.replace({sites[0]: plan[sites[0]], nowhere: plan[sites[1]]})
    for use in (
        lambda: ru.capture(model, tokenizer, CONTRAST, [sites[0], nowhere], progress=False),
        lambda: ru.gather(model, tokenizer, CONTRAST, [sites[0], nowhere], progress=False),
        lambda: ru.fit_sequential(model, tokenizer, CONTRAST, [sites[0], nowhere], progress=False),
        lambda: ru.apply(model, lost),
        lambda: ru.bake(model, lost),
    ):
        with pytest.raises(
            errors.UnknownSiteError, match=r"'model\.layers\.7\.input_layernorm'.*nearest: model\.layers"
        ):
            use()
        assert hook_count(model) == 0
    with pytest.raises(errors.InputError, match="got layer 7; this model has layers 0 to 2"):
        ru.Architecture.of(model).sites("attn_in", layers=[7])
    with pytest.raises(errors.InputError, match="got site kinds"):
        ru.Architecture.of(model).sites("nose")  # type: ignore[arg-type]


# The output exists


def test_the_output_exists(plan: ru.ErasurePlan, kept: Path, tmp_path: Path) -> None:
    patch = ru.Patch.load(kept / "patch.safetensors")
    report = ru.Report("t", "", (ru.Check.at_most("kl", 0.01, 0.05),), (), {})
    file, folder = tmp_path / "file", tmp_path / "folder"
    file.write_text("mine")
    folder.mkdir()
    (folder / "report.json").write_text("mine")
    before = tree(tmp_path)
    for use in (
        lambda: plan.save(file),
        lambda: patch.save(file),
        lambda: ru.export.checkpoint(kept / "model", patch, folder, progress=False),
        lambda: ru.export.checkpoint(kept / "model", patch, file, progress=False),
        lambda: report.save(folder),
    ):
        with pytest.raises(errors.OutputExistsError, match=r"exists|already there"):
            use()
    assert tree(tmp_path) == before
    assert file.read_text() == (folder / "report.json").read_text() == "mine"
    with pytest.raises(errors.OutputExistsError, match="even with force=True: it is no checkpoint folder"):
        ru.export.checkpoint(kept / "model", patch, folder, force=True, progress=False)
    assert tree(tmp_path) == before
    plan.save(file, force=True)  # control
    assert ru.ErasurePlan.load(file).sites == plan.sites


# A full disk


def full(*_args: object, **_options: object) -> None:
    raise OSError(28, "No space left on device")


def test_a_full_disk_leaves_no_plan_and_no_patch(
    plan: ru.ErasurePlan, kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patch = ru.Patch.load(kept / "patch.safetensors")
    old = tmp_path / "old.safetensors"
    plan.save(old)
    before = old.read_bytes()

    def half_written(_tensors: object, path: Path, **_options: object) -> None:
        Path(path).write_bytes(b"half of it")
        full()

    monkeypatch.setattr(safetensors.torch, "save_file", half_written)
    for thing in (plan, patch):
        for path, force in ((tmp_path / "new.safetensors", False), (old, True)):
            with pytest.raises(OSError, match="No space left on device"):
                thing.save(path, force=force)
    assert [p.name for p in tmp_path.iterdir()] == ["old.safetensors"]
    assert old.read_bytes() == before  # the old file outlives a failed replacement


@pytest.mark.parametrize("after", [0, 1, 4])
def test_a_full_disk_leaves_no_checkpoint(
    kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    patch = ru.Patch.load(kept / "patch.safetensors")
    out = tmp_path / "out"
    ru.export.checkpoint(kept / "model", patch, out, progress=False)
    before = tree(tmp_path)
    module = sys.modules["repe_unlearn.export.checkpoint"]
    new_values, calls = module.new_values, []

    def sometimes(*args: object) -> object:
        if len(calls) == after:  # some tensors are on the disk by then
            full()
        calls.append(1)
        return new_values(*args)

    monkeypatch.setattr(module, "new_values", sometimes)
    for path, force in ((tmp_path / "new", False), (out, True)):
        calls.clear()
        with pytest.raises(OSError, match="No space left on device"):
            ru.export.checkpoint(kept / "model", patch, path, force=force, progress=False)
        assert tree(tmp_path) == before


def test_a_full_disk_leaves_no_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    report = ru.Report("t", "", (ru.Check.at_most("kl", 0.01, 0.05),), (), {})
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left on device"):
        report.save(tmp_path / "a" / "report")
    assert not list(tmp_path.iterdir())


# An exception while a plan is active


def test_an_exception_inside_with_apply(model: nn.Module, plan: ru.ErasurePlan) -> None:
    ids = torch.tensor([[1, 2, 3]])
    base = model(ids).logits
    for error in (ValueError("inside"), KeyboardInterrupt("inside")):

        def body(error: BaseException = error) -> None:
            with ru.apply(model, plan):
                assert not torch.equal(model(ids).logits, base)
                raise error

        with pytest.raises(type(error), match="inside"):
            body()
        assert hook_count(model) == 0
        assert torch.equal(model(ids).logits, base)


def test_an_exception_inside_a_forward(
    model: nn.Module, plan: ru.ErasurePlan, tokenizer: PreTrainedTokenizerFast, sites: tuple[ru.Site, ...]
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("deep inside")

    def forward() -> None:
        with ru.apply(model, plan):
            model(torch.tensor([[1, 2, 3]]))

    runs = [partial(f, model, tokenizer, CONTRAST, sites, **quiet) for f in (ru.capture, ru.fit_sequential)]
    for use in (forward, *runs):
        with (
            model.get_submodule("model.layers.1.mlp").register_forward_hook(fail),
            pytest.raises(RuntimeError, match="deep inside"),
        ):
            use()
        assert hook_count(model) == 0


def test_an_exception_while_weights_are_patched(
    model: nn.Module, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patch = ru.Patch.load(kept / "patch.safetensors")
    kind = type(next(iter(patch.edits.values())))
    apply, calls = kind.apply, []

    def third_fails(self: object, weight: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return apply(self, weight)

    monkeypatch.setattr(kind, "apply", third_fails)
    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        patch.apply_(model)
    assert_same(before, model)
    patch.apply_(model)  # control: nothing of the failed attempt is in the way
    with pytest.raises(AssertionError):
        assert_same(before, model)
    patch.revert_(model)
