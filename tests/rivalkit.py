"""The published rules of two ablation tools, restated, and what each leaves of a direction in what sublayers write.

Both project a unit vector r out of the weights that write the residual stream. *Row-renormalising rule* (heretic 1.4,
default settings): only weights that are found as ``self_attn.o_proj`` and ``mlp.down_proj`` modules, and afterwards
every output row is scaled back to its old norm. Its re-approximation of that edit by rank 3 is left out: it only adds
error. *Suffix rule* (llm-abliteration): every tensor whose name ends in ``o_proj`` or ``down_proj``; a stacked one is
taken for [expert, out, in]. Neither knows biases or the gain of a norm behind the weight.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from tiny import D, reading, tiny, tiny_inputs
from torch import Tensor, nn

from repe_unlearn.architectures import Architecture
from repe_unlearn.eraser import Eraser
from repe_unlearn.fingerprints import fingerprint
from repe_unlearn.folding import bake
from repe_unlearn.plan import ErasurePlan
from repe_unlearn.sites import Site

Rule = Callable[[nn.Module, Tensor], object]

POST_NORM = ("gemma2", "olmo2")
FUSED = ("mixtral", "qwen3_moe", "gpt_oss")


def row_renormalising(model: nn.Module, r: Tensor) -> None:
    """Project the modules that can be found by attribute; then give every row its old norm."""
    for name, module in model.named_modules():
        if name.endswith(("self_attn.o_proj", "mlp.down_proj")) and isinstance(module, nn.Linear):
            weight = module.weight.data
            new = weight - torch.outer(r, r @ weight)
            weight.copy_(new * (weight.norm(dim=1, keepdim=True) / new.norm(dim=1, keepdim=True)))


def by_suffix(model: nn.Module, r: Tensor) -> None:
    """Project every tensor of the right name along the axis that is the output in most families."""
    for name, parameter in model.named_parameters():
        if name.removesuffix(".weight").endswith(("o_proj", "down_proj")):
            read = torch.einsum("o,...oi->...i", r, parameter.data)
            parameter.data -= torch.einsum("o,...i->...oi", r, read)


def ours(model: nn.Module, r: Tensor) -> None:
    """Bake the projection at every site where a sublayer writes."""
    eraser = Eraser(r[:, None], r[None], torch.zeros_like(r))
    plan = ErasurePlan(dict.fromkeys(writes(model), eraser), fingerprint(model))
    bake(model, plan, allow="erasure-exact").apply_(model)


def writes(model: nn.Module) -> tuple[Site, ...]:
    """Return the sites whose output the residual stream receives."""
    return Architecture.of(model).sites("attn_out", "mlp_out")


def left(model_type: str, rule: Rule, *, dtype: torch.dtype = torch.float64) -> dict[str, float]:
    """Return the component along a random r that a rule leaves, worst layer, for attention and for the MLP.

    Each is the root mean square of r·y over tokens after the rule, over that before it; y is what is written.
    """
    generator = torch.Generator().manual_seed(3)
    r = nn.functional.normalize(torch.randn(D, generator=generator, dtype=torch.float64), dim=0).to(dtype)
    model = tiny(model_type, dtype=dtype)
    before = _components(model, r)
    rule(model, r)
    after = _components(model, r)
    kinds: dict[str, float] = {}
    arch = Architecture.of(model)
    for site, size in before.items():
        located = arch.locate(site)
        assert located is not None
        kinds[located[0]] = max(kinds.get(located[0], 0.0), after[site] / size)
    return kinds


def _components(model: nn.Module, r: Tensor) -> dict[Site, float]:
    inputs = tiny_inputs(model.config.model_type)  # type: ignore[union-attr]
    with reading(model, writes(model)) as seen:
        model(**inputs)
    return {site: float((y @ r).square().mean().sqrt()) for site, y in seen.items()}
