"""Whole model folders on disk for tests: a tiny Llama with a byte-level tokenizer."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """256 byte tokens, then <s> and </s>; any text round-trips."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(letters)} | {"<s>": 256, "</s>": 257}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    return tokenizer


def tiny_llama(*, seed: int = 0, dtype: torch.dtype = torch.float32, tied: bool = False) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.3 if parameter.dim() == 1 else 1.0
            parameter.copy_(
                scale * torch.randn(parameter.shape, generator=generator) + float(parameter.dim() == 1)
            )
    return model.eval().requires_grad_(False).to(dtype)


def save(folder: Path, model: LlamaForCausalLM | None = None, *, shard: str | None = None) -> Path:
    """Write model and tokenizer to `folder`, in shards of at most `shard` (such as "20KB") when given."""
    options = {} if shard is None else {"max_shard_size": shard}
    (model or tiny_llama()).save_pretrained(folder, **options)
    byte_tokenizer().save_pretrained(folder)
    return folder
