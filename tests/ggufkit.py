"""GGUF files of tiny models, written by the rules of llama.cpp's converter and not by the package's own code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor, nn

# What transformers does not read from the file has to be at its default in the tiny model.
SETTINGS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen2_moe": {"moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632},
    "qwen3": {"head_dim": 128},
    "qwen3_moe": {"moe_intermediate_size": 768},
    "gemma2": {},
    "gemma3_text": {},
    "phi3": {"vocab_size": 32001},  # its padding token is number 32000
    "starcoder2": {},
    "stablelm": {},
    "gpt2": {"n_inner": 128, "n_positions": 1024},
}
ARCH = {
    "mistral": "llama",
    "gemma3_text": "gemma3",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
    "mixtral": "llama",
}


def write(path: Path, model: nn.Module, kind: str = "F32", *, name: str = "tiny", **values: Any) -> Path:
    """Write a model as GGUF: matrices in one type, vectors in F32, as the converter does."""
    config: Any = model.config
    arch = ARCH.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_name(name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(getattr(config, "intermediate_size", None) or config.n_inner)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(getattr(config, "num_key_value_heads", config.num_attention_heads))
    writer.add_vocab_size(config.vocab_size)
    writer.add_token_list([f"t{i}" for i in range(config.vocab_size)])
    writer.add_tokenizer_model("none")
    if epsilon := getattr(config, "rms_norm_eps", None):
        writer.add_layer_norm_rms_eps(epsilon)
    else:
        writer.add_layer_norm_eps(1e-5)
    if head := getattr(config, "head_dim", None):
        writer.add_key_length(head)
        writer.add_value_length(head)
        writer.add_rope_dimension_count(head)
    if rope := getattr(config, "rope_parameters", None):
        writer.add_rope_freq_base(rope.get("rope_theta", 10000.0))
    if experts := getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None):
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    for key, value in values.items():
        writer.add_uint32(key, value)
    for tensor, data in tensors(model, arch).items():
        kind_here = gguf.GGMLQuantizationType[kind if data.ndim > 1 else "F32"]
        array = data.float().contiguous().numpy()
        writer.add_tensor(tensor, gguf.quantize(array, kind_here), raw_dtype=kind_here)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tensors(model: nn.Module, arch: str) -> dict[str, Tensor]:
    """Return what the converter makes of a model's parameters."""
    config: Any = model.config
    names = gguf.get_tensor_name_map(
        next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == arch), config.num_hidden_layers
    )
    made: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        data = parameter.detach()
        if name.endswith("experts.gate_up_proj"):  # [expert, gate then up, in] to two tensors
            gate, up = data.chunk(2, dim=1)
            stem = name.removesuffix("gate_up_proj")
            made[names.get_name(f"{stem}gate_proj") + ".weight"] = gate
            made[names.get_name(f"{stem}up_proj") + ".weight"] = up
            continue
        if name.endswith("experts.down_proj"):
            made[names.get_name(name) + ".weight"] = data
            continue
        stem, _, leaf = name.rpartition(".")
        if arch == "llama" and stem.endswith((".q_proj", ".k_proj")):
            data = permuted(
                data, config.num_attention_heads if "q_proj" in stem else config.num_key_value_heads
            )
        if arch.startswith("gemma") and name.endswith("norm.weight"):
            data = data + 1
        if arch == "gpt2" and name.endswith(("attn.c_attn.weight", "c_proj.weight", "c_fc.weight")):
            data = data.T
        if name.endswith("shared_expert_gate.weight"):
            data = data.squeeze(0)
        made[f"{names.get_name(stem)}.{leaf}"] = data
    return made


def permuted(weights: Tensor, heads: int) -> Tensor:
    """Reorder rows as the converter does: row i of the first half of a head, then row i of the second half."""
    rows = weights.shape[0] // heads
    order = [
        h * rows + i + half * rows // 2 for h in range(heads) for i in range(rows // 2) for half in (0, 1)
    ]
    return weights[torch.tensor(order)]


def contents(path: Path) -> dict[str, tuple[str, bytes]]:
    """Return type and bytes of every tensor, read with the package `gguf`."""
    reader = gguf.GGUFReader(path)
    return {t.name: (t.tensor_type.name, np.ascontiguousarray(t.data).tobytes()) for t in reader.tensors}


def metadata(path: Path) -> dict[str, Any]:
    return {k: f.contents() for k, f in gguf.GGUFReader(path).fields.items() if not k.startswith("GGUF.")}


def load(path: Path) -> nn.Module:
    """Return what plain transformers makes of a GGUF file, in float32 and eager attention."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()
