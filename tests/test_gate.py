from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from test_positions import SITES, models, prompts
from tiny import D, hook_count, oblique, reading, tiny, token_ids
from torch import Tensor, nn

from repe_unlearn.errors import InputError, NonFiniteError, NotEnoughDataError, ShapeError
from repe_unlearn.fingerprints import fingerprint
from repe_unlearn.gate import Gate
from repe_unlearn.hooks import apply
from repe_unlearn.moments import Moments
from repe_unlearn.plan import ErasurePlan
from repe_unlearn.sites import Site

GATE_AT = {name: path.replace("1", "0") for name, path in SITES.items()}  # one block earlier


def recorded(
    model: nn.Module, paths: tuple[str, ...], run: Any, **how: Any
) -> list[list[tuple[Tensor, Tensor]]]:
    """Run with a plan at the last path; return per call (before, after) the taps at every path."""
    log: list[list[tuple[Tensor, Tensor]]] = []
    first: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(path).register_forward_hook(lambda _m, _a, x, p=path: first.update({p: x}))
        for path in paths
    ]
    plan = ErasurePlan({Site(paths[-1]): oblique(1)}, fingerprint(model))
    with apply(model, plan, **how):
        handles.append(
            model.get_submodule(paths[-1]).register_forward_hook(
                lambda _m, _a, x: log.append([(first[paths[0]], first[paths[0]]), (first[paths[-1]], x)])
            )
        )
        run()
        for handle in handles:
            handle.remove()
    return log


def gate_at(path: str, per: Any, threshold: float = 0.3) -> Gate:
    weight = torch.randn(D, generator=torch.Generator().manual_seed(5))
    return Gate(Site(path), weight, threshold, per)


def by_hand(gate: Gate, log: list, mask: Tensor, repeat: int) -> int:
    """Assert that exactly the positions where the gate is open changed; return how many did."""
    width, edited = mask.shape[1], 0
    opened: list[list[bool]] = []
    begin = 0
    for (x, _), (y, new) in log:
        if y.shape[1] >= width or begin == 0:
            begin, opened = 0, [[] for _ in range(len(y))]
        for row in range(len(y)):
            for t in range(y.shape[1]):
                column = begin + t
                fires = float(x[row, t] @ gate.weight.to(x)) > gate.threshold
                if gate.per == "sequence":
                    in_prompt = column < width and bool(mask[row // repeat, column])
                    fires = (fires and in_prompt) or any(opened[row])
                opened[row].append(fires)
                assert bool((y[row, t] != new[row, t]).any()) == fires, (row, column)
                edited += fires
        begin += y.shape[1]
    return edited


@models
@pytest.mark.parametrize("per", ["token", "sequence"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_generate(model_type: str, per: str, side: str) -> None:
    model, (ids, mask) = tiny(model_type, dtype=torch.float32), prompts(side)
    gate = gate_at(GATE_AT[model_type], per)
    with reading(model, [gate.site]) as seen:
        model(ids, attention_mask=mask)
    scores = (seen[gate.site] @ gate.weight)[mask > 0]
    gate = replace(
        gate, threshold=float(scores.sort().values[-4:-2].mean())
    )  # the prompts pass it at three tokens
    ways: list[dict[str, Any]] = [
        {},
        {"use_cache": False},
        {"prefill_chunk_size": 4},
        {"num_beams": 3},
        {"num_beams": 3, "use_cache": False},
        {"num_return_sequences": 2, "do_sample": True},
    ]
    for way in ways:
        repeat = way.get("num_beams", way.get("num_return_sequences", 1))
        options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, **way}
        log = recorded(
            model,
            (GATE_AT[model_type], SITES[model_type]),
            lambda options=options: model.generate(ids, attention_mask=mask, **options),
            gate=gate,
        )
        edited, total = by_hand(gate, log, mask, repeat), sum(y.shape[0] * y.shape[1] for _, (y, _) in log)
        assert 0 < edited < total, way  # control: it fires somewhere and not everywhere


def test_cache_and_padding_do_not_change_the_text() -> None:
    model, (ids, mask) = tiny("llama", dtype=torch.float32), prompts("left")
    gate = gate_at(GATE_AT["llama"], "sequence", threshold=3.0)
    sites = [Site("model.layers.1.mlp"), Site("model.layers.2.mlp"), Site("model.norm")]
    plan = ErasurePlan({s: oblique(2, seed=i) for i, s in enumerate(sites)}, fingerprint(model))
    options: dict[str, Any] = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}

    def texts(**more: Any) -> list[list[int]]:
        return model.generate(ids, attention_mask=mask, **options, **more)[:, 9:].tolist()

    plain = texts()
    with apply(model, plan, gate=gate):
        cached = texts()
        assert cached == texts(use_cache=False) == texts(prefill_chunk_size=2)
        alone = [
            model.generate(ids[r : r + 1][mask[r : r + 1] > 0][None], **options)[0, -8:].tolist()
            for r in range(3)
        ]
    assert cached == alone
    assert cached != plain  # control


def test_a_closed_gate_changes_nothing_and_an_open_one_all() -> None:
    model, ids = tiny("llama"), token_ids()
    plan = ErasurePlan({Site("model.norm"): oblique(2)}, fingerprint(model))
    plain = model(ids).logits
    with apply(model, plan):
        everywhere = model(ids).logits
    for per in ("token", "sequence"):
        with apply(model, plan, gate=gate_at("model.layers.0.mlp", per, 1e9)):
            assert torch.equal(model(ids).logits, plain)
        with apply(model, plan, gate=gate_at("model.layers.0.mlp", per, -1e9)):
            torch.testing.assert_close(model(ids).logits, everywhere)
    assert (plain - everywhere).abs().max() > 1e-2


def test_a_gate_reads_what_is_there_before_the_edit_at_its_own_site() -> None:
    model = tiny("llama")
    log = recorded(
        model, ("model.norm",), lambda: model(token_ids()), gate=(gate := gate_at("model.norm", "token"))
    )
    assert 0 < by_hand(gate, log, torch.ones(2, 9), 1) < 18


def test_a_gate_that_comes_too_late_is_refused() -> None:
    model, ids = tiny("llama"), token_ids()
    plan = ErasurePlan(
        {Site("model.layers.0.mlp"): oblique(1), Site("model.norm"): oblique(1)}, fingerprint(model)
    )
    late = gate_at("model.layers.1.mlp", "token")
    with apply(model, plan, gate=late):
        for _ in range(2):  # also when the gate has fired in the call before
            with pytest.raises(
                InputError, match=r"layers\.0\.mlp runs before the gate at model\.layers\.1\.mlp"
            ):
                model(ids)
    with pytest.raises(InputError, match="runs before"), apply(model, plan, gate=late):
        model.generate(ids, max_new_tokens=2)
    assert hook_count(model) == 0


def test_a_cache_that_the_gate_has_not_seen_is_refused() -> None:
    model, ids = tiny("llama", dtype=torch.float32), token_ids(1, 9)
    plan = ErasurePlan({Site("model.norm"): oblique(1)}, fingerprint(model))
    cache = model(ids[:, :6], use_cache=True).past_key_values
    with (
        apply(model, plan, gate=gate_at("model.layers.0.mlp", "sequence")),
        pytest.raises(InputError, match="has not seen the first 6 tokens"),
    ):
        model.generate(ids, past_key_values=cache, max_new_tokens=2)


# The fit


def classes(n: int, *, seed: int = 0, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    z = (torch.arange(n) % 4 == 0).long()  # unbalanced
    mix = torch.randn(6, 6, generator=g, dtype=torch.float64)
    x = torch.randn(n, 6, generator=g, dtype=torch.float64) @ mix
    return scale * (x + 3 * z[:, None] * torch.tensor([1.0, -1, 0, 0, 2, 0])), z


def test_fit_is_the_linear_discriminant() -> None:
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    x, z = classes(4000)
    gate = Gate.fit(Moments.of(x, z), Site("a"), shrinkage=None)
    lda = LinearDiscriminantAnalysis(priors=[0.5, 0.5]).fit(x.numpy(), z.numpy())
    weight = torch.tensor(lda.coef_[0])
    assert torch.cosine_similarity(gate.weight, weight, dim=0) > 1 - 1e-9
    assert torch.equal(gate.fires(x), torch.tensor(lda.predict(x.numpy()) == 1))
    test, labels = classes(2000, seed=0)
    assert (gate.fires(test) == (labels == 1)).double().mean() > 0.9


def test_fit_on_the_other_class_and_in_other_units() -> None:
    x, z = classes(400)
    one, zero = (Gate.fit(Moments.of(x, z), Site("a"), fires_on=c) for c in (1, 0))
    assert torch.equal(one.fires(x), ~zero.fires(x))
    scaled = Gate.fit(Moments.of(1e-6 * x, z), Site("a"))
    assert torch.equal(scaled.fires(1e-6 * x), one.fires(x))
    assert one.fires(x)[z == 1].double().mean() > 0.9  # control: class 1 opens it
    assert one.fires(x)[z == 0].double().mean() < 0.1


def test_fit_refuses_what_has_no_two_classes() -> None:
    x, z = classes(40)
    with pytest.raises(InputError, match="3 concept columns"):
        Gate.fit(Moments.of(x, z, classes=3), Site("a"))
    with pytest.raises(InputError, match="fires_on=2"):
        Gate.fit(Moments.of(x, z), Site("a"), fires_on=2)
    with pytest.raises(NotEnoughDataError):
        Gate.fit(Moments.of(x, torch.zeros_like(z), classes=2), Site("a"))


def test_bad_values() -> None:
    site, w = Site("a"), torch.ones(3)
    with pytest.raises(ShapeError, match=r"got \(3, 1\); needed a floating-point vector"):
        Gate(site, w[:, None], 0.0)
    with pytest.raises(NonFiniteError):
        Gate(site, w, float("nan"))
    with pytest.raises(InputError, match="per='row'"):
        Gate(site, w, 0.0, "row")  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="width 4 at a; its gate needs 3"):
        Gate(site, w, 0.0).fires(torch.ones(2, 4))
