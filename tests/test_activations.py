from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from functools import partial

import pytest
import torch
from textkit import PAD, VOCAB, pairs, text_model, text_tokenizer
from tiny import CONFIGS, LAYERS, TEXT, D, assert_same, hook_count, reading, snapshot
from torch import Tensor, nn

from repe_unlearn import activations
from repe_unlearn.activations import capture, checked, gather, run
from repe_unlearn.architectures import Architecture
from repe_unlearn.contrast import Contrast
from repe_unlearn.encoding import Batch, batches, encode
from repe_unlearn.errors import InputError, NonFiniteError, NotEnoughDataError, UnknownSiteError
from repe_unlearn.moments import Moments
from repe_unlearn.sites import Site
from repe_unlearn.tokens import Select

look = partial(capture, progress=False)
rows = partial(gather, progress=False)


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    return text_model("llama")


def apart(a: Moments, b: Moments) -> float:
    assert (a.n, a.d, a.k) == (b.n, b.d, b.k)
    return max(
        float((x - y).abs().max() / y.abs().max().clamp_min(1e-300))
        for x, y in zip(
            (a.mean_x, a.mean_z, a.cov_xx, a.cov_xz), (b.mean_x, b.mean_z, b.cov_xx, b.cov_xz), strict=True
        )
    )


def by_hand(
    model: nn.Module, contrast: Contrast, sites: tuple[Site, ...], select: str
) -> tuple[dict[Site, Moments], tuple[Tensor, ...]]:
    """One unpadded prompt at a time, plain torch hooks; also the model's own hidden states of the last prompt."""
    model = copy.deepcopy(model)  # asking for hidden states leaves hooks of transformers' own
    found: dict[Site, list[Tensor]] = {site: [] for site in sites}
    z: list[int] = []
    states: tuple[Tensor, ...] = ()
    for e in encode(contrast, text_tokenizer(), Select.parse(select)):
        with reading(model, sites) as seen, torch.no_grad():
            more = {"decoder_input_ids": torch.tensor([[0]])} if model.config.is_encoder_decoder else {}
            out = model(torch.tensor([e.ids]), output_hidden_states=True, **more)
            states = out.encoder_hidden_states if more else out.hidden_states
        for site in sites:
            x = seen[site].reshape(len(e.ids), -1)[e.positions]  # experts see no batch
            found[site].append(x.mean(0, keepdim=True) if select.startswith("mean") else x)
        z += e.labels[:1] if select.startswith("mean") else e.labels
        if sites == Architecture.of(model).sites("resid_pre"):
            for site, state in zip(sites, states, strict=False):
                assert torch.equal(seen[site], state)  # our name for it is the model's own
    return {s: Moments.of(torch.cat(x), torch.tensor(z), classes=2) for s, x in found.items()}, states


# Eager attention in float64 gives NaN for a pad position whose whole window is padding: windows as long as the text.
WINDOWS = ("sliding_window", "attention_chunk_size")


@pytest.mark.parametrize("model_type", TEXT)
def test_moments_of_padded_batches_are_those_of_single_prompts(model_type: str) -> None:
    windows = {name: 64 for name in WINDOWS if name in CONFIGS[model_type]}
    if "roberta" in model_type:
        windows = {"max_position_embeddings": 512}  # its positions begin after the id of the pad token
    if model_type == "gemma3":
        text = CONFIGS[model_type]["text_config"]
        windows = {"text_config": {**text, "sliding_window": 64, "vocab_size": VOCAB}}
    model, contrast = text_model(model_type, **windows), pairs(12)
    arch = Architecture.of(model)
    kinds = [kind for kind in ("resid_pre", "attn_in", "mlp_out", "final") if kind in arch.kinds]
    sites = arch.sites(*kinds)
    expected, _ = by_hand(model, contrast, sites, "mean")
    for side in ("left", "right"):
        for budget in (1, 150, 10**6):
            got = look(model, text_tokenizer(side), contrast, sites, select="mean", batch_tokens=budget)
            assert tuple(got) == sites
            # DeepSeek and GLM-4.5 route and Llama-4 rotates in float32.
            assert max(apart(got[site], expected[site]) for site in sites) <= (
                1e-6 if model_type in ("deepseek_v3", "glm4_moe", "llama4_text") else 1e-10
            )
    # control: the comparison sees one prompt more or less
    less = look(model, text_tokenizer(), pairs(11), sites, select="mean")
    assert less[sites[0]].n != expected[sites[0]].n
    other = look(model, text_tokenizer(), contrast, sites, select="last")
    assert apart(other[sites[-1]], expected[sites[-1]]) > 1e-3


@pytest.mark.parametrize("select", ["last", "all", "mean", "all,sinks=3", "all,sinks=0,specials"])
def test_selections(llama: nn.Module, select: str) -> None:
    sites = Architecture.of(llama).sites("resid_pre")
    expected, _ = by_hand(llama, pairs(12), sites, select)
    got = look(llama, text_tokenizer(), pairs(12), sites, select=select, batch_tokens=300)
    assert max(apart(got[site], expected[site]) for site in sites) <= 1e-10
    same = look(llama, text_tokenizer(), pairs(12), sites, select=Select.parse(select))
    assert max(apart(got[site], same[site]) for site in sites) <= 1e-10


def test_hidden_states_of_the_model_itself(llama: nn.Module) -> None:
    _, states = by_hand(llama, pairs(2), Architecture.of(llama).sites("resid_pre"), "last")
    last = Contrast.from_labels([pairs(2).texts[-1], "x"], ["a", "b"])
    got = rows(
        llama, text_tokenizer(), last, Architecture.of(llama).sites("final"), select="all,sinks=0,specials"
    )
    final = got[Site("model.norm")]
    torch.testing.assert_close(final.x[final.owner == 0], states[-1][0], rtol=0, atol=1e-12)


def test_many_rows_and_real_labels(llama: nn.Module) -> None:
    """More rows than one block of the accumulator, and labels that are numbers."""
    sites = Architecture.of(llama).sites("attn_in")
    got = look(llama, text_tokenizer(), pairs(), sites, select="all", batch_tokens=400)
    assert got[sites[0]].n > 2000
    assert apart(got[sites[1]], by_hand(llama, pairs(), sites, "all")[0][sites[1]]) <= 1e-10
    reals = Contrast.from_reals(pairs(8).texts, [0.5 * i for i in range(16)])
    assert look(llama, text_tokenizer(), reals, sites)[sites[0]].mean_z.tolist() == [3.75]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_changes_nothing(side: str) -> None:
    """The batches themselves, with an attention kernel that has no NaN for a query without keys."""
    model, contrast = text_model("llama"), pairs(12)
    model.config._attn_implementation = "sdpa"
    sites = Architecture.of(model).sites("resid_pre", "mlp_in")
    encoded = encode(contrast, text_tokenizer(), Select("last"))
    work = batches(encoded, batch_tokens=10**6, pad_id=PAD, side=side, pooled=False, real=False)  # type: ignore[arg-type]
    assert len(work) == 1
    assert not work[0].mask.all()
    found: dict[Site, Moments] = {}
    run(model, work, sites, lambda s, rows: found.update({s: Moments.of(rows.x, rows.z)}), False, "")
    expected, _ = by_hand(model, contrast, sites, "last")
    assert max(apart(found[site], expected[site]) for site in sites) <= 1e-10


def test_capture_leaves_the_model_alone_and_returns_ordinary_tensors(llama: nn.Module) -> None:
    before = snapshot(llama)
    got = look(llama, text_tokenizer(), pairs(4), Architecture.of(llama).sites("attn_in"))
    assert_same(before, llama)
    assert hook_count(llama) == 0
    for m in got.values():
        assert not m.mean_x.is_inference()
        assert not m.m_xx.requires_grad
    trainable = text_model("llama").requires_grad_(True)
    m = look(trainable, text_tokenizer(), pairs(4), Architecture.of(trainable).sites("attn_in"))
    assert not any(value.m_xx.requires_grad for value in m.values())
    assert torch.is_grad_enabled()


# Gather


def test_rows_come_in_the_order_of_the_contrast(llama: nn.Module) -> None:
    contrast, sites = pairs(12), Architecture.of(llama).sites("mlp_in", "final")
    got = rows(llama, text_tokenizer(), contrast, sites, select="all", batch_tokens=200)
    expected = look(llama, text_tokenizer(), contrast, sites, select="all")
    for site in sites:
        r = got[site]
        assert r.x.dtype == torch.float64
        assert r.owner.tolist() == sorted(r.owner.tolist())
        assert r.z.tolist() == [contrast.labels[i] for i in r.owner]
        assert apart(Moments.of(r.x, r.z, classes=2), expected[site]) <= 1e-10
    single = rows(llama, text_tokenizer(), contrast, sites, select="mean", batch_tokens=1)
    assert single[sites[0]].owner.tolist() == list(range(24))
    one = rows(text_model("llama", dtype=torch.bfloat16), text_tokenizer(), contrast, sites[:1])
    assert one[sites[0]].x.dtype == torch.float32


# Cost


def test_later_blocks_never_run(llama: nn.Module) -> None:
    calls: list[str] = []

    def count(name: str) -> Callable:
        return lambda *_: calls.append(name)

    watched = [*(f"model.layers.{i}" for i in range(LAYERS)), "model.norm", "lm_head"]
    handles = [llama.get_submodule(name).register_forward_pre_hook(count(name)) for name in watched]
    try:
        for site, reached in (
            ("model.embed_tokens", 0),
            ("model.layers.0.input_layernorm", 1),
            ("model.layers.1", 2),
            ("model.layers.2:input", 3),
        ):
            calls.clear()
            look(llama, text_tokenizer(), pairs(4), [Site.parse(site), Site("model.embed_tokens")])
            assert calls == watched[:reached]
        calls.clear()
        look(llama, text_tokenizer(), pairs(4), [Site("model.norm")])  # control: the counters count
        assert calls == watched[:-1]  # the head is never run
    finally:
        for handle in handles:
            handle.remove()


def test_no_activation_is_kept(llama: nn.Module) -> None:
    site = Site("model.layers.1")
    alive: list[weakref.ref] = []
    most = 0

    def watch(_m: nn.Module, _a: object, output: Tensor) -> None:
        nonlocal most
        most = max(most, sum(ref() is not None for ref in alive))
        alive.append(weakref.ref(output))

    handle = llama.get_submodule(site.path).register_forward_hook(watch)
    try:
        look(llama, text_tokenizer(), pairs(), [site], select="all", batch_tokens=300)
        gc.collect()
        assert len(alive) > 5
        assert most <= 1
        assert not any(ref() is not None for ref in alive)
        kept: list[Tensor] = []  # control: the references see activations that are kept
        alive.clear()
        keeper = llama.get_submodule(site.path).register_forward_hook(lambda _m, _a, x: kept.append(x))
        look(llama, text_tokenizer(), pairs(), [site], select="all", batch_tokens=300)
        keeper.remove()
        assert most > 5
        assert all(ref() is not None for ref in alive)
    finally:
        handle.remove()


# Errors


def test_an_interrupt_leaves_no_hook(llama: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    sites = Architecture.of(llama).sites("attn_in")
    seen = 0

    def interrupted(work: list[Batch], **_: object) -> object:
        nonlocal seen
        for batch in work:
            seen += 1
            if seen == 3:
                assert hook_count(llama) == len(sites)
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(activations, "tqdm", interrupted)
    for function in (look, rows):
        seen = 0
        with pytest.raises(KeyboardInterrupt):
            function(llama, text_tokenizer(), pairs(), sites, batch_tokens=300)
        assert hook_count(llama) == 0
        assert torch.is_grad_enabled()


def test_an_error_in_the_forward_leaves_no_hook(llama: nn.Module) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    handle = llama.get_submodule("model.layers.1.mlp").register_forward_pre_hook(fail)
    try:
        with pytest.raises(RuntimeError, match="out of memory"):
            look(llama, text_tokenizer(), pairs(4), Architecture.of(llama).sites("attn_in", "final"))
        assert hook_count(llama) == 1
    finally:
        handle.remove()


def test_wrong_requests(llama: nn.Module) -> None:
    tokenizer, contrast = text_tokenizer(), pairs(4)
    with pytest.raises(
        UnknownSiteError, match=r"LlamaForCausalLM has no module of that name \(nearest: model\.layers"
    ):
        look(llama, tokenizer, contrast, [Site("model.norm"), Site("model.layers.9.mlp")])
    with pytest.raises(InputError, match="the forward never reached lm_head"):
        look(llama, tokenizer, contrast, [Site("model.norm"), Site("lm_head")])
    with pytest.raises(InputError, match="got no site; needed at least one"):
        look(llama, tokenizer, contrast, [])
    with pytest.raises(InputError, match=r"got 'model\.norm' as a site; needed a Site"):
        look(llama, tokenizer, contrast, ["model.norm"])  # type: ignore[list-item]
    with pytest.raises(InputError, match="needed one of last, mean"):
        look(llama, tokenizer, contrast, [Site("model.norm")], select="first")
    with pytest.raises(InputError, match="got batch_tokens=0"):
        look(llama, tokenizer, contrast, [Site("model.norm")], batch_tokens=0)
    long = Contrast.from_labels(["x" * 64, "y"], ["a", "b"])
    with pytest.raises(InputError, match="prompt 0 has 65 tokens, the model takes 64"):
        look(llama, tokenizer, long, [Site("model.norm")])
    with pytest.raises(NotEnoughDataError, match="no token of prompt 1"):
        look(
            llama,
            tokenizer,
            Contrast.from_labels(["xxx", "y"], ["a", "b"]),
            [Site("model.norm")],
            select="last,sinks=3",
        )
    assert hook_count(llama) == 0


def test_sites_are_taken_once_and_in_order() -> None:
    a, b = Site("b"), Site("a")
    assert checked(iter([a, b, a])) == (a, b)


@pytest.mark.parametrize("function", [look, rows])
def test_nan_is_named_where_it_counts(function: Callable) -> None:
    model = text_model("llama")
    sites = Architecture.of(model).sites("attn_in")
    model.get_submodule("model.norm").weight.fill_(float("nan"))  # behind the deepest site
    function(model, text_tokenizer(), pairs(4), sites)
    model.get_submodule(sites[1].path).weight[D - 1] = float("inf")
    with pytest.raises(
        NonFiniteError, match=rf"activations at {sites[1]} hold NaN or infinite .*torch\.float64"
    ):
        function(model, text_tokenizer(), pairs(4), sites)
    assert hook_count(model) == 0


def test_a_tokenizer_without_a_pad_token(llama: nn.Module) -> None:
    sites = Architecture.of(llama).sites("final")
    bare = text_tokenizer()
    bare.pad_token = None
    assert bare.pad_token_id is None
    expected = look(llama, text_tokenizer(), pairs(4), sites)[sites[0]]
    assert apart(look(llama, bare, pairs(4), sites)[sites[0]], expected) <= 1e-10


def test_models_without_position_ids() -> None:
    """BLOOM computes positions from the mask and takes no position_ids; hooks and capture need no row."""
    from transformers import BloomConfig, BloomForCausalLM

    torch.manual_seed(0)
    model = BloomForCausalLM(BloomConfig(vocab_size=260, hidden_size=16, n_layer=2, n_head=2)).eval().double()
    sites = (Site("transformer.h.0.self_attention.dense"), Site("transformer.h.1"))
    padded = look(model, text_tokenizer(), pairs(8), sites)
    single = look(model, text_tokenizer(), pairs(8), sites, batch_tokens=1)
    assert max(apart(padded[site], single[site]) for site in sites) <= 1e-10


def test_progress_bar(llama: nn.Module, capfd: pytest.CaptureFixture[str]) -> None:
    sites = Architecture.of(llama).sites("final")
    look(llama, text_tokenizer(), pairs(2), sites)
    assert capfd.readouterr().err == ""
    capture(llama, text_tokenizer(), pairs(2), sites)
    assert "capture" in capfd.readouterr().err
