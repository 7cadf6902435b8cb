from __future__ import annotations

import pytest
import torch
from tiny import hook_count, tiny, token_ids
from torch import Tensor, nn

from repe_unlearn.errors import UnknownSiteError, UnsupportedModelError
from repe_unlearn.sites import Site
from repe_unlearn.taps import compiled, tap


class Pair(nn.Module):
    """A module that returns (tensor, something else)."""

    def forward(self, x: Tensor, *, extra: str = "kept") -> tuple[Tensor, str]:
        return 2 * x, extra


class Odd(nn.Module):
    def forward(self, x: object) -> object:
        return {"x": x}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pair, self.odd = Pair(), Odd()

    def forward(self, x: Tensor) -> tuple[Tensor, str]:
        return self.pair(x, extra="mine")


class Keyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pair = _Hidden()

    def forward(self, x: Tensor, name: str) -> Tensor:
        return self.pair(**{name: x})


class _Hidden(nn.Module):
    def forward(self, hidden_states: Tensor | None = None, other: Tensor | None = None) -> Tensor:
        return hidden_states if hidden_states is not None else other  # type: ignore[return-value]


X = torch.tensor([[1.0, 2.0]])


def test_output_of_a_tuple_is_replaced_in_place() -> None:
    net = Net()
    with tap(net, {Site("pair"): lambda x: x + 1}):
        value, extra = net(X)
    assert value.tolist() == [[3.0, 5.0]]
    assert extra == "mine"
    assert net(X)[0].tolist() == [[2.0, 4.0]]  # control: gone afterwards


def test_input_is_replaced() -> None:
    net = Net()
    with tap(net, {Site("pair", "input"): lambda x: x + 1}):
        assert net(X)[0].tolist() == [[4.0, 6.0]]
    hidden = Keyword()
    with tap(hidden, {Site("pair", "input"): lambda x: x + 1}):
        assert hidden(X, "hidden_states").tolist() == [[2.0, 3.0]]
        with pytest.raises(
            UnsupportedModelError, match="no tensor as first argument and none named hidden_states"
        ):
            hidden(X, "other")
    assert hidden(X, "hidden_states") is X


@pytest.mark.parametrize("side", ["input", "output"])
def test_none_leaves_the_tensor_itself(side: str) -> None:
    net, seen = Net(), []

    def look(x: Tensor) -> None:
        seen.append(x)

    with tap(net, {Site("pair", side): look}):  # type: ignore[arg-type]
        value, extra = net(X)
    assert extra == "mine"
    assert seen[0] is (X if side == "input" else value)


def test_outputs_without_a_tensor_are_refused() -> None:
    net = Net()
    with (
        tap(net, {Site("odd"): lambda x: x}),
        pytest.raises(UnsupportedModelError, match="odd returns dict; needed a tensor"),
    ):
        net.odd(X)
    assert hook_count(net) == 0


def test_all_or_nothing() -> None:
    net = Net()
    with pytest.raises(UnknownSiteError, match=r"no module of that name \(nearest: pair\)"):
        tap(net, {Site("pair"): lambda x: x, Site("pairs"): lambda x: x})
    assert hook_count(net) == 0


def test_failure_while_registering_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net()

    def broken(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(net.odd, "register_forward_hook", broken)
    with pytest.raises(KeyboardInterrupt):
        tap(net, {Site("pair"): lambda x: x, Site("odd"): lambda x: x})
    assert hook_count(net) == 0


def test_close_twice_and_errors_inside() -> None:
    net = Net()
    stack = tap(net, {Site("pair"): lambda x: x, Site("pair", "input"): lambda x: x})
    assert hook_count(net) == 2
    stack.close()
    stack.close()
    assert hook_count(net) == 0
    with pytest.raises(ZeroDivisionError), tap(net, {Site("pair"): lambda x: x}):
        _ = 1 / 0
    assert hook_count(net) == 0


def test_taps_see_what_earlier_taps_made() -> None:
    net = Net()
    with tap(net, {Site("pair"): lambda x: x + 1}), tap(net, {Site("pair"): lambda x: 10 * x}):
        assert net(X)[0].tolist() == [[30.0, 50.0]]


def test_compiled_models_are_refused() -> None:
    net = Net()
    assert not compiled(net)
    whole = torch.compile(net, backend="eager")
    assert compiled(whole)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedModelError, match="Apply the plan first and compile afterwards"):
        tap(whole, {Site("pair"): lambda x: x})  # type: ignore[arg-type]
    part = Net()
    part.pair.compile(backend="eager")
    with pytest.raises(UnsupportedModelError, match="compiled"):
        tap(part, {Site("pair"): lambda x: x})
    assert hook_count(part) == hook_count(net) == 0


def test_attention_modules_of_a_real_family() -> None:
    """Llama's attention gets the stream by keyword and returns a tuple."""
    model, ids = tiny("llama"), token_ids()
    site = Site("model.layers.1.self_attn")
    base = model(ids).logits
    with tap(model, {site: torch.zeros_like}):
        by_output = model(ids).logits
    with tap(model, {Site("model.layers.1.self_attn.o_proj"): torch.zeros_like}):
        torch.testing.assert_close(model(ids).logits, by_output)
    with tap(model, {Site(site.path, "input"): torch.zeros_like}):
        torch.testing.assert_close(model(ids).logits, by_output)
    assert (base - by_output).abs().max() > 1e-2
