"""Neuron ranking against a plain integral; suppression as hooks, as weights and by hand."""

from __future__ import annotations

import pytest
import torch
from rowkit import MOE
from textkit import text_model, text_tokenizer
from tiny import DECODERS, assert_same, hook_count, snapshot, tiny, token_ids
from torch import Tensor, nn

from repe_unlearn.activations import capture
from repe_unlearn.architectures import Architecture
from repe_unlearn.contrast import Contrast
from repe_unlearn.errors import (
    InputError,
    ModelMismatchError,
    NonFiniteError,
    NotBakeableError,
    ShapeError,
    UnsupportedModelError,
)
from repe_unlearn.hooks import apply
from repe_unlearn.localize import (
    Neuron,
    neuron_activity,
    rank_neurons,
    selective_pruning,
    suppress_heads,
    suppress_neurons,
    suppressor,
    unit_sites,
)
from repe_unlearn.sites import Site

TOK = text_tokenizer()
DENSE = tuple(name for name in DECODERS if name not in MOE)
PROMPTS = [("Rome is in", "x"), ("the city of Rome lies in", "x"), ("Rome? That is", "x")]


@torch.no_grad()
def logits(model: nn.Module, seed: int = 7) -> Tensor:
    return model(input_ids=token_ids(seed=seed, vocab=90)).logits


@torch.no_grad()
def with_input(
    model: nn.Module, changes: dict[str, tuple[slice | list[int], Tensor | float]], *, factor: bool
) -> Tensor:
    """Logits while plain hooks multiply or replace some of what modules read."""
    handles = []
    for path, (index, value) in changes.items():

        def change(_m: nn.Module, args: tuple, index: object = index, value: object = value) -> tuple:
            new = args[0].clone()
            new[..., index] = new[..., index] * value if factor else value
            return (new, *args[1:])

        handles.append(model.get_submodule(path).register_forward_pre_hook(change))
    try:
        return logits(model)
    finally:
        for handle in handles:
            handle.remove()


def gap(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def patched(model: nn.Module, patch) -> Tensor:
    patch.apply_(model)
    try:
        return logits(model)
    finally:
        patch.revert_(model)


# Ranking


def plain_scores(model: nn.Module, path: str, prompt: str, answer: str, steps: int) -> tuple[Tensor, float]:
    """Integrated gradients with plain hooks, and the fall of the probability without these neurons."""
    ids = torch.tensor([TOK(prompt)["input_ids"]])
    token = TOK(answer)["input_ids"][-1]
    module, state = model.get_submodule(path), {}

    def change(_m: nn.Module, args: tuple) -> tuple:
        state.setdefault("value", args[0][0, -1].detach().clone())
        new = args[0].clone()
        state["leaf"] = (state["value"] * state["share"]).requires_grad_(True)
        new[0, -1] = state["leaf"]
        return (new,)

    def probability(share: float) -> Tensor:
        state["share"] = share
        return model(input_ids=ids).logits[0, -1].softmax(-1)[token]

    handle = module.register_forward_pre_hook(change)
    with torch.enable_grad():
        fall = (probability(1.0) - probability(0.0)).item()
        total = torch.zeros_like(state["value"])
        for k in range(steps):
            total += torch.autograd.grad(probability((k + 0.5) / steps), state["leaf"])[0] / steps
    handle.remove()
    return total * state["value"], fall


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_ranking_is_the_integral_with_a_threshold_that_wordings_share(family: str) -> None:
    model = text_model(family)
    paths = [site.path for site in unit_sites(model, "neurons")]
    found = [[plain_scores(model, path, *prompt, steps=3)[0] for path in paths] for prompt in PROMPTS]
    table = torch.stack([torch.stack(layers) for layers in found])  # [prompts, layers, neurons]
    best = table.flatten(1).amax(1)[:, None, None]
    for threshold, shared in ((0.2, 0.6), (0.05, 1.0), (0.2, 0.0)):
        counts = (table >= threshold * best) & (table > 0)
        needed = max(shared * len(PROMPTS), 1)
        kept = [(i, j) for i, j in (counts.sum(0) >= needed - 1e-9).nonzero().tolist()]
        kept.sort(key=lambda place: -float(table.mean(0)[place]))
        ranked = rank_neurons(
            model, TOK, PROMPTS, steps=3, threshold=threshold, shared=shared, progress=False
        )
        assert [(n.layer, n.neuron) for n in ranked] == kept
        assert [n.score for n in ranked] == pytest.approx([float(table.mean(0)[p]) for p in kept], rel=1e-6)
    assert kept
    only = rank_neurons(model, TOK, PROMPTS[:1], steps=3, threshold=0.2, shared=1.0, progress=False)
    assert {n[:2] for n in only} != {n[:2] for n in ranked}  # control: one wording keeps others
    assert hook_count(model) == 0


def test_scores_of_one_layer_add_up_to_what_its_neurons_do() -> None:
    model = text_model("llama")
    ranked = rank_neurons(
        model, TOK, PROMPTS[:1], steps=40, threshold=0.0, shared=0.0, layers=[1], progress=False
    )
    scores, fall = plain_scores(model, "model.layers.1.mlp.down_proj", *PROMPTS[0], steps=40)
    assert float(scores.sum()) == pytest.approx(fall, rel=2e-2)
    assert sum(n.score for n in ranked) == pytest.approx(float(scores.clamp_min(0).sum()), rel=1e-6)
    assert [n.layer for n in ranked] == [1] * len(ranked)
    assert list(ranked) == sorted(ranked, key=lambda n: -n.score)


def test_a_planted_neuron_comes_first() -> None:
    model = text_model("llama")
    mlp = model.model.layers[2].mlp
    direction = model.lm_head.weight[TOK("x")["input_ids"][-1]] * model.model.norm.weight
    seen: list[Tensor] = []
    handle = mlp.down_proj.register_forward_pre_hook(lambda _m, args: seen.append(args[0][0, -1, 17]))
    with torch.no_grad():
        model(input_ids=torch.tensor([TOK(PROMPTS[0][0])["input_ids"]]))
    handle.remove()
    mlp.down_proj.weight[:, 17] = 8 * direction / direction.norm() / seen[0]
    ranked = rank_neurons(model, TOK, PROMPTS[:1], steps=10, progress=False)
    assert ranked[0][:2] == (2, 17)
    mlp.down_proj.weight[:, 17] *= -1  # control: now it speaks against the answer
    against = rank_neurons(model, TOK, PROMPTS[:1], steps=10, progress=False)
    assert (2, 17) not in {n[:2] for n in against}


def test_ranking_refuses_what_it_cannot_do() -> None:
    with pytest.raises(UnsupportedModelError, match=r"block 0 .* mixture of experts"):
        rank_neurons(text_model("mixtral"), TOK, PROMPTS, progress=False)
    for changes in ({"steps": 0}, {"threshold": 2.0}, {"shared": -0.1}):
        with pytest.raises(InputError, match="needed steps >= 1"):
            rank_neurons(text_model("llama"), TOK, PROMPTS, progress=False, **changes)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="got no pair"):
        rank_neurons(text_model("llama"), TOK, [], progress=False)


# Suppression


@pytest.mark.parametrize("family", DENSE)
@pytest.mark.parametrize("what", ["neurons", "heads"])
def test_hook_and_weights_and_plain_hooks_agree(family: str, what: str) -> None:
    model = tiny(family)
    before, untouched = snapshot(model), logits(model)
    make = suppress_neurons if what == "neurons" else suppress_heads
    chosen = [(0, 1), (2, 3), (2, 0)]
    size = 1 if what == "neurons" else 8
    paths = [site.path for site in unit_sites(model, what)]  # type: ignore[arg-type]
    cut = {
        paths[0]: list(range(size, 2 * size)),
        paths[2]: [*range(size), *range(3 * size, 4 * size)],
    }
    for mode, scale, factor in (("zero", 1.0, 0.0), ("negative", 2.0, -2.0)):
        expected = with_input(model, {p: (index, factor) for p, index in cut.items()}, factor=True)
        patch = make(model, chosen, mode=mode, scale=scale)  # type: ignore[arg-type]
        assert gap(patched(model, patch), expected) < 1e-10
        with apply(model, suppressor(model, what, chosen, mode=mode, scale=scale)):  # type: ignore[arg-type]
            assert gap(logits(model), expected) < 1e-10
        assert set(patch.exactness.values()) == {"exact"}
        assert gap(untouched, expected) > 1e-4  # control
    assert_same(before, model)
    with pytest.raises(ModelMismatchError):
        patch.apply_(tiny(family, seed=1))


@pytest.mark.parametrize("family", DENSE)
def test_the_mean_goes_into_the_bias_or_is_refused(family: str) -> None:
    model = tiny(family)
    sites = unit_sites(model, "neurons")
    arch = Architecture.of(model)
    width = model.get_submodule(sites[1].path).weight.shape[0 if arch.family.transposed else 1]
    mean = torch.linspace(-1, 2, width, dtype=torch.float64)
    expected = with_input(model, {sites[1].path: ([4, 6], mean[[4, 6]])}, factor=False)
    with apply(model, suppressor(model, "neurons", [(1, 6), (1, 4)], mode="mean", means={sites[1]: mean})):
        assert gap(logits(model), expected) < 1e-10
    writer = sites[1].path.removeprefix(f"{arch.block(1)}.")
    slot = model.get_submodule(sites[1].path).bias is not None or any(
        writer in names for names in arch.family.bias_switches.values()
    )
    if slot:
        patch = suppress_neurons(model, [(1, 6), (1, 4)], mode="mean", means={sites[1]: mean})
        assert gap(patched(model, patch), expected) < 1e-10
        zero = patched(model, suppress_neurons(model, [(1, 6), (1, 4)]))
        assert gap(zero, expected) > 1e-6  # control
    else:
        with pytest.raises(NotBakeableError, match="use mode='zero', or apply"):
            suppress_neurons(model, [(1, 6), (1, 4)], mode="mean", means={sites[1]: mean})


def test_means_come_from_capture() -> None:
    model = text_model("gpt2")
    data = Contrast.from_pairs([("he ran off", "she ran off"), ("he sat", "she sat")], ("m", "f"))
    sites = unit_sites(model, "heads", [2])
    moments = capture(model, TOK, data, sites, select="all", progress=False)
    plan = suppressor(model, "heads", [(2, 3)], mode="mean", means=moments)
    eraser = plan[sites[0]]
    assert torch.equal(eraser.shift[24:32], moments[sites[0]].mean_x[24:32])
    assert not eraser.shift[:24].any()
    patch = suppress_heads(model, [(2, 3)], mode="mean", means=moments)
    with apply(model, plan):
        expected = logits(model)
    assert gap(patched(model, patch), expected) < 1e-10


def test_columns_of_both_orientations() -> None:
    for family, turned in (("llama", False), ("gpt2", True)):
        model = tiny(family)
        (site,) = unit_sites(model, "neurons", [1])
        before = model.get_submodule(site.path).weight.clone()
        with_patch = suppress_neurons(model, [Neuron(1, 5, 0.3)]).apply_(model)
        after = model.get_submodule(site.path).weight.clone()
        before, after = (w.T if turned else w for w in (before, after))
        assert not after[:, 5].any()
        others = [j for j in range(48) if j != 5]
        assert torch.equal(after[:, others], before[:, others])
        with_patch.revert_(model)


def test_suppression_refuses_what_it_cannot_do() -> None:
    model = tiny("llama")
    (site,) = unit_sites(model, "neurons", [1])
    for chosen, changes, message in (
        ([], {}, "needed at least one"),
        ([(-1, 0)], {}, "from 0"),
        ([(3, 0)], {}, "layers 0 to 2"),
        ([(1, 48)], {}, "0 to 47"),
        ([(1, 0)], {"mode": "half"}, "needed zero, mean or negative"),
        ([(1, 0)], {"mode": "mean"}, "go together"),
        ([(1, 0)], {"means": {site: torch.ones(48)}}, "go together"),
        ([(1, 0)], {"mode": "negative", "scale": -1.0}, "finite number >= 0"),
        ([(1, 0)], {"mode": "mean", "means": {}}, "no mean for"),
    ):
        with pytest.raises(InputError, match=message):
            suppress_neurons(model, chosen, **changes)
    with pytest.raises(ShapeError, match=r"needed \[48\]"):
        suppress_neurons(model, [(1, 0)], mode="mean", means={site: torch.ones(3)})
    with pytest.raises(InputError, match="heads \\[4\\] of layer 1; it has 0 to 3"):
        suppress_heads(model, [(1, 4)])
    with pytest.raises(InputError, match="needed heads or neurons"):
        unit_sites(model, "mlp_out")  # type: ignore[arg-type]
    for name in ("mixtral", "gpt_oss", "qwen2_moe"):
        with pytest.raises(UnsupportedModelError, match="mixture of experts"):
            suppress_neurons(tiny(name), [(0, 0)])
        assert len(suppress_heads(tiny(name), [(0, 0)])) == 1
    assert len(suppress_neurons(tiny("deepseek_v3"), [(0, 0)])) == 1  # its first block is dense


# Selective pruning


def test_activity_is_the_mean_size_over_the_texts() -> None:
    model = text_model("llama")
    texts = ["he ran off", "Rome"]
    found = neuron_activity(model, TOK, texts, layers=[1], progress=False)
    (site,) = found
    seen: list[Tensor] = []
    handle = model.get_submodule(site.path).register_forward_pre_hook(
        lambda _m, args: seen.append(args[0][0])
    )
    with torch.no_grad():
        for text in texts:
            model(input_ids=torch.tensor([TOK(text)["input_ids"]]))
    handle.remove()
    expected = torch.cat([x[1:] for x in seen]).abs().mean(0)  # without <s>
    torch.testing.assert_close(found[site], expected, rtol=1e-9, atol=0)
    assert (found[site] - torch.cat(seen).abs().mean(0)).abs().max() > 1e-3  # control


def test_the_neurons_that_are_busier_on_what_to_forget_are_pruned() -> None:
    model = tiny("gpt2")
    sites = unit_sites(model, "neurons")
    forget = {site: torch.ones(48) for site in sites}
    retain = {site: torch.ones(48) for site in sites}
    forget[sites[0]][7], retain[sites[2]][9], retain[sites[2]][11] = 30.0, 0.01, 50.0
    forget[sites[1]][3], retain[sites[1]][3] = 100.0, 100.0  # busy on both
    patch = selective_pruning(model, forget, retain, fraction=2 / 144)
    assert gap(patched(model, patch), patched(model, suppress_neurons(model, [(0, 7), (2, 9)]))) == 0.0
    assert gap(patched(model, patch), patched(model, suppress_neurons(model, [(0, 7), (2, 11)]))) > 1e-6
    three = selective_pruning(model, forget, retain, fraction=3 / 144)
    assert sum(edit.rank for edit in three.edits.values()) == 3
    for changes, message in (
        ({"fraction": 0.0}, "between 0 and 1"),
        ({"retain": {sites[0]: torch.ones(48)}}, "other sites"),
        (
            {"forget": {Site("lm_head"): torch.ones(48)}, "retain": {Site("lm_head"): torch.ones(48)}},
            "other sites",
        ),
        ({"forget": {**forget, sites[0]: torch.ones(3)}}, "other shapes"),
    ):
        with pytest.raises(InputError, match=message):
            selective_pruning(model, **{"forget": forget, "retain": retain, **changes})  # type: ignore[arg-type]
    with pytest.raises(NonFiniteError):
        selective_pruning(model, {**forget, sites[0]: torch.full((48,), torch.nan)}, retain)


def test_from_texts_to_a_pruned_model() -> None:
    model = text_model("llama")
    forget = neuron_activity(model, TOK, ["Rome and Oslo"], progress=False)
    retain = neuron_activity(model, TOK, ["zzz zz zzzz"], progress=False)
    patch = selective_pruning(model, forget, retain, fraction=0.1)
    patch.apply_(model)
    busy = neuron_activity(model, TOK, ["Rome and Oslo"], layers=[0], progress=False)
    assert torch.equal(
        next(iter(busy.values())), next(iter(forget.values()))
    )  # what feeds the first layer is as before
    assert sum(edit.rank for edit in patch.edits.values()) == round(0.1 * 144)
    patch.revert_(model)
