from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from repe_unlearn.errors import InputError, UnknownSiteError
from repe_unlearn.sites import Site

PATHS = st.lists(st.from_regex(r"[a-z_0-9:]{1,4}", fullmatch=True), min_size=1, max_size=5).map(".".join)


@given(path=PATHS, side=st.sampled_from(["input", "output"]))
def test_text_round_trip(path: str, side: str) -> None:
    site = Site(path, side)  # type: ignore[arg-type]
    other = Site(path, "input" if side == "output" else "output")
    assert Site.parse(str(site)) == site
    assert Site.parse(str(site)) != other
    assert str(site) != str(other)


def test_the_output_is_the_default_and_is_not_written() -> None:
    assert Site("a.b") == Site("a.b", "output") == Site.parse("a.b") == Site.parse("a.b:output")
    assert str(Site("a.b", "output")) == "a.b"
    assert str(Site("a.b", "input")) == "a.b:input"
    assert str(Site("a:input")) == "a:input:output"  # a ModuleDict may have such a key
    assert repr(Site("a.b", "input")) == "Site('a.b:input')"


def test_is_a_key_and_has_an_order() -> None:
    table = {Site("a"): 1, Site("a", "input"): 2}
    assert table[Site.parse("a:input")] == 2
    assert len({Site("a"), Site("a"), Site("b")}) == 2
    assert sorted([Site("b"), Site("a"), Site("a", "input")]) == [Site("a", "input"), Site("a"), Site("b")]
    with pytest.raises(FrozenInstanceError):
        Site("a").path = "b"  # type: ignore[misc]


@pytest.mark.parametrize("text", ["", ":input", "a:inputs", "a:", "a:b:c"])
def test_refuses_what_is_no_site(text: str) -> None:
    with pytest.raises(InputError, match="needed"):
        Site.parse(text)


def test_finds_its_module_or_names_the_nearest() -> None:
    model = nn.Sequential()
    model.add_module("attention", nn.Linear(2, 2))
    inner = nn.Linear(2, 2)
    model.add_module("mlp", nn.Sequential(inner))
    assert Site("mlp.0").module(model) is inner
    with pytest.raises(UnknownSiteError, match=r"'atention'; Sequential has no module .*nearest: attention"):
        Site("atention").module(model)
    with pytest.raises(UnknownSiteError, match="named_modules"):
        Site("zzzz").module(model)
