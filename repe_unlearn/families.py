"""Model families as data: one frozen row each; the conformance suite proves every row.

To add a family, add a row to ``FAMILIES`` and a tiny config to ``tests/tiny.py``, then run
``pytest tests/conformance -k <model_type>``. No other code changes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

from .errors import InputError
from .sites import Side

Kind = Literal[
    "attn_in",
    "cross_in",
    "mlp_in",
    "attn_out",
    "cross_out",
    "mlp_out",
    "resid_pre",
    "resid_post",
    "final",
]

IN_BLOCK: tuple[Kind, ...] = ("attn_in", "cross_in", "mlp_in", "attn_out", "cross_out", "mlp_out")
"""The kinds that a layout describes."""
KINDS: tuple[Kind, ...] = (*IN_BLOCK, "resid_pre", "resid_post", "final")


@dataclass(frozen=True, slots=True)
class Experts:
    """The weights of all experts of a block, stacked in one parameter.

    Attributes:
        path: of the parameter, relative to the block.
        axes: what its three axes are, in order: ``e``xpert, ``i``n, ``o``ut. Written down, never guessed from
            shapes: in and out are often of one size.
        bias: path of the stacked bias [expert, out], if there is one.
        disk: paths of the modules that checkpoints hold instead, one set per expert ``{e}``: equal slices along out,
            in order. Empty where checkpoints hold the stack.
    """

    path: str
    axes: Literal["eoi", "eio"]
    bias: str | None = None
    disk: tuple[str, ...] = ()


Weight: TypeAlias = str | Experts
"""A module with a ``weight`` [out, in], or stacked experts."""


@dataclass(frozen=True, slots=True)
class Read:
    """A tensor that modules of a block read, and all modules that read it.

    Attributes:
        path: module of the site, relative to the block (to the model for ``final``).
        readers: every weight that consumes the tensor, same base. Baking edits all of them or none.
        side: of the site's module.
        hook_only: why no edit of the readers equals the hook, where that is so.
    """

    path: str
    readers: tuple[Weight, ...]
    side: Side = "output"
    hook_only: str = ""


@dataclass(frozen=True, slots=True)
class Write:
    """What one sublayer adds to the residual stream.

    Attributes:
        path: module of the site, relative to the block; its output is what the stream receives.
        writers: the weights whose output that is, before ``norm`` if there is one.
        norm: the RMS norm between writers and stream in post-norm families, else None.
        convex: the output is an average of experts, with weights that sum to 1: a constant in all of their biases is
            a constant in the output.
    """

    path: str
    writers: tuple[Weight, ...]
    norm: str | None = None
    convex: bool = False


@dataclass(frozen=True, slots=True)
class Absent:
    """A kind of site that a family does not have.

    Attributes:
        reason: why, and which kind to ask for instead.
    """

    reason: str


_NO_CROSS = Absent("there is no cross-attention")


@dataclass(frozen=True, slots=True)
class Layout:
    """What reads and what writes the residual stream in one sort of block.

    Attributes:
        attn_in, mlp_in: what attention and MLP read.
        attn_out, mlp_out: what they write.
        cross_in, cross_out: the same of cross-attention (its queries; its keys and values come from the encoder).
        name: tells the layouts of one family apart.
    """

    attn_in: Read | Absent
    mlp_in: Read | Absent
    attn_out: Write | Absent
    mlp_out: Write | Absent
    cross_in: Read | Absent = _NO_CROSS
    cross_out: Write | Absent = _NO_CROSS
    name: str = ""

    def part(self, kind: Kind) -> Read | Write | Absent:
        """Return the part of one of the kinds ``IN_BLOCK``."""
        return getattr(self, kind)

    def experts(self) -> Iterator[Experts]:
        """Yield the stacked experts of a block."""
        for kind in IN_BLOCK:
            part = self.part(kind)
            if not isinstance(part, Absent):
                weights = part.readers if isinstance(part, Read) else part.writers
                yield from (weight for weight in weights if isinstance(weight, Experts))

    def paths(self) -> Iterator[str]:
        """Yield every module and parameter of a block that the layout names."""
        for kind in IN_BLOCK:
            part = self.part(kind)
            if isinstance(part, Absent):
                continue
            yield part.path
            for weight in part.readers if isinstance(part, Read) else part.writers:
                yield weight if isinstance(weight, str) else weight.path
                if isinstance(weight, Experts) and weight.bias is not None:
                    yield weight.bias
            if isinstance(part, Write) and part.norm is not None:
                yield part.norm


@dataclass(frozen=True, slots=True)
class Family:
    """One row: where a model family keeps its blocks, what reads and what writes the residual stream.

    Paths are those of the model with its head. Without a head (``AutoModel``) the first component of a path,
    e.g. ``model.`` or ``bert.``, is missing; that is allowed for.

    Attributes:
        model_types: values of ``config.model_type``.
        blocks: path of the list of blocks.
        layouts: what a block may look like; a block has the first one whose modules it holds.
        final: what the head reads.
        embeddings: modules and parameters that write the stream before the first block; the first one adds to every
            position once.
        embedding_norm: a norm between those and the first block.
        embedding_scale: factor on the embeddings: an attribute of the first embedding, else a config key.
        embedding_hook_only: why no edit of the embeddings equals a hook before the first block, where that is so.
        embedding_linear_only: why that is so for erasers with a constant: the first embedding does not add to every position.
        bias_switches: config key -> modules of every block that have a bias exactly when the key is true.
            This is where a missing bias can be made in a way that plain transformers loads.
        transposed: weights in blocks are stored [in, out] (Conv1D) instead of [out, in].
        norm_offset: what is added to a norm's weight before use (Gemma stores gain - 1).
        residual_scale: config key of a factor on all that the sublayers write.
        post_layernorm: each sublayer's sum with its input goes through a LayerNorm (BERT): the stream is not the
            sum of the writes.
        stack: ``encoder`` or ``decoder`` in models that have both.
        entry: the submodule to run when only this stack is wanted.
        when: config values that the row is for.
        disk: components of names -> those that checkpoints hold instead.
    """

    model_types: tuple[str, ...]
    blocks: str
    layouts: tuple[Layout, ...]
    final: Read | Absent
    embeddings: tuple[str, ...]
    embedding_norm: str | None = None
    embedding_scale: str | None = None
    embedding_hook_only: str = ""
    embedding_linear_only: str = ""
    bias_switches: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    transposed: bool = False
    norm_offset: float = 0.0
    residual_scale: str | None = None
    post_layernorm: bool = False
    stack: Literal["encoder", "decoder"] | None = None
    entry: str = ""
    when: Mapping[str, object] = field(default_factory=dict)
    disk: Mapping[str, str] = field(default_factory=dict)


def _write(path: str) -> Write:
    """Return a sublayer that ends in one linear module."""
    return Write(path, (path,))


def _post_norm(norm: str, writer: str) -> Write:
    return Write(norm, (writer,), norm)


def _shared(norm: str) -> Absent:
    return Absent(f"attention and MLP read one tensor, the output of {norm}: ask for attn_in, which is both")


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATED = ("mlp.gate_proj", "mlp.up_proj")
_ATTENTION_BIAS = {"attention_bias": (*_QKV, "self_attn.o_proj")}
_MLP_BIAS = {"mlp_bias": (*_GATED, "mlp.down_proj")}

# The block that most decoders share; the rows below say what is different.
_LLAMA = Layout(
    attn_in=Read("input_layernorm", _QKV),
    mlp_in=Read("post_attention_layernorm", _GATED),
    attn_out=_write("self_attn.o_proj"),
    mlp_out=_write("mlp.down_proj"),
)
_GEMMA2 = replace(
    _LLAMA,
    mlp_in=Read("pre_feedforward_layernorm", _GATED),
    attn_out=_post_norm("post_attention_layernorm", "self_attn.o_proj"),
    mlp_out=_post_norm("post_feedforward_layernorm", "mlp.down_proj"),
)
# No norm before a sublayer: it reads the stream itself, so the site is the sublayer's own input.
_OLMO2 = replace(
    _GEMMA2,
    attn_in=Read("self_attn", _QKV, side="input"),
    mlp_in=Read("mlp", _GATED, side="input"),
)
_PARALLEL = replace(
    _LLAMA,
    attn_in=Read("input_layernorm", (*_QKV, *_GATED)),
    mlp_in=_shared("input_layernorm"),
)


def _experts(
    router: str,
    *shared: str,
    mlp: str = "mlp",
    axes: Literal["eoi", "eio"] = "eoi",
    bias: bool = False,
    down: tuple[str, ...] = (),
    disk: tuple[str, str, str] | None = ("gate_proj", "up_proj", "down_proj"),
) -> Layout:
    """Return the block of a mixture of experts.

    Args:
        router: what chooses the experts, relative to ``mlp`` as everything here.
        shared: the other weights that read what the experts read.
        mlp: the module that holds them; the stream receives its output.
        axes: of the stacked experts.
        bias: the experts have biases, and their outputs are averaged.
        down: writers beside the experts.
        disk: names of the modules of an expert in checkpoints; None where those hold the stacks.
    """
    apart = tuple(f"{mlp}.experts.{{e}}.{name}" for name in disk or ())
    up, out = (
        Experts(f"{mlp}.experts.{name}", axes, f"{mlp}.experts.{name}_bias" if bias else None, parts)
        for name, parts in (("gate_up_proj", apart[:2]), ("down_proj", apart[2:]))
    )
    beside = tuple(f"{mlp}.{name}" for name in (router, *shared))
    return replace(
        _LLAMA,
        mlp_in=Read("post_attention_layernorm", (*beside, up)),
        mlp_out=Write(mlp, (out, *(f"{mlp}.{name}" for name in down)), convex=bias and not down),
        name="mixture of experts",
    )


_DENSE = replace(_LLAMA, name="dense")
_SHARED_EXPERT = ("shared_expert.gate_proj", "shared_expert.up_proj")
_SHARED_EXPERTS = ("shared_experts.gate_proj", "shared_experts.up_proj")


def _latent(layout: Layout, query: str, rank: str) -> Layout:
    """Return a layout whose attention goes through latent keys and values (DeepSeek)."""
    readers = (f"self_attn.{query}", "self_attn.kv_a_proj_with_mqa")
    return replace(layout, attn_in=Read("input_layernorm", readers), name=f"{layout.name}, {rank}")


def _delta_net(layout: Layout) -> Layout:
    """Return a layout whose attention is a gated delta net (Qwen3-Next)."""
    readers = ("linear_attn.in_proj_qkvz", "linear_attn.in_proj_ba")
    return replace(
        layout,
        attn_in=Read("input_layernorm", readers),
        attn_out=_write("linear_attn.out_proj"),
        name=f"{layout.name}, linear attention",
    )


def _softmax(layout: Layout) -> Layout:
    """Return a layout as it is, told apart from those of ``_delta_net`` by its name."""
    return replace(layout, name=f"{layout.name}, softmax attention")


def _decoder(*model_types: str, layouts: tuple[Layout, ...] = (_LLAMA,)) -> Family:
    """Return a row with the names outside the blocks that most decoders share."""
    return Family(
        model_types=model_types,
        blocks="model.layers",
        layouts=layouts,
        final=Read("model.norm", ("lm_head",)),
        embeddings=("model.embed_tokens",),
    )


def _bert_like(root: str, *model_types: str) -> Family:
    """Return the row of BERT and its relatives, which keep it under another name."""
    return Family(
        model_types=model_types,
        blocks=f"{root}.encoder.layer",
        layouts=(
            Layout(
                attn_in=Read(
                    "attention.self",
                    ("attention.self.query", "attention.self.key", "attention.self.value"),
                    side="input",
                ),
                mlp_in=Read("intermediate", ("intermediate.dense",), side="input"),
                attn_out=_write("attention.output.dense"),
                mlp_out=_write("output.dense"),
            ),
        ),
        final=_NO_FINAL,
        embeddings=tuple(
            f"{root}.embeddings.{name}_embeddings" for name in ("word", "position", "token_type")
        ),
        embedding_norm=f"{root}.embeddings.LayerNorm",
        post_layernorm=True,
        when={"add_cross_attention": False},
    )


_NO_FINAL = Absent("there is no norm after the last block: ask for resid_post of the last layer")


def _t5(stack: Literal["encoder", "decoder"], entry: str, final: Read) -> Family:
    mlp = 2 if stack == "decoder" else 1
    attention, cross = "layer.0.SelfAttention", "layer.1.EncDecAttention"
    plain = Layout(
        attn_in=Read("layer.0.layer_norm", tuple(f"{attention}.{name}" for name in "qkv")),
        mlp_in=Read(f"layer.{mlp}.layer_norm", (f"layer.{mlp}.DenseReluDense.wi",)),
        attn_out=_write(f"{attention}.o"),
        mlp_out=_write(f"layer.{mlp}.DenseReluDense.wo"),
        cross_in=Read("layer.1.layer_norm", (f"{cross}.q",)) if stack == "decoder" else _NO_CROSS,
        cross_out=_write(f"{cross}.o") if stack == "decoder" else _NO_CROSS,
        name="plain MLP",
    )
    both = tuple(f"layer.{mlp}.DenseReluDense.{name}" for name in ("wi_0", "wi_1"))
    return Family(
        model_types=("t5",),
        blocks=f"{stack}.block",
        layouts=(plain, replace(plain, mlp_in=Read(f"layer.{mlp}.layer_norm", both), name="gated MLP")),
        final=final,
        embeddings=(f"{stack}.embed_tokens",),
        embedding_hook_only="encoder and decoder share one embedding, and plain T5 cannot be loaded with two",
        stack=stack,
        entry=entry,
    )


_OPT = Family(
    model_types=("opt",),
    blocks="model.decoder.layers",
    layouts=(
        Layout(
            attn_in=Read("self_attn_layer_norm", _QKV),
            mlp_in=Read("final_layer_norm", ("fc1",)),
            attn_out=_write("self_attn.out_proj"),
            mlp_out=_write("fc2"),
        ),
    ),
    final=Read("model.decoder.final_layer_norm", ("lm_head",)),
    embeddings=("model.decoder.embed_tokens", "model.decoder.embed_positions"),
    bias_switches={"enable_bias": (*_QKV, "self_attn.out_proj", "fc1", "fc2")},
    when={"do_layer_norm_before": True},
)

_FALCON_QKV, _FALCON_MLP = "self_attention.query_key_value", "mlp.dense_h_to_4h"
_FALCON = Layout(
    attn_in=Read("input_layernorm", (_FALCON_QKV,)),
    mlp_in=Read("post_attention_layernorm", (_FALCON_MLP,)),
    attn_out=_write("self_attention.dense"),
    mlp_out=_write("mlp.dense_4h_to_h"),
    name="one after the other",
)

_GEMMA = replace(
    _decoder("gemma"),
    bias_switches=_ATTENTION_BIAS,
    norm_offset=1.0,
    embedding_scale="embed_scale",
)
_GEMMA3 = replace(_GEMMA, model_types=("gemma3_text",), layouts=(_GEMMA2,))

FAMILIES: tuple[Family, ...] = (
    replace(_decoder("llama"), bias_switches={**_ATTENTION_BIAS, **_MLP_BIAS}),
    _decoder("mistral"),
    _decoder("qwen2"),  # q, k, v always have a bias
    replace(_decoder("qwen3"), bias_switches=_ATTENTION_BIAS),
    _GEMMA,
    replace(_GEMMA, model_types=("gemma2",), layouts=(_GEMMA2,)),
    _GEMMA3,
    # Its text settings are a config inside the config, where a switch cannot be turned on.
    replace(
        _GEMMA3,
        model_types=("gemma3",),
        blocks="model.language_model.layers",
        final=Read("model.language_model.norm", ("lm_head",)),
        embeddings=(
            "model.language_model.embed_tokens",
            "model.multi_modal_projector.mm_input_projection_weight",
        ),
        bias_switches={},
        entry="model.language_model",
        embedding_linear_only="images enter the stream in place of embeddings, through a projector without a bias",
        disk={
            "model.language_model": "language_model.model",
            "model.vision_tower": "vision_tower",
            "model.multi_modal_projector": "multi_modal_projector",
            "lm_head": "language_model.lm_head",
        },
    ),
    replace(_decoder("olmo2", "olmo3", layouts=(_OLMO2,)), bias_switches=_ATTENTION_BIAS),
    _decoder("exaone4", layouts=(_OLMO2,)),
    replace(
        _decoder(
            "glm4",
            layouts=(
                Layout(
                    attn_in=Read("input_layernorm", _QKV),
                    # In spite of its name this is the norm before the MLP.
                    mlp_in=Read("post_attention_layernorm", ("mlp.gate_up_proj",)),
                    attn_out=_post_norm("post_self_attn_layernorm", "self_attn.o_proj"),
                    mlp_out=_post_norm("post_mlp_layernorm", "mlp.down_proj"),
                ),
            ),
        ),
        bias_switches={"attention_bias": _QKV},
    ),
    _decoder(
        "phi3",
        layouts=(
            replace(
                _LLAMA,
                attn_in=Read("input_layernorm", ("self_attn.qkv_proj",)),
                mlp_in=Read("post_attention_layernorm", ("mlp.gate_up_proj",)),
            ),
        ),
    ),
    replace(
        _decoder("granite"),
        bias_switches={**_ATTENTION_BIAS, **_MLP_BIAS},
        residual_scale="residual_multiplier",
        embedding_scale="embedding_multiplier",
    ),
    replace(_decoder("cohere", layouts=(_PARALLEL,)), bias_switches=_ATTENTION_BIAS),
    replace(
        _decoder(
            "stablelm",
            layouts=(
                replace(_LLAMA, name="one after the other"),
                replace(_PARALLEL, name="in parallel"),
            ),
        ),
        bias_switches={"use_qkv_bias": _QKV},
    ),
    replace(
        _decoder(
            "starcoder2",
            layouts=(
                replace(
                    _LLAMA,
                    mlp_in=Read("post_attention_layernorm", ("mlp.c_fc",)),
                    mlp_out=_write("mlp.c_proj"),
                ),
            ),
        ),
        bias_switches={"use_bias": (*_QKV, "self_attn.o_proj", "mlp.c_fc", "mlp.c_proj")},
    ),
    replace(
        _decoder(
            "phi",
            layouts=(
                Layout(
                    attn_in=Read("input_layernorm", (*_QKV, "mlp.fc1")),
                    mlp_in=_shared("input_layernorm"),
                    attn_out=_write("self_attn.dense"),
                    mlp_out=_write("mlp.fc2"),
                ),
            ),
        ),
        final=Read("model.final_layernorm", ("lm_head",)),
    ),
    replace(
        _decoder("mixtral", layouts=(_experts("gate", disk=("w1", "w3", "w2")),)),
        disk={"mlp": "block_sparse_moe"},
    ),
    replace(
        _decoder(
            "qwen2_moe",
            layouts=(
                _experts("gate", "shared_expert_gate", *_SHARED_EXPERT, down=("shared_expert.down_proj",)),
                _DENSE,
            ),
        ),
        bias_switches={"qkv_bias": _QKV},
    ),
    replace(_decoder("qwen3_moe", layouts=(_experts("gate"), _DENSE)), bias_switches=_ATTENTION_BIAS),
    replace(_decoder("olmoe", layouts=(_experts("gate"),)), bias_switches=_ATTENTION_BIAS),
    replace(
        _decoder(
            "glm4_moe",
            layouts=(_experts("gate", *_SHARED_EXPERTS, down=("shared_experts.down_proj",)), _DENSE),
        ),
        bias_switches={"attention_bias": _QKV},
    ),
    replace(
        _decoder(
            "qwen3_next",
            layouts=tuple(
                attention(layout)
                for layout in (
                    _experts(
                        "gate", "shared_expert_gate", *_SHARED_EXPERT, down=("shared_expert.down_proj",)
                    ),
                    _DENSE,
                )
                for attention in (_delta_net, _softmax)
            ),
        ),
        bias_switches=_ATTENTION_BIAS,
        norm_offset=1.0,
    ),
    replace(
        _decoder(
            "deepseek_v3",
            layouts=tuple(
                _latent(layout, query, rank)
                for layout in (
                    _experts("gate", *_SHARED_EXPERTS, down=("shared_experts.down_proj",)),
                    _DENSE,
                )
                for query, rank in (("q_a_proj", "latent queries"), ("q_proj", "plain queries"))
            ),
        ),
        bias_switches={
            "attention_bias": ("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa", "self_attn.o_proj")
        },
    ),
    replace(
        _decoder("gpt_oss", layouts=(_experts("router", axes="eio", bias=True, disk=None),)),
        bias_switches=_ATTENTION_BIAS,
    ),
    replace(
        _decoder(
            "llama4_text",
            layouts=(
                _experts(
                    "router",
                    *_SHARED_EXPERT,
                    mlp="feed_forward",
                    axes="eio",
                    down=("shared_expert.down_proj",),
                    disk=None,
                ),
                replace(
                    _DENSE,
                    mlp_in=Read(
                        "post_attention_layernorm", ("feed_forward.gate_proj", "feed_forward.up_proj")
                    ),
                    mlp_out=_write("feed_forward.down_proj"),
                ),
            ),
        ),
        bias_switches=_ATTENTION_BIAS,
    ),
    Family(
        model_types=("gpt2",),
        blocks="transformer.h",
        layouts=(
            Layout(
                attn_in=Read("ln_1", ("attn.c_attn",)),
                mlp_in=Read("ln_2", ("mlp.c_fc",)),
                attn_out=_write("attn.c_proj"),
                mlp_out=_write("mlp.c_proj"),
            ),
        ),
        final=Read("transformer.ln_f", ("lm_head",)),
        embeddings=("transformer.wte", "transformer.wpe"),
        transposed=True,
        when={"add_cross_attention": False},
    ),
    Family(
        model_types=("gptj",),
        blocks="transformer.h",
        layouts=(
            Layout(
                attn_in=Read("ln_1", ("attn.q_proj", "attn.k_proj", "attn.v_proj", "mlp.fc_in")),
                mlp_in=_shared("ln_1"),
                attn_out=_write("attn.out_proj"),
                mlp_out=_write("mlp.fc_out"),
            ),
        ),
        final=Read("transformer.ln_f", ("lm_head",)),
        embeddings=("transformer.wte",),
    ),
    Family(
        model_types=("gpt_neox",),
        blocks="gpt_neox.layers",
        layouts=(
            Layout(
                attn_in=Read("input_layernorm", ("attention.query_key_value",)),
                mlp_in=Read("post_attention_layernorm", ("mlp.dense_h_to_4h",)),
                attn_out=_write("attention.dense"),
                mlp_out=_write("mlp.dense_4h_to_h"),
            ),
        ),
        final=Read("gpt_neox.final_layer_norm", ("lm_head",)),
        embeddings=("gpt_neox.embed_in",),
        bias_switches={"attention_bias": ("attention.query_key_value", "attention.dense")},
        disk={"lm_head": "embed_out"},
    ),
    _OPT,
    # OPT-350m, where a LayerNorm follows each sum instead of going before the sublayer.
    replace(
        _OPT,
        layouts=(
            replace(
                _OPT.layouts[0],
                attn_in=Read("self_attn", _QKV, side="input"),
                mlp_in=Read("fc1", ("fc1",), side="input"),
            ),
        ),
        final=_NO_FINAL,
        post_layernorm=True,
        when={"do_layer_norm_before": False},
    ),
    Family(
        model_types=("bloom",),
        blocks="transformer.h",
        layouts=(replace(_FALCON, name=""),),
        final=Read("transformer.ln_f", ("lm_head",)),
        embeddings=("transformer.word_embeddings",),
        embedding_norm="transformer.word_embeddings_layernorm",
        when={"apply_residual_connection_post_layernorm": False},
    ),
    Family(
        model_types=("falcon",),
        blocks="transformer.h",
        layouts=(
            replace(
                _FALCON,
                attn_in=Read("ln_attn", (_FALCON_QKV,)),
                mlp_in=Read("ln_mlp", (_FALCON_MLP,)),
                name="in parallel, two norms",
            ),
            _FALCON,
            replace(
                _FALCON,
                attn_in=Read("input_layernorm", (_FALCON_QKV, _FALCON_MLP)),
                mlp_in=_shared("input_layernorm"),
                name="in parallel, one norm",
            ),
        ),
        final=Read("transformer.ln_f", ("lm_head",)),
        embeddings=("transformer.word_embeddings",),
        bias_switches={"bias": (_FALCON_QKV, "self_attention.dense", _FALCON_MLP, "mlp.dense_4h_to_h")},
    ),
    _bert_like("bert", "bert"),
    _bert_like("roberta", "roberta", "xlm-roberta"),
    Family(
        model_types=("distilbert",),
        blocks="distilbert.transformer.layer",
        layouts=(
            Layout(
                attn_in=Read(
                    "attention", ("attention.q_lin", "attention.k_lin", "attention.v_lin"), side="input"
                ),
                mlp_in=Read("ffn", ("ffn.lin1",), side="input"),
                attn_out=_write("attention.out_lin"),
                mlp_out=_write("ffn.lin2"),
            ),
        ),
        final=_NO_FINAL,
        embeddings=("distilbert.embeddings.word_embeddings", "distilbert.embeddings.position_embeddings"),
        embedding_norm="distilbert.embeddings.LayerNorm",
        post_layernorm=True,
    ),
    _t5(
        "encoder",
        "encoder",
        Read(
            "encoder.final_layer_norm",
            (),
            hook_only="every cross-attention of the decoder reads it, and so may any head",
        ),
    ),
    _t5(
        "decoder",
        "",
        Read(
            "decoder.final_layer_norm",
            ("lm_head",),
            hook_only="an edited head must be untied from the embeddings, and a saved T5 whose head is untied is "
            "loaded without the scale on its output",
        ),
    ),
    Family(
        model_types=("vit",),
        blocks="vit.layers",
        layouts=(
            Layout(
                attn_in=Read("layernorm_before", tuple(f"attention.{name}_proj" for name in "qkv")),
                mlp_in=Read("layernorm_after", ("mlp.fc1",)),
                attn_out=_write("attention.o_proj"),
                mlp_out=_write("mlp.fc2"),
            ),
        ),
        final=Read("vit.layernorm", ("classifier",)),
        embeddings=(
            "vit.embeddings.position_embeddings",
            "vit.embeddings.cls_token",
            "vit.embeddings.patch_embeddings.projection",
        ),
        bias_switches={"qkv_bias": tuple(f"attention.{name}_proj" for name in "qkv")},
        disk={
            "vit.layers": "vit.encoder.layer",
            **{
                f"attention.{name[0]}_proj": f"attention.attention.{name}"
                for name in ("query", "key", "value")
            },
            "attention.o_proj": "attention.output.dense",
            "mlp.fc1": "intermediate.dense",
            "mlp.fc2": "output.dense",
        },
    ),
)

REFUSED: Mapping[str, str] = dict.fromkeys(
    ("mamba", "mamba2", "falcon_mamba", "rwkv"),
    "its blocks have no attention and MLP that read and write the stream",
)
"""Known model types without a row, and why."""


Index: TypeAlias = tuple[int | slice, ...]
"""Cuts a tensor out of a parameter: ``()`` is all of it, ``(3,)`` expert 3, ``(3, slice(0, 9))`` some of its rows."""


def disk_names(model_type: str, name: str, shape: Sequence[int] = ()) -> tuple[tuple[str, Index], ...]:
    """Return the tensors of a checkpoint that hold a parameter, each with the part of the parameter that it is.

    ``checkpoint[name] == parameter[index]`` for every pair, and together they are the whole parameter. Names of
    unknown families, and of what no row names, are those of the parameter.

    Args:
        model_type: of the config.
        name: of the parameter in memory, as ``model.named_parameters()`` has it.
        shape: of the parameter; needed only for stacked experts.

    Raises:
        InputError: stacked experts without a shape that fits.

    Example:
        >>> disk_names("mixtral", "model.layers.0.mlp.experts.gate_up_proj", (1, 6, 4))
        (('model.layers.0.block_sparse_moe.experts.0.w1.weight', (0, slice(0, 3, None))), \
('model.layers.0.block_sparse_moe.experts.0.w3.weight', (0, slice(3, 6, None))))
        >>> disk_names("llama", "model.norm.weight")
        (('model.norm.weight', ()),)
    """
    row = next((row for row in FAMILIES if model_type in row.model_types), None)
    if row is None:
        return ((name, ()),)
    stack = next((e for layout in row.layouts for e in layout.experts() if name.endswith(f".{e.path}")), None)
    if stack is None or not stack.disk:
        return ((_renamed(name, row), ()),)
    parts = len(stack.disk)
    if len(shape) != 3 or shape[1] % parts:
        raise InputError(
            f"got shape {tuple(shape)} for {name}; needed [experts, {parts} x rows, columns], since checkpoints of "
            f"{model_type} hold every expert apart."
        )
    rows = shape[1] // parts
    base = name.removesuffix(stack.path)
    return tuple(
        (
            _renamed(f"{base}{module.format(e=e)}.weight", row),
            (e,) if parts == 1 else (e, slice(part * rows, (part + 1) * rows)),
        )
        for e in range(shape[0])
        for part, module in enumerate(stack.disk)
    )


def _renamed(name: str, row: Family) -> str:
    for old, new in row.disk.items():
        name = f".{name}".replace(f".{old}.", f".{new}.", 1).removeprefix(".")
    return name
