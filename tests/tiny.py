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

# What each family needs beyond the common sizes; one entry per row of the architecture table.
CONFIGS: dict[str, dict] = {
    "llama": {**_GROUPED, "attention_bias": False, "mlp_bias": False},
    "mistral": {**_GROUPED, "sliding_window": 8},
    "qwen2": _GROUPED,
    "qwen3": {**_GROUPED, "head_dim": 8},
    "gemma2": {**_GROUPED, "head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8},
    "olmo2": _GROUPED,
    "gpt2": {
        "vocab_size": VOCAB,
        "n_embd": D,
        "n_layer": LAYERS,
        "n_head": 4,
        "n_inner": 48,
        "n_positions": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "gpt_neox": _COMMON,
}


def tiny(
    model_type: str, *, dtype: torch.dtype = torch.float64, seed: int = 0, **changes: object
) -> nn.Module:
    """Return a causal LM of one family with random weights of unit scale, in eval mode."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(model_type, **{**CONFIGS[model_type], **changes})
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim == 1 and name.endswith("weight"):  # norms: gains around 1 (Gemma: around 0)
                p.copy_(0.3 * noise + (0.0 if model_type == "gemma2" else 1.0))
            elif p.ndim == 1:
                p.copy_(0.5 * noise)
            else:
                p.copy_(noise / p.shape[-1] ** 0.5)
    return model.eval().requires_grad_(False).to(dtype)


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
        seen[site] = value[0] if isinstance(value, tuple) else value

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
