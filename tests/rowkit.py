"""What the conformance tests of the rows share: cases, expectations written down by hand, runs and comparisons."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import pytest
import torch
from tiny import CONFIGS, reading, tiny, tiny_inputs
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from repe_unlearn import architectures
from repe_unlearn.architectures import FAMILIES, Architecture, Experts, Kind, Layout, Read, Write


@dataclass(frozen=True)
class Case:
    """One sort of model that a row describes: a family, with settings or a stack where that makes a difference."""

    model_type: str
    changes: Mapping[str, object] = field(default_factory=dict)
    stack: Literal["encoder", "decoder"] | None = None
    label: str = ""

    def __str__(self) -> str:
        return f"{self.model_type}-{self.label}" if self.label else self.model_type

    def model(self, **changes: object) -> nn.Module:
        return tiny(self.model_type, **{**self.changes, **changes})  # type: ignore[arg-type]

    def arch(self, model: nn.Module) -> Architecture:
        return Architecture.of(model, stack=self.stack)


CASES = {
    str(case): case
    for case in (
        *(Case(name) for name in CONFIGS),
        Case("gpt_neox", {"use_parallel_residual": False}, label="serial"),
        Case("falcon", {"parallel_attn": False}, label="serial"),
        Case("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}, label="two-norms"),
        Case("stablelm", {"use_parallel_residual": True}, label="parallel"),
        Case("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 16}, label="350m"),
        Case("deepseek_v3", {"q_lora_rank": None}, label="plain-queries"),
        Case("qwen2_moe", {"mlp_only_layers": [0]}, label="mixed"),
        Case("qwen3_moe", {"mlp_only_layers": [0]}, label="mixed"),
        Case("qwen3_next", {"mlp_only_layers": [0, 1]}, label="mixed"),
        Case("t5", {"feed_forward_proj": "gated-gelu"}, "encoder", "gated"),
        Case("t5", {}, "decoder", "decoder"),
        Case("t5", {"feed_forward_proj": "gated-gelu"}, "decoder", "gated-decoder"),
    )
}

# Where an eraser's constant has a bias slot, written down by hand from the families' own configs and modules.
_FOUR: frozenset[Kind] = frozenset(("attn_in", "mlp_in", "attn_out", "mlp_out"))
SLOTS: dict[str, frozenset[Kind]] = {
    **dict.fromkeys(CASES, frozenset()),
    **dict.fromkeys(
        ("llama", "granite", "starcoder2", "gpt2", "gpt_neox", "gpt_neox-serial", "opt", "opt-350m", "bloom"),
        _FOUR,
    ),
    **dict.fromkeys(
        ("falcon-serial", "falcon-two-norms", "bert", "roberta", "xlm-roberta", "distilbert"), _FOUR
    ),
    **dict.fromkeys(
        (
            "qwen2",
            "gemma2",
            "gemma3_text",
            "olmo2",
            "olmo3",
            "glm4",
            "stablelm",
            "qwen2_moe",
            "qwen2_moe-mixed",
            "glm4_moe",
        ),
        frozenset({"attn_in"}),
    ),
    "gpt_oss": _FOUR,  # its experts have biases and are averaged
    **dict.fromkeys(
        ("qwen3", "gemma", "qwen3_moe", "qwen3_moe-mixed", "olmoe", "deepseek_v3", "llama4_text"),
        frozenset({"attn_in", "attn_out"}),
    ),
    "cohere": frozenset({"attn_out"}),
    "deepseek_v3-plain-queries": frozenset({"attn_out"}),
    "falcon": _FOUR - {"mlp_in"},
    "phi": _FOUR - {"mlp_in"} | {"final"},
    "gptj": frozenset({"mlp_out", "final"}),
    "vit": _FOUR | {"final"},
}
# Kinds that a family does not have, besides cross-attention.
ABSENT: dict[str, frozenset[Kind]] = {
    **dict.fromkeys(("phi", "gptj", "cohere", "falcon", "stablelm-parallel"), frozenset({"mlp_in"})),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "distilbert", "opt-350m"), frozenset({"final"})),
}
MOE = tuple(
    name
    for name in CASES
    if name.startswith(
        (
            "mixtral",
            "qwen2_moe",
            "qwen3_moe",
            "qwen3_next",
            "olmoe",
            "glm4_moe",
            "deepseek",
            "gpt_oss",
            "llama4",
        )
    )
)
POST_NORM = {"gemma2", "gemma3_text", "gemma3", "olmo2", "olmo3", "exaone4", "glm4"}
# The norms that follow the two sums of a block with LayerNorms on the stream.
POST_LAYERNORM = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta"), ("attention.output.LayerNorm", "output.LayerNorm")),
    "distilbert": ("sa_layer_norm", "output_layer_norm"),
    "opt-350m": ("self_attn_layer_norm", "final_layer_norm"),
}


def bakes(name: str, kind: Kind) -> str:
    """Return by what rule a kind of site bakes in all layers of a case, or "" if it does not."""
    if kind in ("resid_pre", "resid_post"):
        return ""
    if name.startswith("t5") and kind == "final":
        return ""
    return "erasure-exact" if name in POST_NORM and kind in ("attn_out", "mlp_out") else "exact"


def stream_class(name: str, *, affine: bool = False) -> str:
    """Return how one map of the whole stream bakes, with or without a constant."""
    if name in POST_LAYERNORM:
        return "impossible"
    if name.startswith("t5") or (name == "gemma3" and affine):
        return "hook only"
    return "erasure-exact" if name in POST_NORM or name == "bloom" else "exact"


def baked_kinds() -> list[tuple[str, Kind]]:
    """Return every case with every kind that bakes exactly."""
    return [
        (name, kind)
        for name, case in CASES.items()
        for kind in case.arch(case.model()).kinds
        if bakes(name, kind) == "exact"
    ]


class float64_throughout(TorchFunctionMode):
    """In float64 models, routers and norms that compute in float32 do not: rounding hides nothing."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def widened(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        chosen = torch.Tensor.double if func is torch.Tensor.float else func
        return chosen(*map(widened, args), **{k: widened(v) for k, v in (kwargs or {}).items()})


@torch.no_grad()
def outputs(case: Case, model: nn.Module, *, seed: int = 7) -> dict[str, Tensor]:
    """Logits and the residual stream after every block, read with plain hooks."""
    blocks = case.arch(model).sites("resid_post")
    wide = next(model.parameters()).dtype == torch.float64
    with reading(model, blocks) as seen, float64_throughout() if wide else nullcontext():
        logits = model(**tiny_inputs(case.model_type, seed=seed)).logits
    return {"logits": logits, **{str(site): seen[site] for site in blocks}}


def gap(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Largest difference between two runs, relative to the size of each tensor."""
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max() / a[name].abs().max()) for name in a)


@contextmanager
def patched_row(monkeypatch: pytest.MonkeyPatch, model_type: str, **changes: object) -> Iterator[None]:
    """Change fields of a family's rows."""
    with monkeypatch.context() as m:
        table = tuple(replace(f, **changes) if model_type in f.model_types else f for f in FAMILIES)
        m.setattr(architectures, "FAMILIES", table)
        yield


@contextmanager
def patched_part(
    monkeypatch: pytest.MonkeyPatch, case: Case, kind: Kind, part: Read | Write
) -> Iterator[None]:
    """Give a case's row another part, wherever a layout has the part of the first block."""
    arch = case.arch(case.model())
    family = arch.family
    if kind == "final":
        changed = replace(family, final=part)
    else:
        layouts = (
            replace(layout, **{kind: part}) if layout.part(kind) == arch.layouts[0].part(kind) else layout
            for layout in family.layouts
        )
        changed = replace(family, layouts=tuple(layouts))
    with monkeypatch.context() as m:
        m.setattr(architectures, "FAMILIES", tuple(changed if f == family else f for f in FAMILIES))
        yield


def weights(layout: Layout, kind: Kind) -> tuple[str | Experts, ...]:
    """Return the readers or writers of a kind."""
    part = layout.part(kind)
    assert isinstance(part, Read | Write)
    return part.readers if isinstance(part, Read) else part.writers
