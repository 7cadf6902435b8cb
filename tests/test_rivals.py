"""Fused experts and post-norms: what the published rules of other tools leave, and what ours does."""

from __future__ import annotations

import pytest
from rivalkit import FUSED, POST_NORM, by_suffix, left, ours, row_renormalising


@pytest.mark.parametrize("model_type", POST_NORM)
def test_ours_leaves_nothing_behind_a_post_norm(model_type: str) -> None:
    assert max(left(model_type, ours).values()) < 1e-6  # these norms compute in float32


@pytest.mark.parametrize("model_type", FUSED)
def test_ours_leaves_nothing_in_fused_experts(model_type: str) -> None:
    assert max(left(model_type, ours).values()) < 1e-10


@pytest.mark.parametrize("model_type", FUSED)
def test_a_rule_that_looks_for_modules_misses_fused_experts(model_type: str) -> None:
    found = left(model_type, row_renormalising)
    assert found["mlp_out"] > 0.5
    assert found["attn_out"] > 0.02  # rows of another length are no longer a projection


def test_a_rule_that_guesses_the_axis_is_right_only_where_the_guess_is() -> None:
    for model_type in ("mixtral", "qwen3_moe"):
        assert max(left(model_type, by_suffix).values()) < 1e-10, model_type
    assert left("gpt_oss", by_suffix)["mlp_out"] > 0.5


@pytest.mark.parametrize("model_type", POST_NORM)
@pytest.mark.parametrize("rule", [row_renormalising, by_suffix])
def test_a_rule_that_knows_no_gain_leaves_some_behind_a_post_norm(model_type: str, rule) -> None:
    assert min(left(model_type, rule).values()) > 0.05


@pytest.mark.parametrize("rule", [row_renormalising, by_suffix, ours])
def test_no_rule_does_anything_to_what_it_does_not_see(rule) -> None:
    """Control: the measure is 1 for a model that is left alone, and the suffix rule is exact where it applies."""
    assert left("llama", lambda _model, _r: None) == {"attn_out": 1.0, "mlp_out": 1.0}
    assert max(left("llama", rule).values()) < (0.5 if rule is row_renormalising else 1e-10)
