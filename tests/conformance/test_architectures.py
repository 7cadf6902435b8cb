"""Every row of the architecture table is proved on a tiny random model of its family."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from tiny import CONFIGS, LAYERS, D, assert_same, hook_count, random_plan, reading, snapshot, tiny, token_ids
from torch import Tensor, nn

from repe_unlearn import architectures
from repe_unlearn.architectures import FAMILIES, KINDS, Architecture, Family, Kind, Read, Write, supported
from repe_unlearn.errors import (
    InputError,
    NotBakeableError,
    UnsupportedArchitectureError,
    UnsupportedModelError,
)
from repe_unlearn.fingerprints import fingerprint
from repe_unlearn.folding import bake, exactness
from repe_unlearn.hooks import apply
from repe_unlearn.sites import Site
from repe_unlearn.taps import tap

IN_BLOCK: tuple[Kind, ...] = ("attn_in", "mlp_in", "attn_out", "mlp_out")
BAKED: tuple[Kind, ...] = (*IN_BLOCK, "final")

# Where an eraser's constant has a bias slot, written down by hand from the families' own configs and modules.
SLOTS: dict[str, set[Kind]] = {
    "llama": {"attn_in", "mlp_in", "attn_out", "mlp_out"},
    "mistral": set(),
    "qwen2": {"attn_in"},
    "qwen3": {"attn_in", "attn_out"},
    "gemma2": {"attn_in"},
    "olmo2": {"attn_in"},
    "gpt2": {"attn_in", "mlp_in", "attn_out", "mlp_out"},
    "gpt_neox": {"attn_in", "mlp_in", "attn_out", "mlp_out"},
}
POST_NORM = {"gemma2", "olmo2"}
SEVERAL_READERS = [
    (name, kind)
    for family in FAMILIES
    for name in family.model_types
    for kind in ("attn_in", "mlp_in")
    if len(getattr(family, kind).readers) > 1
]

families = pytest.mark.parametrize("model_type", supported())
kinds = pytest.mark.parametrize("kind", BAKED)


def exact(model_type: str, kind: Kind) -> bool:
    return not (model_type in POST_NORM and kind in ("attn_out", "mlp_out"))


def row(model_type: str) -> Family:
    return next(family for family in FAMILIES if model_type in family.model_types)


@torch.no_grad()
def outputs(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """Logits and the residual stream after every block, read with plain hooks."""
    blocks = Architecture.of(model).sites("resid_post")
    with reading(model, blocks) as seen:
        logits = model(ids).logits
    return {"logits": logits, **{str(site): seen[site] for site in blocks}}


def gap(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Largest difference between two runs, relative to the size of each tensor."""
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max() / a[name].abs().max()) for name in a)


@contextmanager
def patched_row(monkeypatch: pytest.MonkeyPatch, model_type: str, **changes: object) -> Iterator[None]:
    with monkeypatch.context() as m:
        table = tuple(replace(f, **changes) if model_type in f.model_types else f for f in FAMILIES)
        m.setattr(architectures, "FAMILIES", table)
        yield


# The table itself


def test_every_row_has_a_tiny_model_and_expectations() -> None:
    assert set(supported()) == set(CONFIGS) == set(SLOTS)
    assert len(supported()) == len(set(supported())) == sum(len(f.model_types) for f in FAMILIES)


@families
def test_every_name_resolves(model_type: str) -> None:
    model = tiny(model_type)
    arch = Architecture.of(model)
    assert (arch.model_type, arch.n_layers) == (model_type, LAYERS)
    for kind in KINDS:
        sites = arch.sites(kind)
        assert len(sites) == len(set(sites)) == (1 if kind == "final" else LAYERS)
        for layer, site in enumerate(sites):
            assert isinstance(site.module(model), nn.Module)
            assert arch.locate(site) == (kind, LAYERS if kind == "final" else layer)
    for layer in range(LAYERS):
        block = model.get_submodule(arch.block(layer))
        for part in (arch.family.attn_in, arch.family.mlp_in):
            for reader in part.readers:
                weight = block.get_submodule(reader).weight
                assert weight.shape[0 if arch.family.transposed else 1] == D
        for part in (arch.family.attn_out, arch.family.mlp_out):
            weight = block.get_submodule(part.writer).weight
            assert weight.shape[1 if arch.family.transposed else 0] == D
            if part.norm is not None:
                assert block.get_submodule(part.norm).weight.shape == (D,)
        for names in arch.family.bias_switches.values():
            assert all(isinstance(block.get_submodule(name), nn.Module) for name in names)
    assert all(isinstance(model.get_submodule(name), nn.Embedding) for name in arch.family.embeddings)
    assert [model.get_submodule(name) for name in arch.family.final.readers] == [
        model.get_output_embeddings()
    ]
    assert model.get_submodule(arch.family.embeddings[0]) is model.get_input_embeddings()


@families
def test_the_tiny_model_hides_nothing(model_type: str) -> None:
    """Gains of 1, biases of 0 or a constant stream would let wrong rows pass."""
    model = tiny(model_type)
    for name, p in model.named_parameters():
        assert p.std() > 1e-2, name
    run = outputs(model, token_ids())
    assert all(bool(torch.isfinite(value).all()) and value.std() > 1e-2 for value in run.values())


def test_sites_by_layer_and_their_errors() -> None:
    arch = Architecture.of(tiny("llama"))
    assert arch.sites("mlp_in", "attn_in", layers=[-1, 0]) == (
        Site("model.layers.2.input_layernorm"),
        Site("model.layers.2.post_attention_layernorm"),
        Site("model.layers.0.input_layernorm"),
        Site("model.layers.0.post_attention_layernorm"),
    )
    assert arch.sites("final", "attn_in", layers=[1])[-1] == Site("model.norm")
    assert arch.sites("resid_pre", layers=[1]) == (Site("model.layers.1", "input"),)
    for wrong in ([LAYERS], [-LAYERS - 1]):
        with pytest.raises(InputError, match=rf"got layer -?{abs(wrong[0])}; this model has layers 0 to 2"):
            arch.sites("attn_in", layers=wrong)
    with pytest.raises(InputError, match="needed some of attn_in, mlp_in"):
        arch.sites("attention")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="got site kinds"):
        arch.sites()
    for foreign in ("model.layers.0.mlp", "model.embed_tokens", "model.layers", "model.layers.0.self_attn"):
        assert arch.locate(Site(foreign)) is None
    assert arch.locate(Site("model.layers.0.input_layernorm", "input")) is None


# What the sites are


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [*((name, {}) for name in supported()), ("gpt_neox", {"use_parallel_residual": False})],
)
def test_the_sublayers_write_all_there_is_in_the_stream(model_type: str, changes: dict) -> None:
    """Block output - block input = attn_out + mlp_out, so these sites are everything that is written."""
    model = tiny(model_type, **changes)
    arch = Architecture.of(model)
    with reading(model, arch.sites(*KINDS)) as seen, torch.no_grad():
        model(token_ids())
    columns = zip(*(arch.sites(k) for k in ("resid_pre", "attn_out", "mlp_out", "resid_post")), strict=True)
    for before, attention, mlp, after in columns:
        written = seen[after] - seen[before]
        torch.testing.assert_close(written, seen[attention] + seen[mlp], rtol=0, atol=1e-12)
        assert (written - seen[attention]).abs().max() > 1e-2  # control: one of the two is not enough
    for after, before in zip(arch.sites("resid_post"), arch.sites("resid_pre")[1:], strict=False):
        assert torch.equal(seen[after], seen[before])


@families
def test_embeddings_are_all_that_is_written_before_the_first_block(model_type: str) -> None:
    first = Architecture.of(tiny(model_type)).sites("resid_pre", layers=[0])
    embeddings = row(model_type).embeddings

    def stream(zeroed: tuple[str, ...]) -> Tensor:
        model = tiny(model_type)
        for name in zeroed:
            model.get_submodule(name).weight.zero_()
        with reading(model, first) as seen:
            model(token_ids())
        return seen[first[0]]

    assert not stream(embeddings).any()
    for kept in embeddings:  # control: each one writes
        assert stream(tuple(name for name in embeddings if name != kept)).abs().max() > 1e-2


# Readers: blind after baking


def nudged(model: nn.Module, sites: tuple[Site, ...], step: Tensor, ids: Tensor) -> dict[str, Tensor]:
    with tap(model, dict.fromkeys(sites, lambda x: x + step)):
        return outputs(model, ids)


@families
@pytest.mark.parametrize("kind", ["attn_in", "mlp_in", "final"])
def test_readers_are_all_consumers_of_the_site(model_type: str, kind: Kind) -> None:
    """After baking nothing downstream sees a push along what was removed: the row misses no consumer."""
    model, ids = tiny(model_type), token_ids()
    sites = Architecture.of(model).sites(kind)
    plan = random_plan(model, sites[:1], rank=4, affine=False)
    step = 3 * plan[sites[0]].left @ torch.tensor([1.0, -2.0, 0.5, 1.5], dtype=torch.float64)
    before = outputs(model, ids)
    assert gap(before, nudged(model, sites[:1], step, ids)) > 1e-3  # control: the site matters
    bake(model, plan).apply_(model)
    assert gap(outputs(model, ids), nudged(model, sites[:1], step, ids)) <= 1e-10
    part = getattr(row(model_type), kind)
    for reader in part.readers:
        name = reader if kind == "final" else f"{row(model_type).blocks}.0.{reader}"
        weight = model.get_submodule(name).weight
        weight = weight.T if row(model_type).transposed and kind != "final" else weight
        assert (weight @ plan[sites[0]].left).abs().max() <= 1e-12


# Hook == bake


@families
@kinds
@pytest.mark.parametrize("affine", [True, False])
def test_hook_equals_bake(model_type: str, kind: Kind, affine: bool) -> None:
    model, ids = tiny(model_type), token_ids()
    sites = Architecture.of(model).sites(kind)
    plan = random_plan(model, sites, affine=affine)
    if not exact(model_type, kind):
        with pytest.raises(NotBakeableError, match="stands between") as caught:
            bake(model, plan)
        assert 'allow="erasure-exact"' in caught.value.instead
        return
    if affine and kind not in SLOTS[model_type]:
        with pytest.raises(NotBakeableError, match="has no bias") as caught:
            bake(model, plan)
        assert caught.value.site == sites[0]
        assert "affine=False" in caught.value.instead
        return
    base, before = outputs(model, ids), snapshot(model)
    patch = bake(model, plan)
    assert_same(before, model)  # baking touches nothing
    with apply(model, plan):
        hooked = outputs(model, ids)
    assert hook_count(model) == 0
    assert_same(before, model)
    patch.apply_(model)
    baked = outputs(model, ids)
    assert gap(hooked, baked) <= 1e-10
    assert gap(base, baked) > 1e-3  # control: it does something
    assert fingerprint(model) != before["fingerprint"]
    assert dict(patch.exactness) == dict.fromkeys(map(str, sites), "exact")
    patch.revert_(model)
    assert_same(before, model)
    assert gap(base, outputs(model, ids)) == 0.0


@families
def test_all_bakeable_sites_at_once(model_type: str) -> None:
    model, ids = tiny(model_type), token_ids()
    wanted = [kind for kind in BAKED if exact(model_type, kind)]
    plan = random_plan(model, Architecture.of(model).sites(*wanted), rank=1, affine=False)
    with apply(model, plan):
        hooked = outputs(model, ids)
    base = outputs(model, ids)
    bake(model, plan).apply_(model)
    assert gap(hooked, outputs(model, ids)) <= 1e-9
    assert gap(hooked, base) > 1e-3


def test_parallel_and_serial_neox() -> None:
    for parallel in (True, False):
        model, ids = tiny("gpt_neox", use_parallel_residual=parallel), token_ids()
        plan = random_plan(model, Architecture.of(model).sites(*IN_BLOCK))
        with apply(model, plan):
            hooked = outputs(model, ids)
        bake(model, plan).apply_(model)
        assert gap(hooked, outputs(model, ids)) <= 1e-9


@families
@pytest.mark.parametrize("tied", [True, False])
def test_final_tied_and_untied(model_type: str, tied: bool) -> None:
    model, ids = tiny(model_type, tie_word_embeddings=tied), token_ids()
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert (embedding.weight is head.weight) is tied
    plan = random_plan(model, Architecture.of(model).sites("final"), affine=False)
    before, old = snapshot(model), embedding.weight.clone()
    base = outputs(model, ids)
    with apply(model, plan):
        hooked = outputs(model, ids)
    patch = bake(model, plan).apply_(model)
    baked = outputs(model, ids)
    assert gap(hooked, baked) <= 1e-10
    assert gap(base, baked) > 1e-3
    assert patch.untie is tied
    assert embedding.weight is not head.weight
    assert torch.equal(embedding.weight, old)  # the input side is not erased
    assert not torch.equal(head.weight, old)
    assert model.config.tie_word_embeddings is False
    patch.revert_(model)
    assert_same(before, model)
    assert (embedding.weight is head.weight) is tied


@pytest.mark.parametrize(("model_type", "kind"), SEVERAL_READERS)
def test_a_dropped_reader_is_detected(model_type: str, kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    part: Read = getattr(row(model_type), kind)
    model, ids = tiny(model_type), token_ids()
    plan = random_plan(model, Architecture.of(model).sites(kind), affine=False)
    with apply(model, plan):
        hooked = outputs(model, ids)
    for dropped in part.readers:
        short = replace(part, readers=tuple(name for name in part.readers if name != dropped))
        with patched_row(monkeypatch, model_type, **{kind: short}):
            patch = bake(model, plan).apply_(model)
        assert gap(hooked, outputs(model, ids)) > 1e-4, f"{dropped} could be missing"
        patch.revert_(model)


@pytest.mark.parametrize("model_type", sorted(set(supported()) - POST_NORM))
@pytest.mark.parametrize("kind", ["attn_out", "mlp_out"])
def test_a_wrong_writer_is_detected(model_type: str, kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    other: Write = getattr(row(model_type), "mlp_out" if kind == "attn_out" else "attn_out")
    model, ids = tiny(model_type), token_ids()
    plan = random_plan(model, Architecture.of(model).sites(kind), affine=False)
    with apply(model, plan):
        hooked = outputs(model, ids)
    wrong = replace(getattr(row(model_type), kind), writer=other.writer)
    with patched_row(monkeypatch, model_type, **{kind: wrong}):
        bake(model, plan).apply_(model)
    assert gap(hooked, outputs(model, ids)) > 1e-4


# Bias slots


@families
def test_bias_switches_say_what_the_config_does(model_type: str) -> None:
    """The biases that a patch creates are exactly those that a model built with its config has."""
    for switch, names in row(model_type).bias_switches.items():
        off, on = (dict(tiny(model_type, **{switch: state}).named_parameters()) for state in (False, True))
        expected = {f"{row(model_type).blocks}.{i}.{name}.bias" for i in range(LAYERS) for name in names}
        assert set(on) - set(off) == expected
        assert not set(off) - set(on)


@pytest.mark.parametrize(
    ("model_type", "kind"), [(name, kind) for name in SLOTS for kind in sorted(SLOTS[name])]
)
def test_created_biases_fit_a_model_of_the_new_config(model_type: str, kind: Kind) -> None:
    """One layer is edited; plain transformers builds the same model from the patched config and weights."""
    model, ids = tiny(model_type), token_ids()
    patch = bake(model, random_plan(model, Architecture.of(model).sites(kind, layers=[1])))
    patch.apply_(model)
    fresh = type(model)(model.config).eval().to(torch.float64)
    assert fresh.load_state_dict(model.state_dict(), strict=True)
    assert gap(outputs(model, ids), outputs(fresh, ids)) <= 1e-12
    for name in patch.zero_biases:
        assert not model.get_parameter(name).any()
    assert not set(patch.zero_biases) & set(patch.edits)
    assert set(patch.new_biases) <= set(patch.edits)
    assert bool(patch.new_biases) == bool(patch.config_updates)


def test_existing_biases_are_edited_not_replaced() -> None:
    model, ids = tiny("llama", attention_bias=True, mlp_bias=True), token_ids()
    plan = random_plan(model, Architecture.of(model).sites(*IN_BLOCK))
    with apply(model, plan):
        hooked = outputs(model, ids)
    patch = bake(model, plan)
    assert not patch.new_biases
    assert not patch.zero_biases
    assert not patch.config_updates
    patch.apply_(model)
    assert gap(hooked, outputs(model, ids)) <= 1e-9


@families
def test_exactness_names_the_class_of_every_kind(model_type: str) -> None:
    model = tiny(model_type)
    before = snapshot(model)
    found = exactness(model)
    assert_same(before, model)
    assert set(found) == set(KINDS)
    for kind, by_form in found.items():
        assert set(by_form) == {"affine", "linear"}
        for form, answer in by_form.items():
            if kind in ("resid_pre", "resid_post"):
                assert answer.startswith("hook only: the residual stream")
            elif not exact(model_type, kind):
                assert answer == "erasure-exact"
            elif form == "affine" and kind not in SLOTS[model_type]:
                assert answer.startswith("hook only: ")
                assert "has no bias" in answer
            else:
                assert answer == "exact"


# What cannot be baked


@families
@pytest.mark.parametrize("kind", ["resid_pre", "resid_post"])
def test_residual_sites_are_refused(model_type: str, kind: Kind) -> None:
    model = tiny(model_type)
    before = snapshot(model)
    plan = random_plan(model, Architecture.of(model).sites(kind, layers=[1]), affine=False)
    for allow in ("exact", "erasure-exact"):
        with pytest.raises(NotBakeableError) as caught:
            bake(model, plan, allow=allow)
        assert caught.value.site == plan.sites[0]
        assert "skip path" in caught.value.reason
        assert "attn_in and mlp_in" in caught.value.instead
        assert "apply()" in caught.value.instead
    assert_same(before, model)
    base = outputs(model, token_ids())
    with apply(model, plan):  # as a hook it works
        assert gap(base, outputs(model, token_ids())) > 1e-3


def test_sites_outside_the_row_are_refused() -> None:
    model = tiny("llama")
    with pytest.raises(NotBakeableError, match="no site of the llama row"):
        bake(model, random_plan(model, [Site("model.layers.0.mlp")]))
    with pytest.raises(InputError, match="needed one of exact, erasure-exact"):
        bake(model, random_plan(model, Architecture.of(model).sites("attn_in")), allow="close")  # type: ignore[arg-type]


@pytest.mark.parametrize("model_type", sorted(POST_NORM))
@pytest.mark.parametrize("kind", ["attn_out", "mlp_out"])
@pytest.mark.parametrize("affine", [True, False])
def test_post_norm_bake_removes_what_the_eraser_reads(model_type: str, kind: Kind, affine: bool) -> None:
    model = tiny(model_type, attention_bias=True)
    sites = Architecture.of(model).sites(kind)
    plan = random_plan(model, sites, affine=affine)

    def read() -> dict[Site, float]:
        largest = dict.fromkeys(sites, 0.0)
        for seed in range(3):
            with reading(model, sites) as seen:
                model(token_ids(seed=seed))
            for site in sites:
                value = float((seen[site] @ plan[site].right.T).abs().max())
                largest[site] = max(largest[site], value)
        return largest

    before = read()
    patch = bake(model, plan, allow="erasure-exact")
    assert dict(patch.exactness) == dict.fromkeys(map(str, sites), "erasure-exact")
    base = outputs(model, token_ids())
    saved = snapshot(model)
    patch.apply_(model)
    after = read()
    for site in sites:
        assert before[site] > 1e-2  # control
        assert after[site] <= 1e-6
    assert gap(base, outputs(model, token_ids())) > 1e-3
    patch.revert_(model)
    assert_same(saved, model)


@pytest.mark.parametrize("model_type", sorted(POST_NORM))
def test_post_norm_gain_is_needed(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Control for the gain: with a wrong offset the baked writer leaves something to read."""
    model = tiny(model_type)
    site = Architecture.of(model).sites("mlp_out", layers=[0])[0]
    plan = random_plan(model, [site])
    with patched_row(monkeypatch, model_type, norm_offset=row(model_type).norm_offset + 0.5):
        patch = bake(model, plan, allow="erasure-exact")
    patch.apply_(model)
    with reading(model, [site]) as seen:
        model(token_ids())
    assert (seen[site] @ plan[site].right.T).abs().max() > 1e-3


# Other models


def test_unknown_families_are_refused_with_a_way_out() -> None:
    from transformers import BertConfig, BertModel, T5Config, T5ForConditionalGeneration

    size = {"vocab_size": 97, "num_hidden_layers": 1, "num_attention_heads": 2}
    bert = BertModel(BertConfig(**size, hidden_size=16, intermediate_size=16))
    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=97, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    )
    for model, name in ((bert, "'bert'"), (t5, "'t5'"), (nn.Linear(2, 2), "None")):
        with pytest.raises(UnsupportedArchitectureError) as caught:
            Architecture.of(model)
        text = str(caught.value)
        assert name in text
        assert all(model_type in text for model_type in supported())
        assert "add a row to FAMILIES" in text
        assert "Site(" in text


@families
def test_a_model_without_its_head_is_refused(model_type: str) -> None:
    with pytest.raises(UnsupportedModelError, match="load the whole model"):
        Architecture.of(tiny(model_type).base_model)


def test_another_head_cannot_be_baked_at_final() -> None:
    from transformers import LlamaForSequenceClassification

    model = LlamaForSequenceClassification(tiny("llama").config).eval()
    plan = random_plan(model, Architecture.of(model).sites("final"), affine=False)
    with pytest.raises(UnsupportedModelError, match=r"lm_head\.weight"):
        bake(model, plan)


def test_rows_are_frozen_and_kinds_are_complete() -> None:
    with pytest.raises(AttributeError):
        FAMILIES[0].blocks = "elsewhere"  # type: ignore[misc]
    assert len(SEVERAL_READERS) == 12  # neither of the two families with fused readers
    assert set(BAKED) == set(KINDS) - {"resid_pre", "resid_post"}
    assert all(isinstance(getattr(family, kind), Read | Write) for family in FAMILIES for kind in BAKED)
