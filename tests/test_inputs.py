"""Inputs: any model, any tensors; what capture finds is what plain hooks find."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from textkit import PAD, pairs, text_model, text_tokenizer
from tiny import reading, tiny
from torch import Tensor, nn

from repe_unlearn.activations import capture, gather
from repe_unlearn.architectures import Architecture
from repe_unlearn.encoding import encode
from repe_unlearn.errors import InputError, NonFiniteError, NotEnoughDataError, ShapeError
from repe_unlearn.hooks import apply
from repe_unlearn.inputs import Inputs
from repe_unlearn.moments import Moments
from repe_unlearn.sequential import fit_sequential
from repe_unlearn.sites import Site
from repe_unlearn.tokens import Select


def look(model: nn.Module, data: Sequence[Inputs], sites: Sequence[Site], **options: Any) -> dict:
    return capture(model, None, data, sites, progress=False, **options)


def same(a: Moments, b: Moments) -> bool:
    return a.n == b.n and all(
        torch.allclose(getattr(a, f), getattr(b, f), rtol=1e-9, atol=1e-9)
        for f in ("mean_x", "mean_z", "m_xx", "m_xz")
    )


def images(n: int = 10, seed: int = 0) -> Tensor:
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def vit() -> nn.Module:
    return tiny("vit")


def test_a_vision_model(vit: nn.Module) -> None:
    sites = Architecture.of(vit).sites("resid_pre", "mlp_in")
    z = torch.arange(10) % 2
    data = [
        Inputs({"pixel_values": images()[:6]}, z[:6]),
        Inputs({"pixel_values": images()[6:]}, z[6:]),
    ]
    with reading(vit, sites) as seen, torch.no_grad():
        vit(pixel_values=images())
    patches = seen[sites[0]].shape[1]
    for select, rows in ((None, lambda x: x), ("mean", lambda x: x.mean(1))):
        got = look(vit, data, sites, select=select)
        for site in sites:
            x = rows(seen[site])
            wide = z if x.ndim == 2 else z[:, None].expand(10, patches)
            assert same(got[site], Moments.of(x, wide, classes=2))
    # control: another choice of positions is another result
    first = torch.zeros(10, patches, dtype=torch.bool)
    first[:, 0] = True
    cls = look(vit, [Inputs({"pixel_values": images()}, z, first)], sites)
    assert same(cls[sites[1]], Moments.of(seen[sites[1]][:, 0], z, classes=2))
    assert not same(cls[sites[1]], got[sites[1]])
    # a site without positions: one row per example
    pooled = look(vit, data, [Site("vit.embeddings")], select="mean")
    assert pooled[Site("vit.embeddings")].n == 10


def test_gather_and_fit(vit: nn.Module) -> None:
    sites = Architecture.of(vit).sites("attn_in", "mlp_in")
    z = torch.arange(30) % 3
    data = [Inputs({"pixel_values": images(30)[i : i + 7]}, z[i : i + 7]) for i in range(0, 30, 7)]
    rows = gather(vit, None, data, sites, select="mean", progress=False)[sites[0]]
    assert rows.owner.tolist() == list(range(30))
    assert torch.equal(rows.z, z)
    plan = fit_sequential(vit, None, data, sites, select="mean", progress=False)
    with apply(vit, plan):
        after = look(vit, data, sites, select="mean")
    before = look(vit, data, sites, select="mean")
    for site in sites:
        assert float(after[site].m_xz.abs().max()) < 1e-9 < 1e-3 < float(before[site].m_xz.abs().max())


@pytest.mark.parametrize("model_type", ["llama", "bert"])
def test_text_that_is_token_ids_already(model_type: str) -> None:
    model, contrast = text_model(model_type), pairs(6)
    sites = Architecture.of(model).sites("attn_in", "resid_post")
    encoded = encode(contrast, text_tokenizer(), Select.parse("all,sinks=0,specials"))
    width = max(len(e.ids) for e in encoded)
    ids = torch.tensor([[*e.ids, *[PAD] * (width - len(e.ids))] for e in encoded])
    tensors = {"input_ids": ids, "attention_mask": (ids != PAD).long()}
    data = [Inputs(tensors, torch.tensor(contrast.labels))]
    expected = capture(
        model, text_tokenizer(), contrast, sites, select="all,sinks=0,specials", progress=False
    )
    got = look(model, data, sites)
    assert all(same(got[site], expected[site]) for site in sites)  # the padding did not count
    # labels of positions; a negative one is left out
    z = torch.tensor(contrast.labels)[:, None].expand(ids.shape).clone()
    z[:, 0] = -100
    fewer = look(model, [Inputs(tensors, z)], sites)
    assert fewer[sites[0]].n == expected[sites[0]].n - len(ids)


def test_t5_stacks() -> None:
    model, contrast = text_model("t5"), pairs(4)
    encoder = Architecture.of(model).sites("attn_in")
    decoder = Architecture.of(model, stack="decoder").sites("attn_in")
    ran: list[str] = []
    handle = model.get_submodule("decoder").register_forward_pre_hook(lambda *_: ran.append("decoder"))
    capture(model, text_tokenizer(), contrast, encoder, progress=False)
    assert not ran  # the encoder alone
    with pytest.raises(InputError, match=r"no decoder_input_ids; pass Inputs"):
        capture(model, text_tokenizer(), contrast, decoder, progress=False)
    ids = torch.randint(3, 90, (4, 7), generator=torch.Generator().manual_seed(0))
    data = [Inputs({"input_ids": ids, "decoder_input_ids": ids[:, :5]}, torch.arange(4) % 2)]
    both = look(model, data, [*encoder, *decoder])
    handle.remove()
    assert ran
    assert both[encoder[0]].n == 28
    assert both[decoder[0]].n == 20
    with reading(model, decoder) as seen, torch.no_grad():
        model(input_ids=ids, decoder_input_ids=ids[:, :5])
    z = (torch.arange(4) % 2)[:, None].expand(4, 5)
    assert same(both[decoder[1]], Moments.of(seen[decoder[1]], z, classes=2))


def test_any_module_and_real_labels() -> None:
    net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x = torch.randn(20, 5, dtype=torch.float64)
    z = x[:, 0].clone()

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, features: Tensor) -> Tensor:
            return self.net(features)

    got = look(Named(), [Inputs({"features": x}, z)], [Site("net.1")])[Site("net.1")]
    assert same(got, Moments.of(net[:2](x), z))


class Lazy(Sequence):
    """Makes its items when asked for them; counts how many are alive."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: Any) -> Inputs:
        if i >= 4:
            raise IndexError
        return Inputs({"pixel_values": images(3, seed=i)}, torch.tensor([0, 1, 1]))


def test_a_lazy_sequence(vit: nn.Module) -> None:
    sites = Architecture.of(vit).sites("mlp_in")
    assert same(look(vit, Lazy(), sites)[sites[0]], look(vit, list(Lazy()), sites)[sites[0]])


def test_what_does_not_fit_is_refused(vit: nn.Module) -> None:
    pixels, z = {"pixel_values": images(4)}, torch.tensor([0, 1, 0, 1])
    site = Architecture.of(vit).sites("mlp_in")[:1]
    with pytest.raises(InputError, match="got no tensor"):
        Inputs({}, z)
    with pytest.raises(ShapeError, match="the same number of examples in each"):
        Inputs({**pixels, "more": torch.zeros(3)}, z)
    with pytest.raises(ShapeError, match=r"got z \(3,\) for 4 examples"):
        Inputs(pixels, z[:3])
    with pytest.raises(ShapeError, match=r"got positions \(4, 2\) of torch.int64"):
        Inputs(pixels, z, torch.ones(4, 2, dtype=torch.int64))
    with pytest.raises(ShapeError, match=r"positions per example, Inputs\.positions 2"):
        look(vit, [Inputs(pixels, z, torch.ones(4, 2, dtype=torch.bool))], site)
    with pytest.raises(ShapeError, match="positions per example, z 2"):
        look(vit, [Inputs(pixels, z[:, None].expand(4, 2))], site)
    with pytest.raises(InputError, match="needed 'all' or 'mean'"):
        look(vit, [Inputs(pixels, z)], site, select="last")
    with pytest.raises(InputError, match="needed 'all' or 'mean'"):
        look(vit, [Inputs(pixels, z)], site, select="all,sinks=2")
    with pytest.raises(InputError, match="each position has a label"):
        look(vit, [Inputs(pixels, z[:, None].expand(4, 2))], site, select="mean")
    with pytest.raises(InputError, match="empty list of Inputs"):
        look(vit, [], site)
    with pytest.raises(InputError, match="some Inputs and reals in others"):
        look(vit, [Inputs(pixels, z), Inputs(pixels, z.double())], site)
    with pytest.raises(InputError, match="negative class id"):
        look(vit, [Inputs(pixels, z - 1)], site)
    with pytest.raises(InputError, match="got dict among the Inputs"):
        look(vit, [pixels], site)  # type: ignore[list-item]
    with pytest.raises(InputError, match="Inputs go with tokenizer=None"):
        capture(vit, text_tokenizer(), [Inputs(pixels, z)], site)
    with pytest.raises(InputError, match="a contrast without a tokenizer"):
        capture(vit, None, pairs(2), site)
    none = torch.zeros(4, 5, dtype=torch.bool)
    with pytest.raises(NotEnoughDataError, match="no position that counts"):
        look(vit, [Inputs(pixels, z, none)], site, select="mean")
    with pytest.raises(NotEnoughDataError, match=r"no activation reached vit"):
        look(vit, [Inputs(pixels, z, none)], site)
    bad = images(4)
    bad[2] = float("nan")
    with pytest.raises(NonFiniteError, match=f"activations at {site[0]} hold NaN"):
        look(vit, [Inputs({"pixel_values": bad}, z)], site)
