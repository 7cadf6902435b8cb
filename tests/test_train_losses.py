"""The losses, against values computed by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import pytest
import torch

from repe_unlearn.train.losses import METHODS, grad_ascent, kl, nll, npo, simnpo, sums

LOGP = torch.tensor([[-1.0, -2.0, -7.0], [-3.0, -9.0, -9.0]], dtype=torch.float64)
COUNTS = torch.tensor([[True, True, False], [True, False, False]])


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def test_nll_is_a_mean_over_tokens_not_over_samples() -> None:
    assert float(nll(LOGP, COUNTS)) == 2.0  # (1 + 2 + 3) / 3; over samples it would be 2.25
    assert sums(LOGP, COUNTS).tolist() == [-3.0, -3.0]
    assert float(grad_ascent(LOGP, COUNTS)) == -2.0


def test_npo() -> None:
    reference = torch.tensor([-1.0, -3.0], dtype=torch.float64)
    by_hand = -(2 / 0.1) * (log_sigmoid(-0.1 * (-3 + 1)) + log_sigmoid(0.0)) / 2
    assert float(npo(LOGP, COUNTS, reference)) == pytest.approx(by_hand, rel=1e-12)
    assert float(npo(LOGP, COUNTS, reference, beta=0.5)) != pytest.approx(by_hand, rel=1e-3)
    with pytest.raises(TypeError, match="reference"):
        npo(LOGP, COUNTS)


def test_npo_becomes_gradient_ascent_on_the_sum_as_beta_goes_to_zero() -> None:
    logp = LOGP.clone().requires_grad_()
    (found,) = torch.autograd.grad(npo(logp, COUNTS, sums(LOGP, COUNTS), beta=1e-6), logp)
    assert torch.allclose(found, COUNTS.double() / 2)  # d mean(sum) / d logp
    (strong,) = torch.autograd.grad(npo(logp, COUNTS, sums(LOGP, COUNTS) + 9, beta=2.0), logp)
    assert float(strong.abs().max()) < 1e-6  # what is unlikely by now is let go


def test_simnpo() -> None:
    per_token = [(1 + 2) / 2, 3.0]
    by_hand = -(2 / 4.5) * sum(log_sigmoid(4.5 * x) for x in per_token) / 2
    assert float(simnpo(LOGP, COUNTS)) == pytest.approx(by_hand, rel=1e-12)
    shifted = -(2 / 4.5) * sum(log_sigmoid(4.5 * (x - 1)) for x in per_token) / 2
    assert float(simnpo(LOGP, COUNTS, delta=1.0)) == pytest.approx(shifted, rel=1e-12)


def test_kl_is_from_before_to_now() -> None:
    before, now = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    by_hand = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    other_way = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert float(kl(now + 3, before - 1)) == pytest.approx(by_hand, rel=1e-6)  # logits need no normalising
    assert abs(by_hand - other_way) > 1e-3
    assert float(kl(before, before)) == 0.0


def test_the_defaults_are_those_of_the_reference_code() -> None:
    weights = {name: (m.gamma, m.alpha, m.retain, m.reference) for name, m in METHODS.items()}
    assert weights == {
        "grad_ascent": (1.0, 0.0, "nll", False),
        "grad_diff": (1.0, 1.0, "nll", False),
        "grad_diff_kl": (1.0, 1.0, "kl", False),
        "npo": (1.0, 1.0, "nll", True),
        "simnpo": (0.125, 1.0, "nll", False),
    }
    assert npo.__kwdefaults__ == {"beta": 0.1}
    assert simnpo.__kwdefaults__ == {"beta": 4.5, "delta": 0.0}
    changed = replace(METHODS["npo"], forget=partial(npo, beta=1.0))
    reference = sums(LOGP, COUNTS)
    assert float(changed.forget(LOGP, COUNTS, reference)) == pytest.approx(2 * math.log(2))
