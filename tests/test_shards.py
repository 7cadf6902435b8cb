"""Resuming a capture, and activations on disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from textkit import pairs, text_model, text_tokenizer
from torch import nn

from repe_unlearn import activations, shards
from repe_unlearn.activations import capture, gather
from repe_unlearn.architectures import Architecture
from repe_unlearn.errors import FileFormatError, InputError, ModelMismatchError, OutputExistsError
from repe_unlearn.moments import Accumulator, Moments
from repe_unlearn.shards import Shards
from repe_unlearn.sites import Site

look = partial(capture, progress=False, batch_tokens=300)
FIELDS = ("mean_x", "mean_z", "m_xx", "m_xz", "m_zz")


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    return text_model("llama")


@pytest.fixture(scope="module")
def sites(llama: nn.Module) -> tuple[Site, ...]:
    return Architecture.of(llama).sites("attn_in", "mlp_in")


def equal(a: dict[Site, Moments], b: dict[Site, Moments]) -> bool:
    return a.keys() == b.keys() and all(
        a[s].n == b[s].n and all(torch.equal(getattr(a[s], f), getattr(b[s], f)) for f in FIELDS) for s in a
    )


@pytest.fixture
def stop_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Interrupt the next capture before its n-th batch."""

    def stop(n: int) -> None:
        def interrupted(work: Any, **_: object) -> Iterator[Any]:
            for i, batch in enumerate(work):
                if i == n:
                    raise KeyboardInterrupt
                yield batch

        monkeypatch.setattr(activations, "tqdm", interrupted)

    return stop


# Resume


@pytest.mark.parametrize("select", ["last", "all", "mean"])
def test_an_interrupted_capture_goes_on_to_the_same_bits(
    llama: nn.Module, sites: tuple[Site, ...], select: str, tmp_path: Path, stop_at: Any, monkeypatch: Any
) -> None:
    whole = look(llama, text_tokenizer(), pairs(), sites, select=select)
    path = tmp_path / "progress"
    again = partial(look, llama, text_tokenizer(), pairs(), sites, select=select, resume=path, every=2)
    stop_at(5)
    with pytest.raises(KeyboardInterrupt):
        again()
    assert path.exists()
    stop_at(3)  # from batch 4 on: a second interruption
    with pytest.raises(KeyboardInterrupt):
        again()
    monkeypatch.undo()
    ran: list[int] = []
    handle = llama.get_submodule("model").register_forward_pre_hook(lambda *_: ran.append(1))
    got = again()
    handle.remove()
    assert equal(got, whole)
    assert not path.exists()
    assert list(tmp_path.iterdir()) == []
    # control: it did go on, and a capture that begins at another batch is another one
    total = len(activations.prepare(llama, text_tokenizer(), pairs(), select, 300))
    assert len(ran) == total - 6
    assert not equal(look(llama, text_tokenizer(), pairs(47), sites, select=select), whole)


def test_progress_of_something_else_is_refused(
    llama: nn.Module, sites: tuple[Site, ...], tmp_path: Path, stop_at: Any, monkeypatch: Any
) -> None:
    path = tmp_path / "progress"
    tokenizer = text_tokenizer()
    stop_at(3)
    with pytest.raises(KeyboardInterrupt):
        look(llama, tokenizer, pairs(), sites, resume=path, every=1)
    monkeypatch.undo()
    before = path.read_bytes()
    other = text_model("llama", seed=1)
    with pytest.raises(ModelMismatchError, match=r"model: \w+ there, \w+ here"):
        look(other, tokenizer, pairs(), sites, resume=path)
    with pytest.raises(InputError, match=r"progress of another capture \(sites: "):
        look(llama, tokenizer, pairs(), sites[:1], resume=path)
    others: list[dict[str, Any]] = [{"select": "mean"}, {"batch_tokens": 200}]
    for options in others:
        with pytest.raises(InputError, match="data, labels, selection or batch_tokens: "):
            look(llama, tokenizer, pairs(), sites, resume=path, **options)
    with pytest.raises(InputError, match="data, labels"):
        look(llama, tokenizer, pairs(47), sites, resume=path)
    with pytest.raises(InputError, match="target: None there"):
        look(llama, tokenizer, pairs(), sites, resume=path, target=sites[0])
    with pytest.raises(InputError, match=r"dtype: torch\.float64 there, torch\.float32 here"):
        look(text_model("llama", dtype=torch.float32), tokenizer, pairs(), sites, resume=path)
    with pytest.raises(InputError, match="got every=0"):
        look(llama, tokenizer, pairs(), sites, resume=path, every=0)
    assert path.read_bytes() == before
    path.write_bytes(before[: len(before) // 2])
    with pytest.raises(FileFormatError, match="not a whole safetensors file"):
        look(llama, tokenizer, pairs(), sites, resume=path)


def test_the_state_of_sums_goes_on() -> None:
    g = torch.Generator().manual_seed(0)
    x, z = torch.randn(1400, 5, generator=g), torch.arange(1400) % 3
    weight = torch.rand(1400, generator=g, dtype=torch.float64)
    for w in (None, weight):
        for cut in (0, 100, 512, 700):
            whole, first, second = (Accumulator(classes=3) for _ in range(3))
            part = lambda a, b, w=w: (x[a:b], z[a:b], None if w is None else w[a:b])  # noqa: E731
            for sums in (whole, first):
                sums.add(*part(0, cut))
            saved = {name: t.clone() for name, t in first.state().items()}
            second.restore(saved)
            for sums in (whole, second):
                sums.add(*part(cut, 1400))
            a, b = whole.moments(), second.moments()
            assert a.n == b.n
            assert all(torch.equal(getattr(a, f), getattr(b, f)) for f in FIELDS)
            if saved:  # control: the restored tensors are copies
                third = Accumulator(classes=3)
                third.restore(saved)
                assert equal_state(third.state(), saved)


def equal_state(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# Keep


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "_SHARD_BYTES", 40_000)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("select", ["all", "mean"])
def test_kept_activations_are_those_of_gather(
    llama: nn.Module, sites: tuple[Site, ...], select: str, tmp_path: Path
) -> None:
    folder = tmp_path / "kept"
    got = look(llama, text_tokenizer(), pairs(), sites, select=select, keep=folder)
    kept = Shards(folder)
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert kept.sites == sites
    assert kept.facts["examples"] == 96
    expected = gather(
        llama, text_tokenizer(), pairs(), sites, select=select, batch_tokens=300, progress=False
    )
    for site in sites:
        rows = kept.gather(site)
        for name in ("x", "z", "owner"):
            assert torch.equal(getattr(rows, name), getattr(expected[site], name)), name
        assert sum(len(part.x) for part in kept.rows(site)) == len(rows.x)
        assert equal({site: kept.moments(site)}, {site: got[site]})
    assert equal(got, look(llama, text_tokenizer(), pairs(), sites, select=select))
    with pytest.raises(InputError, match="was not captured"):
        kept.gather(Site("model.norm"))
    with pytest.raises(OutputExistsError, match="choose another"):
        look(llama, text_tokenizer(), pairs(), sites, keep=folder)


def test_dtype_of_kept_activations(sites: tuple[Site, ...], tmp_path: Path) -> None:
    model = text_model("llama", dtype=torch.float32)
    for dtype in (None, torch.bfloat16):
        look(model, text_tokenizer(), pairs(4), sites, keep=tmp_path / str(dtype), keep_dtype=dtype)
        assert Shards(tmp_path / str(dtype)).gather(sites[0]).x.dtype == (dtype or torch.float32)
    a, b = (Shards(tmp_path / str(d)).gather(sites[1]).x for d in (None, torch.bfloat16))
    assert torch.equal(a.bfloat16(), b)
    with pytest.raises(InputError, match="floating-point dtype"):
        look(model, text_tokenizer(), pairs(4), sites, keep=tmp_path / "ids", keep_dtype=torch.int8)


@pytest.mark.usefixtures("small")
def test_an_interrupted_folder(
    llama: nn.Module, sites: tuple[Site, ...], tmp_path: Path, stop_at: Any, monkeypatch: Any
) -> None:
    folder, whole, path = tmp_path / "kept", tmp_path / "whole", tmp_path / "progress"
    tokenizer = text_tokenizer()
    options: dict[str, Any] = {"select": "all"}
    expected = look(llama, tokenizer, pairs(), sites, keep=whole, **options)
    stop_at(6)
    with pytest.raises(KeyboardInterrupt):
        look(llama, tokenizer, pairs(), sites, keep=folder, **options)
    assert not folder.exists()  # nobody can go on with it
    with pytest.raises(KeyboardInterrupt):
        look(llama, tokenizer, pairs(), sites, keep=folder, resume=path, every=4, **options)
    with pytest.raises(FileFormatError, match=r"no index\.json: .* its capture was interrupted"):
        Shards(folder)
    monkeypatch.undo()
    got = look(llama, tokenizer, pairs(), sites, keep=folder, resume=path, every=4, **options)
    assert equal(got, expected)
    for site in sites:
        a, b = Shards(folder).gather(site), Shards(whole).gather(site)
        assert torch.equal(a.x, b.x)
        assert torch.equal(a.owner, b.owner)
    assert not path.exists()


@pytest.mark.usefixtures("small")
def test_damaged_folders(llama: nn.Module, sites: tuple[Site, ...], tmp_path: Path) -> None:
    look(llama, text_tokenizer(), pairs(), sites, keep=tmp_path / "kept", select="all")
    folder = tmp_path / "kept"
    index = json.loads((folder / "index.json").read_text())
    first = folder / next(iter(index["shards"]))
    data = first.read_bytes()
    first.write_bytes(data[:-1])
    with pytest.raises(FileFormatError, match="missing or not whole"):
        Shards(folder)
    first.write_bytes(data)
    Shards(folder)
    (folder / "index.json").write_text(json.dumps({**index, "version": 99}))
    with pytest.raises(FileFormatError, match="version 99"):
        Shards(folder)
    (folder / "index.json").write_text("{")
    with pytest.raises(FileFormatError, match="damaged or foreign"):
        Shards(folder)


# Site to site


@pytest.mark.parametrize("which", [0, 2, 5])
def test_moments_of_one_site_with_another(llama: nn.Module, sites: tuple[Site, ...], which: int) -> None:
    target = sites[which]
    raw = gather(llama, text_tokenizer(), pairs(), sites, select="all", progress=False)
    got = look(llama, text_tokenizer(), pairs(), sites, select="all", target=target)
    assert tuple(got) == sites
    for site in sites:
        expected = Moments.of(raw[site].x, raw[target].x)
        assert (got[site].n, got[site].k) == (expected.n, raw[target].x.shape[1])
        for field in FIELDS:
            torch.testing.assert_close(
                getattr(got[site], field), getattr(expected, field), rtol=1e-9, atol=1e-9
            )
    torch.testing.assert_close(got[target].m_xz, got[target].m_xx, rtol=1e-12, atol=1e-12)
    others = [site for site in sites if site != target]
    fewer = look(llama, text_tokenizer(), pairs(), others, select="all", target=target)
    assert equal(fewer, {site: got[site] for site in others})
    assert not torch.allclose(got[others[0]].m_xz, got[target].m_xz)  # control
