"""One Newton step and Fisher dampening: against dense matrices and plain loops."""

from __future__ import annotations

import math

import pytest
import torch
from textkit import text_model
from tiny import assert_same, hook_count, snapshot
from torch import Tensor, nn
from trainkit import FORGET, RETAIN, TOKENIZER, knowing

from repe_unlearn import train
from repe_unlearn.errors import InputError, NonFiniteError, NotEnoughDataError
from repe_unlearn.patch import Patch
from repe_unlearn.train.curvature import woodbury
from repe_unlearn.train.kfac import kronecker_solve

NORM = "model.norm.weight"


def sample_nll(model: nn.Module, sample: train.Sample, name: str, value: Tensor) -> tuple[Tensor, int]:
    """The summed NLL of a completion in plain torch, with another value for one parameter; how many tokens count."""
    ids = torch.tensor([TOKENIZER(sample.text).input_ids])
    n = len(TOKENIZER(sample.text).input_ids) - len(TOKENIZER(sample.prompt).input_ids)
    logits = torch.func.functional_call(model, {name: value}, (), {"input_ids": ids, "use_cache": False})[
        "logits"
    ]
    logp = logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    return -logp[-n:].sum(), n


def gradients(model: nn.Module, samples: list[train.Sample], name: str) -> tuple[Tensor, int]:
    """The gradient of each sample's summed NLL, flat rows, and how many tokens count in all."""
    weight = model.get_parameter(name).detach()
    rows = [
        torch.func.grad(lambda w, s=s: sample_nll(model, s, name, w)[0])(weight).flatten() for s in samples
    ]
    return torch.stack(rows), sum(sample_nll(model, s, name, weight)[1] for s in samples)


def influence(model: nn.Module, **options: object) -> Patch:
    settings = {"parameters": NORM, "progress": False, **options}
    return train.influence(model, TOKENIZER, FORGET, RETAIN, **settings)  # type: ignore[arg-type]


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.cosine_similarity(a.flatten(), b.flatten(), dim=0))


def mean_nll(model: nn.Module, samples: list[train.Sample]) -> float:
    name = NORM
    pairs = [sample_nll(model, s, name, model.get_parameter(name)) for s in samples]
    return sum(float(loss) for loss, _ in pairs) / sum(n for _, n in pairs)


def test_woodbury_is_the_dense_solution() -> None:
    rows, g = torch.randn(5, 40, dtype=torch.float64), torch.randn(40, dtype=torch.float64)
    dense = torch.linalg.solve(rows.T @ rows + 0.3 * torch.eye(40, dtype=torch.float64), g)
    assert torch.allclose(woodbury(rows, g, 0.3), dense, atol=1e-12)
    assert not torch.allclose(woodbury(rows, g, 0.31), dense, atol=1e-3)


def test_woodbury_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, g = torch.randn(5, 40), torch.randn(40, dtype=torch.float64)
    whole = woodbury(rows, g, 0.3)
    monkeypatch.setattr("repe_unlearn.train.curvature._COLUMNS", 7)
    assert torch.allclose(woodbury(rows, g, 0.3), whole, atol=1e-12)


def test_kronecker_solve_is_the_dense_solution() -> None:
    a, b, g = (torch.randn(*shape, dtype=torch.float64) for shape in ((4, 4), (3, 3), (3, 4)))
    a, b = a @ a.T, b @ b.T
    dense = torch.linalg.solve(
        torch.kron(b, a) + 0.2 * torch.eye(12, dtype=torch.float64), g.flatten()
    )  # rows of X one after the other: vec(B X A) = (B kron A) vec(X)
    assert torch.allclose(kronecker_solve(a, b, g, 0.2).flatten(), dense, atol=1e-10)
    assert not torch.allclose(kronecker_solve(a.T @ a, b, g, 0.2).flatten(), dense, atol=1e-3)


@pytest.mark.parametrize("name", [NORM, "model.layers.1.mlp.down_proj.weight"])
def test_the_step_is_that_of_the_dense_fisher_matrix(name: str) -> None:
    model = text_model()
    before = snapshot(model)
    edit = influence(model, parameters=[name], labels="data", step=0.5).edits[name]
    rows, n = gradients(model, RETAIN, name)
    forget, n_forget = gradients(model, FORGET, name)
    fisher, g = rows.T @ rows / n, forget.sum(0) / n_forget
    ridge = 0.1 * fisher.trace() / len(RETAIN)
    wanted = 0.5 * torch.linalg.solve(fisher + ridge * torch.eye(len(g), dtype=torch.float64), g)
    assert torch.allclose(edit.left.flatten(), wanted, rtol=1e-8, atol=1e-10)
    assert_same(before, model)


def test_labels_of_the_model_give_the_hessian() -> None:
    """Logits are linear in the last norm's gain: there the Gauss-Newton matrix is the Hessian itself."""
    model = text_model()
    weight = model.get_parameter(NORM).detach()
    _, n = gradients(model, RETAIN, NORM)
    hessian = torch.func.hessian(
        lambda w: torch.stack([sample_nll(model, s, NORM, w)[0] for s in RETAIN]).sum() / n
    )(weight)
    forget, n_forget = gradients(model, FORGET, NORM)
    g = forget.sum(0) / n_forget

    def step(ridge: Tensor) -> Tensor:
        return torch.linalg.solve(hessian + ridge * torch.eye(32, dtype=torch.float64), g)

    draws = 100
    sampled = influence(model, labels="model", draws=draws, damping=4.0)
    # The damping is relative to the trace of the sampled matrix, which is close to that of the Hessian.
    exact = step(4.0 * hessian.trace() / (draws * len(RETAIN)))
    assert cosine(sampled.edits[NORM].left, exact) > 0.96
    assert (
        cosine(influence(model, labels="data", damping=0.04).edits[NORM].left, exact) < 0.9
    )  # another matrix
    assert cosine(g, exact) < 0.9  # no matrix at all


def test_the_gain_is_the_rise_of_the_forget_loss() -> None:
    model = text_model()
    before = mean_nll(model, FORGET)
    for gain in (1e-3, 2e-3):
        patch = influence(model, gain=gain)
        patch.apply_(model)
        assert mean_nll(model, FORGET) - before == pytest.approx(gain, rel=0.05)
        patch.revert_(model)


def test_the_prediction_on_retain_texts_moves_less_than_along_the_plain_gradient() -> None:
    model = text_model()
    name = "model.layers.1.mlp.down_proj.weight"
    texts = [(torch.tensor([TOKENIZER(s.text).input_ids]), len(s.completion)) for s in RETAIN]

    def predictions() -> list[Tensor]:  # of the completions: one token per byte
        return [model(ids).logits[0, -n - 1 : -1].log_softmax(-1) for ids, n in texts]

    before = predictions()

    def harm(**options: object) -> float:
        patch = influence(model, parameters=[name], gain=0.01, **options)
        patch.apply_(model)
        now = predictions()
        patch.revert_(model)
        return sum(float((b.exp() * (b - a)).sum()) for b, a in zip(before, now, strict=True))

    plain = harm(damping=1e9)  # the matrix is then a multiple of the identity
    assert harm(damping=0.01, draws=8) < 0.7 * plain
    assert harm(damping=0.01, draws=8, curvature="kfac") < 0.9 * plain


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_kfac_is_exact_for_one_sample_of_one_position(family: str) -> None:
    model = text_model(family)
    (name,) = train.mlp_writers(model, [1])
    one = train.from_texts(["k"])  # <s> and one letter: one position, one token that counts

    def edit(curvature: str, retain: list[train.Sample]) -> Tensor:
        patch = train.influence(
            model,
            TOKENIZER,
            FORGET,
            retain,
            parameters=[name],
            curvature=curvature,  # type: ignore[arg-type]
            labels="data",
            step=1.0,
            progress=False,
        )
        return patch.edits[name].left

    assert torch.allclose(edit("kfac", one), edit("samples", one), rtol=1e-6, atol=1e-9)
    longer = train.from_texts(["klm"])
    assert not torch.allclose(edit("kfac", longer), edit("samples", longer), rtol=1e-2)
    assert hook_count(model) == 0


def test_one_seed_one_step() -> None:
    model = text_model()
    first, again, other = (influence(model, seed=seed).edits[NORM].left for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"damping": 0.0}, "got damping=0.0"),
        ({"gain": -1.0}, "got gain=-1.0"),
        ({"step": math.inf}, "got step=inf"),
        ({"draws": 0}, "got draws=0"),
        ({"labels": "truth"}, "got labels='truth'"),
        ({"curvature": "dense"}, "curvature='dense'"),
        ({"curvature": "kfac"}, "no weight of a linear layer"),
    ],
)
def test_unusable_settings_are_refused(options: dict, said: str) -> None:
    with pytest.raises(InputError, match=said):
        influence(text_model(), **options)


def test_no_samples_and_no_gradient_are_refused() -> None:
    model = text_model()
    with pytest.raises(NotEnoughDataError):
        train.influence(model, TOKENIZER, FORGET, [], parameters=NORM, progress=False)
    model.lm_head.weight.zero_()
    with pytest.raises(NonFiniteError, match=r"add up to 0\.0"):
        influence(model)


def dampening(model: nn.Module, **options: object) -> Patch:
    settings = {"alpha": 2.0, "parameters": [NORM], "progress": False, **options}
    return train.fisher_dampening(model, TOKENIZER, FORGET, RETAIN, **settings)  # type: ignore[arg-type]


def test_fisher_dampening_is_the_published_rule() -> None:
    model = text_model()
    before = snapshot(model)

    def importance(samples: list[train.Sample]) -> Tensor:
        rows = gradients(model, samples, NORM)[0]
        counts = [sample_nll(model, s, NORM, model.get_parameter(NORM))[1] for s in samples]
        return (rows / torch.tensor(counts)[:, None]).square().mean(0)

    weight, f, r = model.get_parameter(NORM), importance(FORGET), importance(RETAIN)
    wanted = torch.where(f > 2 * r, weight * (r / f).clamp(max=1), weight)
    patch = dampening(model)
    assert torch.allclose(patch.edits[NORM].apply(weight), wanted, atol=1e-10)
    share = float((f > 2 * r).double().mean())
    assert 0 < share < 1
    assert float(patch.provenance["dampened"]) == pytest.approx(share)
    gentle = dampening(model, bound=1.9).edits[NORM]
    assert torch.allclose(
        gentle.apply(weight), torch.where(f > 2 * r, weight * (1.9 * r / f).clamp(max=1), weight)
    )
    assert gentle.norm() < patch.edits[NORM].norm()
    assert_same(before, model)


def test_fisher_dampening_forgets_more_than_it_harms() -> None:
    model = knowing()
    forget, retain = mean_nll(model, FORGET), mean_nll(model, RETAIN)
    patch = dampening(model, alpha=3.0, parameters="mlp")
    patch.apply_(model)
    rise, harm = mean_nll(model, FORGET) - forget, mean_nll(model, RETAIN) - retain
    patch.revert_(model)
    assert rise > 0.5
    assert harm < 0.5 * rise


def test_fisher_dampening_refuses_to_do_nothing() -> None:
    with pytest.raises(InputError, match="lower alpha"):
        dampening(text_model(), alpha=1e9)
    with pytest.raises(InputError, match="got alpha=0"):
        dampening(text_model(), alpha=0)
