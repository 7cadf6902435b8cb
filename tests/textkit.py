"""Text for tiny models: a byte-level tokenizer with special tokens, contrasts, models of its vocabulary."""

from __future__ import annotations

import itertools

import torch
from folders import byte_tokenizer
from tiny import tiny
from torch import nn
from transformers import PreTrainedTokenizerFast

from repe_unlearn.contrast import Contrast

BOS, EOS, PAD, VOCAB = 256, 257, 258, 260


def text_tokenizer(side: str = "right") -> PreTrainedTokenizerFast:
    """Return the byte tokenizer with <s> put in front of every text, and a pad token of its own."""
    from tokenizers import processors

    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.padding_side = side
    tokenizer.backend_tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)]),
        ]
    )
    return tokenizer


def text_model(
    model_type: str = "llama", *, dtype: torch.dtype = torch.float64, **changes: object
) -> nn.Module:
    """Return a tiny random model that takes this tokenizer's ids."""
    ids = {"vocab_size": VOCAB, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
    return tiny(model_type, dtype=dtype, **{**ids, **changes})


def pairs(n: int = 48) -> Contrast:
    """Return n minimal pairs (he / she) of different lengths."""
    frames = itertools.product(
        ("the cook", "a guard", "my old friend", "Kim", "that nurse", "the new clerk"),
        ("said", "knew well", "wrote"),
        ("was late", "ran", "may go home"),
    )
    texts = [
        tuple(f"{who} {verb} {pronoun} {rest}" for pronoun in ("he", "she"))
        for who, verb, rest in itertools.islice(frames, n)
    ]
    return Contrast.from_pairs(texts, ("male", "female"), name="gender")
