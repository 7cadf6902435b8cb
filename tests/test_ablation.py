"""Ablate the edit: right projections, right directions, and it tells hidden from gone."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from attackkit import ASKED, CHANCE, edited, rmu, share
from knowkit import PLANTED, TOK, TOLD, gold, original, share_left
from textkit import text_model
from tiny import assert_same, hook_count, snapshot, tiny
from torch import Tensor

from repe_unlearn.activations import Rows
from repe_unlearn.answers import Answers, answers
from repe_unlearn.audit import ablation as module
from repe_unlearn.audit.ablation import (
    Ablation,
    ablation,
    ablations,
    difference,
    random_ablations,
    reverted,
)
from repe_unlearn.audit.edits import random_edit, replaced, written
from repe_unlearn.audit.tries import shares, strongest, values
from repe_unlearn.edit import Edit
from repe_unlearn.errors import InputError, ModelMismatchError, NonFiniteError, NotEnoughDataError
from repe_unlearn.facts import Facts
from repe_unlearn.patch import Patch
from repe_unlearn.sites import Site


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_mean_difference_leaves_outliers_out():
    x = torch.cat([rand(20, 3), rand(20, 3, seed=1) + torch.tensor([2.0, 0, 0])]).double()
    z = torch.tensor([0] * 20 + [1] * 20)
    wanted = x[20:].mean(0) - x[:20].mean(0)
    wild = torch.cat([x, torch.tensor([[0.0, 500.0, 0.0]])]).double()
    found = difference(Rows(wild, torch.cat([z, torch.tensor([1])]), torch.arange(41)))
    assert torch.allclose(found[:, 0], wanted / wanted.norm(), atol=1e-12)
    everything = wild[20:].mean(0) - x[:20].mean(0)
    assert abs(float(found[:, 0] @ everything / everything.norm())) < 0.5  # what it would be with the outlier


def test_a_projection_equals_plain_hooks_and_leaves_the_first_position():
    model, u = text_model(), torch.linalg.qr(rand(32, 2))[0]
    site = Site("model.layers.1")

    def hook(_module, _args, output):
        hidden = output if isinstance(output, Tensor) else output[0]
        for row in hidden:
            for position in row[1:]:
                position -= u @ (u.T @ position)
        return output

    handle = model.model.layers[1].register_forward_hook(hook)
    wanted = values(answers(model, TOK, TOLD, "seen", roles=["forget", "decoy"], progress=False))
    handle.remove()
    before = snapshot(model)
    found = ablation(model, TOK, TOLD, which=[Ablation("two", {site: u})], forms=["seen"], progress=False)
    assert found.values == pytest.approx(wanted, abs=1e-9)
    assert_same(before, model)
    assert hook_count(model) == 0
    untouched = values(answers(model, TOK, TOLD, "seen", roles=["forget", "decoy"], progress=False))
    assert max(abs(untouched[i] - wanted[i]) for i in wanted) > 1e-4


def test_beside_the_best_stands_a_random_subspace_of_equal_rank():
    model, site = text_model(), Site("model.layers.1")
    which = [Ablation("two", {site: torch.linalg.qr(rand(32, 2))[0]})]
    found = ablation(model, TOK, TOLD, which=which, forms=["seen"], seed=3, progress=False)
    for key, one in (
        ("share on forgotten facts", which[0]),
        ("a random subspace of equal rank", random_ablations(which, 3)[0]),
    ):
        assert one.at[site].shape == (32, 2)
        alone = ablation(model, TOK, TOLD, which=[one], forms=["seen"], progress=False)
        assert found.facts[key] == f"{alone.of(TOLD, 'forget').mean():.2f}"
    assert "random" not in found.facts["tried"]
    (curve, *_) = found.curves
    assert curve.point_labels == ("two",)


def test_an_error_leaves_no_hook(monkeypatch: pytest.MonkeyPatch):
    model = text_model()

    def stop(*_args, **_options):
        raise KeyboardInterrupt

    which = [Ablation("one", {Site("model.layers.1"): torch.eye(32, 1)})]
    monkeypatch.setattr(module, "answers", stop)
    with pytest.raises(KeyboardInterrupt):
        ablation(model, TOK, TOLD, which=which, progress=False)
    assert hook_count(model) == 0


@pytest.mark.parametrize(
    ("model_type", "name", "turned"),
    [
        ("llama", "model.layers.1.mlp.down_proj.weight", False),
        ("gpt2", "transformer.h.1.mlp.c_proj.weight", True),
        ("mixtral", "model.layers.1.mlp.experts.down_proj", False),
    ],
)
def test_what_is_written_differently_is_found(model_type: str, name: str, turned: bool):
    base = tiny(model_type)
    model = copy.deepcopy(base)
    parameter = model.get_parameter(name)
    u = torch.linalg.qr(rand(32, 2))[0]
    stack, width = parameter.shape[:-2], parameter.shape[-2 if turned else -1]
    v = torch.linalg.qr(rand(width, 2, seed=1))[0]
    change = (u * torch.tensor([5.0, 1.0])) @ v.T
    parameter.data += (change.T if turned else change).expand(*stack, -1, -1)
    (one,) = written(model, base)
    assert one.name == name
    assert one.layer == 1
    assert one.left.shape == (32, 2)  # the change has rank 2
    assert torch.allclose((one.left.T @ u).abs(), torch.eye(2).double(), atol=1e-6)
    weight, old = parameter.detach(), base.get_parameter(name).detach()
    assert torch.allclose(one.without(weight, old, 2), old, atol=1e-9)
    rest = (one.without(weight, old, 1) - old).flatten(0, -3) if stack else one.without(weight, old, 1) - old
    assert torch.allclose(torch.linalg.matrix_norm(rest), torch.tensor(1.0).double(), atol=1e-6)
    assert written(base, base) == ()


def test_other_models_are_refused():
    with pytest.raises(ModelMismatchError, match="two versions"):
        written(text_model(), text_model(intermediate_size=40))
    with pytest.raises(InputError, match="edited weights"):
        reverted(text_model(), TOK, TOLD, base=text_model(), progress=False)
    with pytest.raises(InputError, match="no ablation"):
        ablation(text_model(), TOK, TOLD, which=(), progress=False)
    with pytest.raises(NotEnoughDataError, match="both roles"):
        ablations(text_model(), TOK, TOLD.only("forget", "decoy"), progress=False)
    with pytest.raises(NotEnoughDataError, match="wrong options"):
        ablation(text_model(), TOK, TOLD.only("retain", "decoy"), progress=False)


@pytest.mark.parametrize("rank", [None, 1, 3])
@pytest.mark.parametrize("shape", [(6, 5), (4, 6, 5), (7,)])
def test_a_random_edit_has_the_rank_and_norm_of_the_edit(shape: tuple[int, ...], rank: int | None):
    if len(shape) == 1:
        edit = Edit(rand(7), None, "x")
    elif rank is None:
        edit = Edit(rand(*shape), None, "x")
    else:
        edit = Edit(rand(*shape[:-1], rank), rand(rank, 5, seed=1), "x")
    found = random_edit(Patch({"w": edit}, "print")).edits["w"]
    assert (found.shape, found.rank) == (edit.shape, edit.rank)
    dims = (-2, -1) if len(shape) > 1 else (-1,)
    assert torch.allclose(found.delta().norm(dim=dims), edit.delta().norm(dim=dims))
    same, other = (random_edit(Patch({"w": edit}, "print"), seed).edits["w"] for seed in (0, 1))
    assert torch.equal(found.left, same.left)
    cosine = found.delta().flatten() @ other.delta().flatten() / (found.norm() * other.norm())
    assert abs(float(cosine)) < 0.9


def test_replaced_weights_come_back_and_ties_hold():
    model = text_model(tie_word_embeddings=True)
    before = snapshot(model)
    new = torch.zeros_like(model.model.embed_tokens.weight)

    def interrupted() -> None:
        with replaced(model, {"model.embed_tokens.weight": new}):
            assert not model.lm_head.weight.any()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert_same(before, model)
    assert model.lm_head.weight.any()
    for wrong, error in ((new[:2], InputError), (new.float(), InputError), (new / 0, NonFiniteError)):
        with pytest.raises(error), replaced(model, {"model.embed_tokens.weight": wrong}):
            pass
    assert_same(before, model)


def _simulated(generator: np.random.Generator, gain: float) -> dict[int, Answers]:
    """Twelve tries in a model that knows nothing; the gain is what facts to be forgotten know in the last."""
    rows = [(f"s{i}", f"a{i}", "forget" if i < 16 else "decoy") for i in range(48)]
    facts = Facts.of(rows, ["{subject} is"])
    questions = facts.questions("seen")
    forget = np.arange(48) < 16
    tries = {}
    for k in range(12):
        margin = generator.normal(-1, 2, 48) + gain * (k == 11) * forget
        tries[k] = Answers(facts, questions, margin, margin, margin > 0, margin > 0)
    return tries


def test_a_model_that_never_knew_gains_nothing_by_the_number_of_tries():
    generator = np.random.default_rng(0)

    def gap(one: Answers) -> float:
        return one.mean(shares(one), "forget") - one.mean(shares(one), "decoy")

    ours, greedy = [], []
    for _ in range(400):
        tries = _simulated(generator, 0.0)
        ours.append(gap(tries[strongest(tries)]))
        greedy.append(gap(max(tries.values(), key=lambda one: one.mean(shares(one), "forget"))))
    error = np.std(ours) / np.sqrt(len(ours))
    assert abs(np.mean(ours)) < 3 * error
    assert np.mean(greedy) > 10 * error  # the rule that looks at roles makes a leak of nothing
    chosen = [strongest(_simulated(generator, 4.0)) for _ in range(20)]
    assert chosen.count(11) >= 18  # and what is there is found


@pytest.fixture(scope="module")
def hidden():
    """The model that RMU edited, its ablations, and what the original scores under them."""
    base, tokenizer = original()
    model = edited(rmu())
    which = ablations(model, tokenizer, PLANTED, base=base, progress=False)
    return model, which, ablation(base, tokenizer, PLANTED, which=which, **ASKED)


def test_ablation_brings_back_what_rmu_hid(hidden):
    model, which, whole = hidden
    tokenizer = original()[1]
    assert share(model, "forget") < 0.5  # hidden
    assert whole.of(PLANTED, "forget").mean() > 0.9  # the attack is harmless where nothing is hidden
    before = snapshot(model)
    found = ablation(model, tokenizer, PLANTED, which=which, **ASKED)
    assert_same(before, model)
    assert hook_count(model) == 0
    assert share_left(found, whole) > 0.8
    assert abs(found.of(PLANTED, "decoy").mean() - CHANCE) < 0.06
    assert (found.attack, found.tier, found.unit) == ("ablation", "T1", "share")


def test_the_mean_difference_alone_needs_no_base(hidden):
    model, _, whole = hidden
    found = ablation(model, original()[1], PLANTED, **ASKED)
    assert "mean difference" in found.facts["ablation"]
    won, random = (
        float(found.facts[k]) for k in ("share on forgotten facts", "a random subspace of equal rank")
    )
    assert random < won - 0.2
    assert share_left(found, whole) > share(model, "forget") + 0.1


def test_random_directions_bring_back_little(hidden):
    model, which, whole = hidden
    base, tokenizer = original()
    control = random_ablations(which)
    assert [u.shape for one in control for u in one.at.values()] == [
        u.shape for one in which for u in one.at.values()
    ]
    assert share_left(ablation(model, tokenizer, PLANTED, which=control, **ASKED), whole) < 0.6
    assert ablation(base, tokenizer, PLANTED, which=control, **ASKED).of(PLANTED, "forget").mean() > 0.9


def test_a_model_that_never_knew_shows_nothing(hidden):
    _, which, whole = hidden
    base, tokenizer = original()
    for tried in (which, ablations(gold(), tokenizer, PLANTED, base=base, progress=False)):
        found = ablation(gold(), tokenizer, PLANTED, which=tried, **ASKED)
        assert abs(found.of(PLANTED, "forget").mean() - CHANCE) < 0.06
        assert abs(share_left(found, whole)) < 0.08


def test_subtracting_the_edit_brings_back_the_base(hidden):
    model, _, _ = hidden
    base, tokenizer = original()
    before = snapshot(model)
    found = reverted(model, tokenizer, PLANTED, base=base, ks=(1, 4), **ASKED)
    assert_same(before, model)
    assert found.of(PLANTED, "forget").mean() > share(model, "forget") + 0.2
    assert (found.tier, found.facts["evidence"]) == ("T2", "none: it uses the base")
