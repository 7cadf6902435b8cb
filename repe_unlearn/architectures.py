"""Architectures as data: one frozen row per model family; the conformance suite proves every row.

To add a family, add a row to ``FAMILIES`` and run ``pytest tests/conformance -k <model_type>``. No other code
changes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import nn

from .errors import InputError, UnsupportedArchitectureError, UnsupportedModelError
from .sites import Side, Site

Kind = Literal["attn_in", "mlp_in", "attn_out", "mlp_out", "resid_pre", "resid_post", "final"]

KINDS: tuple[Kind, ...] = ("attn_in", "mlp_in", "attn_out", "mlp_out", "resid_pre", "resid_post", "final")


@dataclass(frozen=True, slots=True)
class Read:
    """A tensor that modules of a block read, and all modules that read it.

    Attributes:
        path: module of the site, relative to the block (to the model for ``final``).
        readers: every linear module that consumes the tensor, same base. Baking edits all of them or none.
        side: of the site's module.
    """

    path: str
    readers: tuple[str, ...]
    side: Side = "output"


@dataclass(frozen=True, slots=True)
class Write:
    """What one sublayer adds to the residual stream.

    Attributes:
        path: module of the site, relative to the block; its output is what the stream receives.
        writer: the linear module whose output that is, before ``norm`` if there is one.
        norm: the RMS norm between writer and stream in post-norm families, else None.
    """

    path: str
    writer: str
    norm: str | None = None


@dataclass(frozen=True, slots=True)
class Family:
    """One row: where a model family keeps its blocks, what reads and what writes the residual stream.

    Attributes:
        model_types: values of ``config.model_type``.
        blocks: path of the list of blocks.
        attn_in, mlp_in: what attention and MLP read.
        attn_out, mlp_out: what they write.
        final: what the language-model head reads.
        embeddings: modules that write the stream before the first block.
        bias_switches: config key -> modules of every block that have a bias exactly when the key is true.
            This is where a missing bias can be made in a way that plain transformers loads.
        transposed: weights are stored [in, out] (Conv1D) instead of [out, in].
        norm_offset: what is added to a norm's weight before use (Gemma stores gain - 1).
    """

    model_types: tuple[str, ...]
    blocks: str
    attn_in: Read
    mlp_in: Read
    attn_out: Write
    mlp_out: Write
    final: Read
    embeddings: tuple[str, ...]
    bias_switches: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    transposed: bool = False
    norm_offset: float = 0.0


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATED = ("mlp.gate_proj", "mlp.up_proj")
_ATTENTION_BIAS = {"attention_bias": (*_QKV, "self_attn.o_proj")}


def _llama_like(
    *model_types: str,
    mlp_norm: str = "post_attention_layernorm",
    attn_out: Write | None = None,
    mlp_out: Write | None = None,
    bias_switches: Mapping[str, tuple[str, ...]] | None = None,
    norm_offset: float = 0.0,
) -> Family:
    """Return the row that most decoders share, with what a family does differently."""
    return Family(
        model_types=model_types,
        blocks="model.layers",
        attn_in=Read("input_layernorm", _QKV),
        mlp_in=Read(mlp_norm, _GATED),
        attn_out=attn_out or Write("self_attn.o_proj", "self_attn.o_proj"),
        mlp_out=mlp_out or Write("mlp.down_proj", "mlp.down_proj"),
        final=Read("model.norm", ("lm_head",)),
        embeddings=("model.embed_tokens",),
        bias_switches=bias_switches or {},
        norm_offset=norm_offset,
    )


FAMILIES: tuple[Family, ...] = (
    _llama_like("llama", bias_switches={**_ATTENTION_BIAS, "mlp_bias": (*_GATED, "mlp.down_proj")}),
    _llama_like("mistral"),
    _llama_like("qwen2"),  # q, k, v always have a bias
    _llama_like("qwen3", bias_switches=_ATTENTION_BIAS),
    _llama_like(
        "gemma2",
        mlp_norm="pre_feedforward_layernorm",
        attn_out=Write("post_attention_layernorm", "self_attn.o_proj", norm="post_attention_layernorm"),
        mlp_out=Write("post_feedforward_layernorm", "mlp.down_proj", norm="post_feedforward_layernorm"),
        bias_switches=_ATTENTION_BIAS,
        norm_offset=1.0,
    ),
    Family(
        model_types=("olmo2",),
        blocks="model.layers",
        # No pre-norms: attention and MLP read the stream itself, so the site is the sublayer's own input.
        attn_in=Read("self_attn", _QKV, side="input"),
        mlp_in=Read("mlp", _GATED, side="input"),
        attn_out=Write("post_attention_layernorm", "self_attn.o_proj", norm="post_attention_layernorm"),
        mlp_out=Write("post_feedforward_layernorm", "mlp.down_proj", norm="post_feedforward_layernorm"),
        final=Read("model.norm", ("lm_head",)),
        embeddings=("model.embed_tokens",),
        bias_switches=_ATTENTION_BIAS,
    ),
    Family(
        model_types=("gpt2",),
        blocks="transformer.h",
        attn_in=Read("ln_1", ("attn.c_attn",)),
        mlp_in=Read("ln_2", ("mlp.c_fc",)),
        attn_out=Write("attn.c_proj", "attn.c_proj"),
        mlp_out=Write("mlp.c_proj", "mlp.c_proj"),
        final=Read("transformer.ln_f", ("lm_head",)),
        embeddings=("transformer.wte", "transformer.wpe"),
        transposed=True,
    ),
    Family(
        model_types=("gpt_neox",),
        blocks="gpt_neox.layers",
        attn_in=Read("input_layernorm", ("attention.query_key_value",)),
        mlp_in=Read("post_attention_layernorm", ("mlp.dense_h_to_4h",)),
        attn_out=Write("attention.dense", "attention.dense"),
        mlp_out=Write("mlp.dense_4h_to_h", "mlp.dense_4h_to_h"),
        final=Read("gpt_neox.final_layer_norm", ("lm_head",)),
        embeddings=("gpt_neox.embed_in",),
        bias_switches={"attention_bias": ("attention.query_key_value", "attention.dense")},
    ),
)


def supported() -> tuple[str, ...]:
    """Return the supported values of ``config.model_type``, sorted."""
    return tuple(sorted(name for family in FAMILIES for name in family.model_types))


@dataclass(frozen=True, slots=True)
class Architecture:
    """A family's row bound to the number of blocks of one model.

    Example:
        ``Architecture.of(model).sites("attn_in", layers=range(4))``
    """

    family: Family
    model_type: str
    n_layers: int

    @classmethod
    def of(cls, model: nn.Module) -> Architecture:
        """Return the architecture of a model.

        Raises:
            UnsupportedArchitectureError: its family has no row.
            UnsupportedModelError: the family is known, but the model has no such blocks (e.g. loaded without
                its head).
        """
        model_type = getattr(getattr(model, "config", None), "model_type", None)
        family = next((row for row in FAMILIES if model_type in row.model_types), None)
        if family is None:
            raise UnsupportedArchitectureError(
                f"got {type(model).__name__} with model_type {model_type!r}; supported: "
                f"{', '.join(supported())}. To add a family, add a row to FAMILIES in "
                "repe_unlearn/architectures.py and run pytest tests/conformance. Hooks need no row: "
                "name sites yourself, Site('path.of.module')."
            )
        try:
            blocks = model.get_submodule(family.blocks)
        except AttributeError:
            raise UnsupportedModelError(
                f"got {type(model).__name__}, which has no {family.blocks!r}; load the whole "
                "model, e.g. AutoModelForCausalLM."
            ) from None
        assert isinstance(blocks, nn.ModuleList)
        return cls(family, str(model_type), len(blocks))

    def block(self, layer: int) -> str:
        """Return the path of one block."""
        return f"{self.family.blocks}.{layer}"

    def sites(self, *kinds: Kind, layers: Iterable[int] | None = None) -> tuple[Site, ...]:
        """Return the sites of the given kinds, layer by layer; ``final`` comes last.

        Args:
            kinds: ``attn_in`` and ``mlp_in``: what attention and MLP read (their norm's output); ``attn_out``
                and ``mlp_out``: what they add to the stream; ``resid_pre`` and ``resid_post``: the stream
                before and after a block; ``final``: what the language-model head reads.
            layers: block numbers, negative ones count from the end; default all.

        Raises:
            InputError: no kind, an unknown kind or a layer that does not exist.
        """
        unknown = [kind for kind in kinds if kind not in KINDS]
        if unknown or not kinds:
            raise InputError(f"got site kinds {list(kinds)}; needed some of {', '.join(KINDS)}.")
        chosen = range(self.n_layers) if layers is None else [self._layer(i) for i in layers]
        per_block: list[Kind] = [kind for kind in KINDS if kind != "final" and kind in kinds]
        sites = [self._site(kind, layer) for layer in chosen for kind in per_block]
        return (*sites, *([Site(self.family.final.path)] if "final" in kinds else []))

    def _layer(self, index: int) -> int:
        if not -self.n_layers <= index < self.n_layers:
            raise InputError(f"got layer {index}; this model has layers 0 to {self.n_layers - 1}.")
        return index % self.n_layers

    def _site(self, kind: Kind, layer: int) -> Site:
        block = self.block(layer)
        if kind == "resid_pre":
            return Site(block, "input")
        if kind == "resid_post":
            return Site(block)
        part = getattr(self.family, kind)
        return Site(f"{block}.{part.path}", part.side if isinstance(part, Read) else "output")

    def locate(self, site: Site) -> tuple[Kind, int] | None:
        """Return the kind and layer of a site (``n_layers`` for ``final``), or None if it is none of ours."""
        if site == Site(self.family.final.path):
            return "final", self.n_layers
        head, _, rest = site.path.removeprefix(f"{self.family.blocks}.").partition(".")
        if not site.path.startswith(f"{self.family.blocks}.") or not head.isdecimal():
            return None
        layer = int(head)
        if not rest:
            return ("resid_pre" if site.side == "input" else "resid_post"), layer
        in_block: tuple[Kind, ...] = ("attn_in", "mlp_in", "attn_out", "mlp_out")
        return next(((kind, layer) for kind in in_block if self._site(kind, layer) == site), None)
