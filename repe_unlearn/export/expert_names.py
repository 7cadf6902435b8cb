"""How adapters name what a model holds otherwise: experts one by one, modules by older names.

All of it comes from the mapping by which transformers loads checkpoints, not from our rows: this is the mapping that
PEFT undoes, and a name that PEFT cannot undo is a part of the edit that it drops.
"""

from __future__ import annotations

from torch import nn

__all__ = ["expert_names", "module_name"]

# A stack [expert, out, in] of matrices that may lie one below the other: rows and experts can be told apart again.
_PLAIN = {"MergeModulelist", "Concatenate"}


def expert_names(model: nn.Module, name: str, count: int) -> list[list[str]]:
    """Return for every expert the modules whose weights, one below the other, are its slice of a stacked parameter.

    Empty where checkpoints hold the stack in one piece.

    Args:
        model: a transformers model.
        name: of the stacked parameter `[count, out, in]`.
        count: of experts.

    Example:
        `expert_names(mixtral, "model.layers.0.mlp.experts.gate_up_proj", 8)[3]` is
        `["model.layers.0.block_sparse_moe.experts.3.w1", "model.layers.0.block_sparse_moe.experts.3.w3"]`.
    """
    for entry in _mapping(model):
        target = entry.target_patterns[0].lstrip(".")
        if not name.endswith(f".{target}") or len(entry.target_patterns) > 1:
            continue
        operations = {type(operation).__name__ for operation in getattr(entry, "operations", ())}
        if "MergeModulelist" in operations and operations <= _PLAIN:
            base = module_name(model, name.removesuffix(target))
            parts = [source.lstrip(".").removesuffix(".weight") for source in entry.source_patterns]
            return [[base + part.replace("*", str(e)) for part in parts] for e in range(count)]
    return []


def module_name(model: nn.Module, path: str) -> str:
    """Return the name on disk of a module, where a plain part of it was renamed; else the same."""
    for entry in _mapping(model):
        source, target = entry.source_patterns[0], entry.target_patterns[0]
        if type(entry).__name__ == "WeightRenaming" and source.startswith(".") and "*" not in source:
            path = path.replace(target, source)
    return path


def _mapping(model: nn.Module) -> list:
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    return get_checkpoint_conversion_mapping(getattr(model.config, "model_type", "")) or []
