"""Tiny models of every family, built from config with random non-unit norms and non-zero biases.

Default initialisation (gains of 1, biases of 0, weights of 0.02) hides half of all baking bugs.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from repe_unlearn.eraser import Eraser
from repe_unlearn.fingerprints import fingerprint
from repe_unlearn.plan import ErasurePlan
from repe_unlearn.sites import Site

D, LAYERS, VOCAB = 32, 3, 97

_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": D,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {**_COMMON, "num_key_value_heads": 2}
_GPT2 = {
    "vocab_size": VOCAB,
    "n_embd": D,
    "n_layer": LAYERS,
    "n_head": 4,
    "n_inner": 48,
    "n_positions": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_BLOOM = {
    "vocab_size": VOCAB,
    "hidden_size": D,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GEMMA3 = {**_GROUPED, "head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8}
_OLMO3 = {
    **_GROUPED,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"] + ["sliding_attention"] * (LAYERS - 2),
}
_MOE = {**_GROUPED, "num_experts_per_tok": 2}

# What each family needs beyond the common sizes; one entry per row of the architecture table.
CONFIGS: dict[str, dict] = {
    "llama": {**_GROUPED, "attention_bias": False, "mlp_bias": False},
    "mistral": {**_GROUPED, "sliding_window": 8},
    "qwen2": _GROUPED,
    "qwen3": {**_GROUPED, "head_dim": 8},
    "gemma": {**_GROUPED, "head_dim": 8},
    "gemma2": _GEMMA3,
    "gemma3_text": _GEMMA3,
    "olmo2": _GROUPED,
    "olmo3": _OLMO3,
    "exaone4": {**_OLMO3, "sliding_window_pattern": 2},
    "glm4": {**_GROUPED, "head_dim": 8},
    "phi3": _GROUPED,
    "granite": {
        **_GROUPED,
        "residual_multiplier": 0.3,
        "embedding_multiplier": 3.0,
        "logits_scaling": 2.0,
        "attention_multiplier": 0.4,
    },
    "cohere": _GROUPED,
    "stablelm": _GROUPED,
    "starcoder2": {**_GROUPED, "sliding_window": 8},
    "phi": _GROUPED,
    "mixtral": {**_MOE, "num_local_experts": 4},
    "qwen2_moe": {
        **_MOE,
        "num_experts": 4,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
    },
    "qwen3_moe": {**_MOE, "num_experts": 4, "moe_intermediate_size": 24, "head_dim": 8},
    "olmoe": {**_MOE, "num_experts": 4, "clip_qkv": 1.0},
    "glm4_moe": {
        **_MOE,
        "n_routed_experts": 4,
        "moe_intermediate_size": 24,
        "head_dim": 8,
        "use_qk_norm": True,
    },
    "qwen3_next": {
        **_MOE,
        "num_experts": 4,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
        "head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"] + ["linear_attention"] * (LAYERS - 2),
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
    },
    "deepseek_v3": {
        **_MOE,
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "moe_intermediate_size": 24,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 12,
        "kv_lora_rank": 12,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
    },
    # Width of the experts as that of the model, as in the published ones: a wrong axis must not show by its shape.
    "gpt_oss": {**_MOE, "num_local_experts": 4, "head_dim": 8, "sliding_window": 8, "intermediate_size": D},
    "llama4_text": {
        **_GROUPED,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "intermediate_size_mlp": 40,
        "interleave_moe_layer_step": 2,
        "head_dim": 8,
        "attention_chunk_size": 8,
    },
    "gpt2": _GPT2,
    "gptj": {**_GPT2, "rotary_dim": 4, "tie_word_embeddings": False},
    "gpt_neox": _COMMON,
    "opt": {**_COMMON, "ffn_dim": 48, "word_embed_proj_dim": D},
    "bloom": _BLOOM,
    "falcon": _BLOOM,
    "bert": _COMMON,
    "roberta": _COMMON,
    "xlm-roberta": _COMMON,
    "distilbert": {
        "vocab_size": VOCAB,
        "dim": D,
        "n_layers": LAYERS,
        "n_heads": 4,
        "hidden_dim": 48,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
    },
    "t5": {
        "vocab_size": VOCAB,
        "d_model": D,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": LAYERS,
        "num_heads": 4,
        "pad_token_id": 0,
        "eos_token_id": 2,
        "decoder_start_token_id": 0,
    },
    "vit": {
        "hidden_size": D,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "image_size": 8,
        "patch_size": 4,
        "num_labels": 5,
    },
    "gemma3": {
        "text_config": {**_GEMMA3, "model_type": "gemma3_text"},
        "vision_config": {
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 16,
            "image_size": 8,
            "patch_size": 4,
        },
        "mm_tokens_per_image": 4,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "boi_token_index": 93,
        "eoi_token_index": 94,
        "image_token_index": 95,
    },
}

# The transformers class to make a family with, where that is not the one for causal language models.
HEADS = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "distilbert"), "AutoModelForMaskedLM"),
    "t5": "AutoModelForSeq2SeqLM",
    "vit": "AutoModelForImageClassification",
    "gemma3": "AutoModelForImageTextToText",
}
# Families that continue a text, and those that read one at all.
DECODERS = tuple(sorted(set(CONFIGS) - set(HEADS)))
TEXT = tuple(sorted(set(CONFIGS) - {"vit"}))


def tiny(
    model_type: str,
    *,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    head: str | None = None,
    **changes: object,
) -> nn.Module:
    """Return a model of one family with random weights of unit scale, in eval mode.

    Args:
        model_type: the family.
        dtype: of the weights.
        seed: of the weights.
        head: name of the transformers class, e.g. AutoModel; default the family's usual one.
        changes: to the tiny config.
    """
    settings = repr(sorted(changes.items()))
    key = (model_type, dtype, seed, head or HEADS.get(model_type, "AutoModelForCausalLM"), settings)
    if key not in _MADE:
        _MADE[key] = _make(model_type, dtype, seed, key[3], changes)
    return copy.deepcopy(_MADE[key])  # tests edit their models


_MADE: dict[tuple, nn.Module] = {}


def _make(model_type: str, dtype: torch.dtype, seed: int, head: str, changes: dict[str, object]) -> nn.Module:
    import transformers

    config = transformers.AutoConfig.for_model(
        model_type, **copy.deepcopy({**CONFIGS[model_type], **changes})
    )
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"  # the others know no float64
    made = getattr(transformers, head)
    model = made.from_config(config) if head.startswith("Auto") else made(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim == 1 and name.endswith("weight"):  # norms: gains around 1 (Gemma: around 0)
                p.copy_(0.3 * noise + (0.0 if model_type.startswith("gemma") else 1.0))
            elif p.ndim == 1:
                p.copy_(0.5 * noise)
            else:
                p.copy_(noise / p.shape[-1] ** 0.5)
    return model.eval().requires_grad_(False).to(dtype)


def tiny_inputs(model_type: str, *, dtype: torch.dtype = torch.float64, seed: int = 7) -> dict[str, Tensor]:
    """Return the keyword arguments of one forward pass: two rows of random ids, random images, or both."""
    if model_type == "vit":
        generator = torch.Generator().manual_seed(seed)
        return {"pixel_values": torch.randn(2, 3, 8, 8, generator=generator).to(dtype)}
    inputs = {"input_ids": token_ids(seed=seed, vocab=90)}
    if model_type == "gemma3":  # an image of four tokens in every text
        inputs["input_ids"][:, 2:6] = CONFIGS["gemma3"]["image_token_index"]
        return {**inputs, **tiny_inputs("vit", dtype=dtype, seed=seed)}
    return {**inputs, "decoder_input_ids": token_ids(2, 5, seed=seed + 1)} if model_type == "t5" else inputs


def token_ids(rows: int = 2, width: int = 9, *, seed: int = 7, vocab: int = VOCAB) -> Tensor:
    """Return random ids [rows, width] without the three special ones."""
    return torch.randint(3, vocab, (rows, width), generator=torch.Generator().manual_seed(seed))


def oblique(rank: int = 2, *, d: int = D, affine: bool = True, seed: int = 0) -> Eraser:
    """Return a random idempotent eraser that is neither orthogonal nor aligned with any axis."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(d, rank, generator=generator, dtype=torch.float64)
    near = left.T + 0.5 * torch.randn(rank, d, generator=generator, dtype=torch.float64)
    shift = torch.randn(d, generator=generator, dtype=torch.float64)
    return Eraser(left, torch.linalg.solve(near @ left, near), shift if affine else torch.zeros_like(shift))


def random_plan(
    model: nn.Module, sites: Iterable[Site], *, rank: int = 2, affine: bool = True
) -> ErasurePlan:
    """Return a plan with another random eraser at every site."""
    erasers = {site: oblique(rank, affine=affine, seed=i) for i, site in enumerate(sites)}
    return ErasurePlan(erasers, fingerprint(model))


def hook_count(model: nn.Module) -> int:
    """Return the number of forward hooks on a model and all its parts."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@contextmanager
def reading(model: nn.Module, sites: Iterable[Site]) -> Iterator[dict[Site, Tensor]]:
    """Record the tensors at sites with plain torch hooks, independent of the package's own."""
    seen: dict[Site, Tensor] = {}

    def first(site: Site, args: tuple, kwargs: dict, output: object) -> None:
        value = output if site.side == "output" else (args[0] if args else kwargs["hidden_states"])
        # A copy: Falcon adds to what its MLP returned, in place.
        seen[site] = (value[0] if isinstance(value, tuple) else value).clone()

    handles = [
        model.get_submodule(site.path).register_forward_hook(
            lambda _m, args, kwargs, output, site=site: first(site, args, kwargs, output), with_kwargs=True
        )
        for site in sites
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Return everything a patch may change: every parameter's bits and identity, and the config."""
    return {
        "names": [name for name, _ in model.named_parameters(remove_duplicate=False)],
        "identity": [id(p) for _, p in model.named_parameters(remove_duplicate=False)],
        "bits": {name: p.detach().clone() for name, p in model.named_parameters(remove_duplicate=False)},
        "empty": [f"{n}.bias" for n, m in model.named_modules() if m._parameters.get("bias", 0) is None],
        "config": copy.deepcopy(model.config.to_dict()),
        "fingerprint": fingerprint(model),
    }


def assert_same(before: dict[str, Any], model: nn.Module) -> None:
    """Assert that a model is bit for bit what it was at the snapshot."""
    after = snapshot(model)
    for part in ("names", "identity", "empty", "config", "fingerprint"):
        assert before[part] == after[part], part
    for name, bits in before["bits"].items():
        assert torch.equal(bits, after["bits"][name]), name
