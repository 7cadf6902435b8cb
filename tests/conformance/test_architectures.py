"""Every row of the architecture table is proved on a tiny random model of its family."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from rowkit import (
    ABSENT,
    CASES,
    MOE,
    POST_LAYERNORM,
    POST_NORM,
    SLOTS,
    baked_kinds,
    bakes,
    float64_throughout,
    gap,
    outputs,
    patched_part,
    patched_row,
    stream_class,
    weights,
)
from tiny import (
    CONFIGS,
    DECODERS,
    LAYERS,
    D,
    assert_same,
    hook_count,
    random_plan,
    reading,
    snapshot,
    tiny,
    tiny_inputs,
    token_ids,
)
from torch import Tensor, nn

from repe_unlearn.architectures import (
    FAMILIES,
    IN_BLOCK,
    KINDS,
    Absent,
    Architecture,
    Experts,
    Kind,
    Read,
    Write,
    supported,
)
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

SEVERAL_READERS: list[tuple[str, Kind]] = [
    (name, kind)
    for name, kind in baked_kinds()
    if kind in ("attn_in", "mlp_in")
    and len(weights(CASES[name].arch(CASES[name].model()).layouts[0], kind)) > 1
]

cases = pytest.mark.parametrize("name", CASES)
kinds = pytest.mark.parametrize(("name", "kind"), baked_kinds())


# The table itself


def test_every_row_has_a_tiny_model_and_expectations() -> None:
    assert set(supported()) == set(CONFIGS)
    assert len(supported()) >= 30
    assert set(SLOTS) == set(CASES)
    bound = [case.arch(case.model()) for case in CASES.values()]
    reached = {(FAMILIES.index(arch.family), layout) for arch in bound for layout in arch.layouts}
    assert reached == {(i, layout) for i, family in enumerate(FAMILIES) for layout in family.layouts}


@cases
def test_every_name_resolves(name: str) -> None:
    case = CASES[name]
    model = case.model()
    arch = case.arch(model)
    assert (arch.model_type, arch.n_layers) == (case.model_type, LAYERS)
    for kind in arch.kinds:
        sites = arch.sites(kind)
        assert len(sites) == len(set(sites)) == (1 if kind == "final" else LAYERS)
        for layer, site in enumerate(sites):
            assert isinstance(site.module(model), nn.Module)
            assert arch.locate(site) == (kind, LAYERS if kind == "final" else layer)
    side = 0 if arch.family.transposed else 1
    for layer, layout in enumerate(arch.layouts):
        block = model.get_submodule(arch.block(layer))
        for kind in set(arch.kinds) & set(IN_BLOCK):
            part = layout.part(kind)
            for weight in weights(layout, kind):
                if isinstance(weight, Experts):
                    axis = weight.axes.index("i" if isinstance(part, Read) else "o")
                    assert block.get_parameter(weight.path).shape[axis] == D
                    assert weight.bias is None or block.get_parameter(weight.bias).ndim == 2
                else:
                    wide = block.get_submodule(weight).weight.shape
                    assert wide[side if isinstance(part, Read) else 1 - side] == D
            if isinstance(part, Write) and part.norm is not None:
                assert block.get_submodule(part.norm).weight.shape == (D,)
    if isinstance(arch.family.final, Read) and not arch.family.final.hook_only:
        (head,) = arch.family.final.readers
        heads = (model.get_output_embeddings(), getattr(model, "classifier", None))
        assert model.get_submodule(str(head)) in heads
    if case.model_type != "vit":
        table = model.get_submodule(arch.path(arch.family.embeddings[0])).weight
        assert table is model.get_input_embeddings().weight


@cases
def test_the_tiny_model_hides_nothing(name: str) -> None:
    """Gains of 1, biases of 0 or a constant stream would let wrong rows pass."""
    model = CASES[name].model()
    for parameter, p in model.named_parameters():
        assert p.std() > 1e-2, parameter
    run = outputs(CASES[name], model)
    assert all(bool(torch.isfinite(value).all()) and value.std() > 1e-2 for value in run.values())


@cases
def test_what_a_family_lacks_is_said_by_name(name: str) -> None:
    case = CASES[name]
    arch = case.arch(case.model())
    lacking = ABSENT.get(name, frozenset()) | (
        set() if case.stack == "decoder" else {"cross_in", "cross_out"}
    )
    assert set(arch.kinds) == set(KINDS) - lacking
    assert set(arch.reads) == {"attn_in", "mlp_in", "cross_in"} - lacking
    for kind in lacking:
        with pytest.raises(InputError, match=rf"{case.model_type} has no {kind}: \w+") as caught:
            arch.sites("attn_in", kind)
        if kind in ("mlp_in", "final"):
            assert "ask for" in str(caught.value)


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
    for foreign in (
        "model.layers.0.mlp",
        "model.embed_tokens",
        "model.layers",
        "model.layers.0.self_attn",
        "model.layers.9.input_layernorm",
    ):
        assert arch.locate(Site(foreign)) is None
    assert arch.locate(Site("model.layers.0.input_layernorm", "input")) is None


# What the sites are


@cases
def test_the_sublayers_write_all_there_is_in_the_stream(name: str) -> None:
    """Block output - block input = the sum of the writes, so these sites are everything that is written."""
    case = CASES[name]
    model = case.model()
    arch = case.arch(model)
    with reading(model, arch.sites(*arch.kinds)) as seen, torch.no_grad():
        model(**tiny_inputs(case.model_type))
    out = [kind for kind in ("attn_out", "cross_out", "mlp_out") if kind in arch.kinds]
    scale = getattr(model.config, arch.family.residual_scale) if arch.family.residual_scale else 1.0
    assert arch.family.post_layernorm == (name in POST_LAYERNORM)
    previous = None
    for layer in range(LAYERS):
        before, after = (seen[arch.sites(kind, layers=[layer])[0]] for kind in ("resid_pre", "resid_post"))
        writes = [seen[site].reshape(before.shape) for site in arch.sites(*out, layers=[layer])]
        if name in POST_LAYERNORM:
            block = model.get_submodule(arch.block(layer))
            first, second = (block.get_submodule(norm) for norm in POST_LAYERNORM[name])
            expected = second(first(before + writes[0]) + writes[1])
            control = second(before + writes[0] + writes[1])
        else:
            expected, control = before + scale * sum(writes), before + scale * writes[0]
        torch.testing.assert_close(after, expected, rtol=0, atol=1e-10)
        assert (after - control).abs().max() > 1e-2  # control: one of the writes is not enough
        assert previous is None or torch.equal(before, previous)
        previous = after


@cases
def test_the_stream_is_what_transformers_calls_hidden_states(name: str) -> None:
    case = CASES[name]
    model = case.model(dtype=torch.float32)
    arch = case.arch(model)
    inputs = tiny_inputs(case.model_type, dtype=torch.float32)
    with reading(model, arch.sites("resid_pre", "resid_post")) as seen, torch.no_grad():
        result = model(**inputs, output_hidden_states=True)
    states = result[f"{arch.family.stack}_hidden_states" if arch.family.stack else "hidden_states"]
    assert len(states) == LAYERS + 1
    for layer, site in enumerate(arch.sites("resid_pre")):
        torch.testing.assert_close(seen[site], states[layer], rtol=0, atol=1e-6)
        other = states[(layer + 1) % LAYERS]
        assert (seen[site] - other).abs().max() > 1e-2  # control: another layer shows
    last = seen[arch.sites("resid_post")[-1]]
    if (
        "final" in arch.kinds and case.model_type != "vit"
    ):  # decoders put the last state through the final norm
        last = model.get_submodule(arch.sites("final")[0].path)(last)
    if name != "opt-350m":  # its last state is projected to the width of the embeddings
        torch.testing.assert_close(last, states[-1], rtol=0, atol=1e-6)


@cases
def test_embeddings_are_all_that_is_written_before_the_first_block(name: str) -> None:
    case = CASES[name]
    family = case.arch(case.model()).family

    def stream(zeroed: tuple[str, ...]) -> Tensor:
        model = case.model()
        for path in zeroed:
            owner, _, leaf = path.rpartition(".")
            part = getattr(model.get_submodule(owner), leaf)
            for p in (part,) if isinstance(part, Tensor) else part.parameters():
                p.zero_()
        first = case.arch(model).sites("resid_pre", layers=[0])
        with reading(model, first) as seen:
            model(**tiny_inputs(case.model_type))
        norm = family.embedding_norm
        return seen[first[0]] - (model.get_submodule(norm).bias if norm else 0.0)

    assert stream(family.embeddings).abs().max() == 0
    for kept in family.embeddings:  # control: each one writes
        assert stream(tuple(name for name in family.embeddings if name != kept)).abs().max() > 1e-2


# Readers: blind after baking


def nudged(name: str, model: nn.Module, sites: tuple[Site, ...], step: Tensor) -> dict[str, Tensor]:
    with tap(model, dict.fromkeys(sites, lambda x: x + step)):
        return outputs(CASES[name], model)


@pytest.mark.parametrize(("name", "kind"), [(n, k) for n, k in baked_kinds() if not k.endswith("_out")])
def test_readers_are_all_consumers_of_the_site(name: str, kind: Kind) -> None:
    """After baking nothing downstream sees a push along what was removed: the row misses no consumer."""
    case = CASES[name]
    model = case.model()
    arch = case.arch(model)
    sites = arch.sites(kind, layers=[0])
    plan = random_plan(model, sites, rank=4, affine=False)
    step = 3 * plan[sites[0]].left @ torch.tensor([1.0, -2.0, 0.5, 1.5], dtype=torch.float64)
    before = outputs(case, model)
    assert gap(before, nudged(name, model, sites, step)) > 1e-3  # control: the site matters
    bake(model, plan).apply_(model)
    assert gap(outputs(case, model), nudged(name, model, sites, step)) <= 1e-10


# Hook == bake


@kinds
@pytest.mark.parametrize("affine", [True, False])
def test_hook_equals_bake(name: str, kind: Kind, affine: bool) -> None:
    case = CASES[name]
    model = case.model()
    sites = case.arch(model).sites(kind)
    plan = random_plan(model, sites, affine=affine)
    if affine and kind not in SLOTS[name]:
        with pytest.raises(NotBakeableError, match="has no place") as caught:
            bake(model, plan)
        assert caught.value.site == sites[0]
        assert "affine=False" in caught.value.instead
        return
    base, before = outputs(case, model), snapshot(model)
    patch = bake(model, plan)
    assert_same(before, model)  # baking touches nothing
    with apply(model, plan):
        hooked = outputs(case, model)
    assert hook_count(model) == 0
    assert_same(before, model)
    patch.apply_(model)
    baked = outputs(case, model)
    assert gap(hooked, baked) <= 1e-10
    assert gap(base, baked) > 1e-3  # control: it does something
    assert fingerprint(model) != before["fingerprint"]
    assert dict(patch.exactness) == dict.fromkeys(map(str, sites), "exact")
    patch.revert_(model)
    assert_same(before, model)
    assert gap(base, outputs(case, model)) == 0.0


@pytest.mark.parametrize("name", CASES)
def test_hook_equals_bake_in_float32(name: str) -> None:
    """All kinds at once, computed as the models compute: routers and some norms are float32 there anyway."""
    case = CASES[name]
    model = case.model(dtype=torch.float32)
    arch = case.arch(model)
    wanted = [kind for kind in arch.kinds if bakes(name, kind) == "exact"]
    plan = random_plan(model, arch.sites(*wanted), rank=1, affine=False)
    inputs = {k: v.float() if v.is_floating_point() else v for k, v in tiny_inputs(case.model_type).items()}

    @torch.no_grad()
    def stream() -> dict[str, Tensor]:
        with reading(model, arch.sites("resid_post")) as seen:
            model(**inputs)
        return {str(site): value for site, value in seen.items()}

    base = stream()
    with apply(model, plan):
        hooked = stream()
    bake(model, plan).apply_(model)
    assert gap(hooked, stream()) <= 1e-5
    assert gap(hooked, base) > 1e-3


@cases
def test_all_bakeable_sites_at_once(name: str) -> None:
    case = CASES[name]
    model = case.model()
    arch = case.arch(model)
    wanted = [kind for kind in arch.kinds if bakes(name, kind) == "exact"]
    plan = random_plan(model, arch.sites(*wanted), rank=1, affine=False)
    with apply(model, plan):
        hooked = outputs(case, model)
    base = outputs(case, model)
    bake(model, plan).apply_(model)
    assert gap(hooked, outputs(case, model)) <= 1e-9
    assert gap(hooked, base) > 1e-3


@pytest.mark.parametrize("model_type", DECODERS)
@pytest.mark.parametrize("tied", [True, False])
def test_final_tied_and_untied(model_type: str, tied: bool) -> None:
    case = CASES[model_type]
    model = case.model(tie_word_embeddings=tied)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert (embedding.weight is head.weight) is tied
    plan = random_plan(model, Architecture.of(model).sites("final"), affine=False)
    before, old = snapshot(model), embedding.weight.clone()
    base = outputs(case, model)
    with apply(model, plan):
        hooked = outputs(case, model)
    patch = bake(model, plan).apply_(model)
    baked = outputs(case, model)
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


@pytest.mark.parametrize(("name", "kind"), SEVERAL_READERS)
def test_a_dropped_reader_is_detected(name: str, kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    model = case.model()
    arch = case.arch(model)
    part = arch.layouts[0].part(kind)
    assert isinstance(part, Read)
    plan = random_plan(model, arch.sites(kind, layers=[0]), affine=False)
    with apply(model, plan):
        hooked = outputs(case, model)
    for dropped in part.readers:
        short = replace(part, readers=tuple(reader for reader in part.readers if reader != dropped))
        with patched_part(monkeypatch, case, kind, short):
            patch = bake(model, plan).apply_(model)
        assert gap(hooked, outputs(case, model)) > 1e-4, f"{dropped} could be missing"
        patch.revert_(model)


@pytest.mark.parametrize(
    ("name", "kind"), [(n, k) for n, k in baked_kinds() if k.endswith("_out") and n not in MOE]
)
def test_a_wrong_writer_is_detected(name: str, kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    model = case.model()
    arch = case.arch(model)
    part, other = (arch.part(k) for k in (kind, "mlp_out" if kind == "attn_out" else "attn_out"))
    assert isinstance(part, Write)
    assert isinstance(other, Write)
    plan = random_plan(model, arch.sites(kind), affine=False)
    with apply(model, plan):
        hooked = outputs(case, model)
    with patched_part(monkeypatch, case, kind, replace(part, writers=other.writers)):
        bake(model, plan).apply_(model)
    assert gap(hooked, outputs(case, model)) > 1e-4


# Bias slots


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name].stack is None])
def test_bias_switches_say_what_the_config_does(name: str) -> None:
    """The biases that a patch creates are exactly those that a model built with its config has."""
    case = CASES[name]
    model = case.model()
    arch = case.arch(model)
    modules = dict(model.named_modules())
    for switch, names in arch.family.bias_switches.items():
        off, on = (dict(case.model(**{switch: state}).named_parameters()) for state in (False, True))
        slots = {f"{arch.block(i)}.{name}" for i in range(LAYERS) for name in names}
        assert set(on) - set(off) == {f"{slot}.bias" for slot in slots & set(modules)}
        assert not set(off) - set(on)


@pytest.mark.parametrize(
    ("name", "kind"), [(name, kind) for name, kind in baked_kinds() if kind in SLOTS[name]]
)
def test_created_biases_fit_a_model_of_the_new_config(name: str, kind: Kind) -> None:
    """One layer is edited; plain transformers builds the same model from the patched config and weights."""
    case = CASES[name]
    model = case.model()
    patch = bake(model, random_plan(model, case.arch(model).sites(kind, layers=[1])))
    assert bool(patch.new_biases) == bool(patch.config_updates)
    assert set(patch.new_biases) <= set(patch.edits)
    assert not set(patch.zero_biases) & set(patch.edits)
    if not patch.new_biases:
        return
    patch.apply_(model)
    fresh = type(model)(model.config).eval().to(torch.float64)
    assert fresh.load_state_dict(model.state_dict(), strict=True)
    assert gap(outputs(case, model), outputs(case, fresh)) <= 1e-12
    for bias in patch.zero_biases:
        assert not model.get_parameter(bias).any()


def test_existing_biases_are_edited_not_replaced() -> None:
    case = CASES["llama"]
    model = case.model(attention_bias=True, mlp_bias=True)
    plan = random_plan(model, Architecture.of(model).sites("attn_in", "mlp_in", "attn_out", "mlp_out"))
    with apply(model, plan):
        hooked = outputs(case, model)
    patch = bake(model, plan)
    assert not patch.new_biases
    assert not patch.zero_biases
    assert not patch.config_updates
    patch.apply_(model)
    assert gap(hooked, outputs(case, model)) <= 1e-9


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name].stack != "decoder"])
def test_exactness_names_the_class_of_every_kind(name: str) -> None:
    model = CASES[name].model()
    before = snapshot(model)
    found = exactness(model)
    assert_same(before, model)
    assert set(found) == {*Architecture.of(model).kinds, "stream"}
    for kind, by_form in found.items():
        assert set(by_form) == {"affine", "linear"}
        if kind == "stream":
            for form, answer in by_form.items():
                assert answer.split(":")[0] == stream_class(name, affine=form == "affine")
            continue
        for form, answer in by_form.items():
            rule = bakes(name, kind)  # type: ignore[arg-type]
            if kind in ("resid_pre", "resid_post"):
                assert answer.startswith("hook only: the residual stream")
            elif not rule:
                assert answer.startswith("hook only: ")
            elif rule == "exact" and form == "affine" and kind not in SLOTS[name]:
                assert answer.startswith("hook only: ")
                assert "has no place" in answer
            else:
                assert answer == rule


# What cannot be baked


@cases
@pytest.mark.parametrize("kind", ["resid_pre", "resid_post"])
def test_residual_sites_are_refused(name: str, kind: Kind) -> None:
    case = CASES[name]
    model = case.model()
    before = snapshot(model)
    plan = random_plan(model, case.arch(model).sites(kind, layers=[1]), affine=False)
    for allow in ("exact", "erasure-exact"):
        with pytest.raises(NotBakeableError) as caught:
            bake(model, plan, allow=allow)
        assert caught.value.site == plan.sites[0]
        assert "skip path" in caught.value.reason
        assert "attn_in and mlp_in" in caught.value.instead
        assert "apply()" in caught.value.instead
    assert_same(before, model)
    base = outputs(case, model)
    with apply(model, plan):  # as a hook it works
        assert gap(base, outputs(case, model)) > 1e-3


def test_sites_outside_the_row_are_refused() -> None:
    model = tiny("llama")
    with pytest.raises(NotBakeableError, match="no site of the llama row"):
        bake(model, random_plan(model, [Site("model.layers.0.mlp")]))
    with pytest.raises(InputError, match="needed one of exact, erasure-exact, approximate"):
        bake(model, random_plan(model, Architecture.of(model).sites("attn_in")), allow="close")  # type: ignore[arg-type]


@pytest.mark.parametrize("model_type", sorted(POST_NORM))
@pytest.mark.parametrize("kind", ["attn_out", "mlp_out"])
@pytest.mark.parametrize("affine", [True, False])
def test_post_norm_bake_removes_what_the_eraser_reads(model_type: str, kind: Kind, affine: bool) -> None:
    case = CASES[model_type]
    switches = Architecture.of(case.model()).family.bias_switches
    model = case.model(**dict.fromkeys(switches, True))
    sites = Architecture.of(model).sites(kind)
    plan = random_plan(model, sites, affine=affine)
    with pytest.raises(NotBakeableError, match="stands between") as caught:
        bake(model, plan)
    assert 'allow="erasure-exact"' in caught.value.instead

    def read() -> dict[Site, float]:
        largest = dict.fromkeys(sites, 0.0)
        for seed in range(3):
            with reading(model, sites) as seen, float64_throughout():
                model(token_ids(seed=seed, vocab=90))
            for site in sites:
                value = float((seen[site] @ plan[site].right.T).abs().max())
                largest[site] = max(largest[site], value)
        return largest

    before = read()
    patch = bake(model, plan, allow="erasure-exact")
    assert dict(patch.exactness) == dict.fromkeys(map(str, sites), "erasure-exact")
    base = outputs(case, model)
    saved = snapshot(model)
    patch.apply_(model)
    after = read()
    for site in sites:
        assert before[site] > 1e-2  # control
        assert after[site] <= 1e-10
    assert gap(base, outputs(case, model)) > 1e-3
    patch.revert_(model)
    assert_same(saved, model)


@pytest.mark.parametrize("model_type", sorted(POST_NORM))
def test_post_norm_gain_is_needed(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Control for the gain: with a wrong offset the baked writer leaves something to read."""
    model = tiny(model_type)
    arch = Architecture.of(model)
    site = arch.sites("mlp_out", layers=[0])[0]
    plan = random_plan(model, [site])
    with patched_row(monkeypatch, model_type, norm_offset=arch.family.norm_offset + 0.5):
        patch = bake(model, plan, allow="erasure-exact")
    patch.apply_(model)
    with reading(model, [site]) as seen:
        model(token_ids(vocab=90))
    assert (seen[site] @ plan[site].right.T).abs().max() > 1e-3


# Other models


def test_unknown_families_are_refused_with_a_way_out() -> None:
    from transformers import MambaConfig, MambaModel, XLMConfig, XLMModel

    mamba = MambaModel(MambaConfig(vocab_size=97, hidden_size=16, num_hidden_layers=1, state_size=4))
    xlm = XLMModel(XLMConfig(vocab_size=97, emb_dim=16, n_layers=1, n_heads=2))
    for model, name in ((mamba, "'mamba'"), (xlm, "'xlm'"), (nn.Linear(2, 2), "None")):
        with pytest.raises(UnsupportedArchitectureError) as caught:
            Architecture.of(model)
        text = str(caught.value)
        assert name in text
        assert all(model_type in text for model_type in supported())
        assert "add a row to FAMILIES" in text
        assert "Site(" in text
        assert ("no attention and MLP" in text) == (model is mamba)


@pytest.mark.parametrize(
    ("model_type", "setting"),
    [("bloom", "apply_residual_connection_post_layernorm"), ("gpt2", "add_cross_attention")],
)
def test_settings_that_a_row_is_not_for_are_refused(model_type: str, setting: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"needed .*{setting}.*False") as caught:
        Architecture.of(tiny(model_type, **{setting: True}))
    assert "Site(" in str(caught.value)
    assert Architecture.of(tiny(model_type, **{setting: False})).n_layers == LAYERS


def test_a_block_with_replaced_modules_is_refused() -> None:
    model = tiny("llama")
    del model.model.layers[1].mlp.up_proj
    with pytest.raises(UnsupportedModelError, match=r"block 1 has no mlp\.up_proj"):
        Architecture.of(model)


@pytest.mark.parametrize("model_type", sorted(set(supported()) - {"t5", "gemma3"}))
def test_a_model_without_its_head_has_the_same_sites(model_type: str) -> None:
    whole, headless = tiny(model_type), tiny(model_type, head="AutoModel")
    arch, bare = Architecture.of(whole), Architecture.of(headless)
    assert bare.kinds == arch.kinds
    root = arch.family.blocks.partition(".")[0] + "."
    assert [f"{root}{site}" for site in bare.sites(*bare.kinds)] == [str(s) for s in arch.sites(*arch.kinds)]
    for kind in bare.kinds:
        for layer, site in enumerate(bare.sites(kind)):
            site.module(headless)
            assert bare.locate(site) == (kind, LAYERS if kind == "final" else layer)
    plan = random_plan(headless, bare.sites("attn_in"), affine=False)

    @torch.no_grad()
    def run() -> dict[str, Tensor]:
        return {"last": headless(**tiny_inputs(model_type)).last_hidden_state}

    base = run()
    with apply(headless, plan):
        hooked = run()
    bake(headless, plan).apply_(headless)
    assert gap(hooked, run()) <= 1e-10
    assert gap(base, hooked) > 1e-3
    if "final" in bare.kinds:
        with pytest.raises(UnsupportedModelError, match="with its head"):
            bake(headless, random_plan(headless, bare.sites("final"), affine=False))


def test_another_head_cannot_be_baked_at_final() -> None:
    from transformers import LlamaForSequenceClassification

    model = LlamaForSequenceClassification(tiny("llama").config).eval()
    plan = random_plan(model, Architecture.of(model).sites("final"), affine=False)
    with pytest.raises(UnsupportedModelError, match=r"lm_head\.weight"):
        bake(model, plan)


def test_rows_are_frozen_and_parts_are_of_the_right_sort() -> None:
    with pytest.raises(AttributeError):
        FAMILIES[0].blocks = "elsewhere"  # type: ignore[misc]
    for family in FAMILIES:
        assert isinstance(family.final, Read | Absent)
        for layout in family.layouts:
            for kind in IN_BLOCK:
                assert isinstance(layout.part(kind), (Read if kind.endswith("_in") else Write) | Absent)
