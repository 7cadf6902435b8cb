"""What the model benchmarks run on: a model chosen on the command line, and real prompts of mixed length."""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from repe_unlearn import Contrast, load
from repe_unlearn.activations import BATCH_TOKENS
from repe_unlearn.audit.neutral import NEUTRAL
from repe_unlearn.builtin import gender, tense

# Random weights in published shapes; a speed depends on the shape only.
_SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 32, "num_hidden_layers": 3, "intermediate_size": 48, "num_attention_heads": 4},
    "8b": {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
    },
}


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options that all share."""
    result = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--shape", choices=("smollm2", *_SHAPES), default="smollm2")
    result.add_argument("--layers", type=int, help="blocks of a random model, default those of its shape")
    result.add_argument("--device", default="cpu")
    result.add_argument("--dtype", default="float32")
    result.add_argument("--prompts", type=int, default=200)
    result.add_argument("--batch-tokens", type=int, default=BATCH_TOKENS, help="16384 on a GPU")
    result.add_argument("--rounds", type=int, default=5)
    return result


def subject(args: argparse.Namespace) -> tuple[Any, Any]:
    """Return the model, in eval mode on its device, and a tokenizer for it."""
    if args.shape == "smollm2":
        loaded = load(dtype=args.dtype, device=args.device, progress=False)
        return loaded.model, loaded.tokenizer
    from transformers import AutoModelForCausalLM, LlamaConfig

    sys.path.insert(0, str(Path(__file__).parents[1]))
    from textkit import BOS, EOS, PAD, VOCAB, text_tokenizer

    shape = {**_SHAPES[args.shape], **({"num_hidden_layers": args.layers} if args.layers else {})}
    ids = {"vocab_size": VOCAB, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
    settings: dict[str, Any] = {**shape, **ids, "num_key_value_heads": shape["num_attention_heads"] // 4}
    config = LlamaConfig(**settings)
    torch.manual_seed(0)  # two of them are the same model
    with torch.device(args.device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, args.dtype))
    return model.eval().requires_grad_(False), text_tokenizer()


def mixed(prompts: int) -> Contrast:
    """Return prompts of both built-in contrasts and sentences of neutral passages, shuffled, of 6 to 70 words."""
    quarter = max(1, prompts // 5)
    texts = [*gender(pairs=quarter).texts, *tense(pairs=min(quarter, 4096)).texts]
    count = 0
    while len(texts) < prompts:
        passage = NEUTRAL[count % len(NEUTRAL)]
        words = passage.split()
        texts.append(" ".join(words[: 6 + (7 * count) % max(1, len(words) - 5)]))
        count += 1
    random.Random(0).shuffle(texts)
    texts = texts[:prompts]
    return Contrast.from_labels(
        texts, [i % 2 for i in range(len(texts))], classes=("a", "b"), name="benchmark"
    )


def waited(run: Callable[[], object], device: str) -> Callable[[], None]:
    """Return the same with a wait for the GPU at its end."""

    def both() -> None:
        run()
        if device != "cpu":
            torch.cuda.synchronize()

    return both


def seconds(run: Callable[[], object], rounds: int) -> float:
    """Return the median time after one run that does not count."""
    found = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return sorted(found[1:])[rounds // 2]
