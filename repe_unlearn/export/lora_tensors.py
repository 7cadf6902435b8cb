"""What a LoRA adapter holds for every edit of a patch."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from repe_unlearn.errors import InputError, ModelMismatchError, NumericalWarning, UnsupportedModelError
from repe_unlearn.export.expert_names import expert_names, module_name
from repe_unlearn.patch import Edit, Patch

__all__ = ["Factors", "Pair", "factors", "named_tensors", "pairs_of", "refuse_biases", "rounding"]


@dataclass(frozen=True, slots=True, eq=False)
class Pair:
    """What the adapter adds to one weight: `up @ down`.

    Attributes:
        edit: name of the edited parameter that it is part of.
        module: of the weight, as the checkpoint on disk names it.
        target: how `target_modules` names it.
        down: `[r, in]`, LoRA's A.
        up: `[out, r]`, LoRA's B.
        embedding: the module is an embedding, whose tensors have other names.
    """

    edit: str
    module: str
    target: str
    down: Tensor
    up: Tensor
    embedding: bool = False

    @property
    def rank(self) -> int:
        """Rank as it comes, before padding."""
        return self.down.shape[0]


def refuse_biases(patch: Patch) -> None:
    """Raise InputError for a patch that edits or makes biases."""
    biases = sorted({*patch.new_biases, *(name for name in patch.edits if name.endswith("bias"))})
    if biases:
        raise InputError(
            f"the patch edits {len(biases)} biases (first {biases[0]}), and the LoRA layout that all programs read "
            "has none. Bake linear erasers (fit --linear, in Python functools.partial(leace, affine=False)) at sites that are read "
            "(attn_in, mlp_in, final), which leave biases alone, or use export.checkpoint."
        )


@dataclass(frozen=True, slots=True, eq=False)
class Factors:
    """An edit as the product that is written, and the share of its norm that was cut off to get there."""

    left: Tensor
    right: Tensor
    lost: float

    @property
    def rank(self) -> int:
        """Columns of `left`."""
        return self.left.shape[-1]


def factors(name: str, edit: Edit, max_rank: int | None) -> Factors:
    """Return an edit as a product of at most the given rank; experts keep their leading axis.

    Raises:
        InputError: a dense edit without a rank.
    """
    if edit.right is None and max_rank is None:
        raise InputError(
            f"the edit of {name} ({edit.rule}) is dense. Pass max_rank= to write its best low-rank approximation "
            "(the manifest says what is lost), or use export.checkpoint."
        )
    if edit.right is None:
        u, s, v = torch.linalg.svd(edit.left, full_matrices=False)
    elif max_rank is None or edit.right.shape[-2] <= max_rank:
        return Factors(edit.left, edit.right, 0.0)
    else:
        tall, inner_left = torch.linalg.qr(edit.left)
        wide, inner_right = torch.linalg.qr(edit.right.mT)
        u, s, v = torch.linalg.svd(inner_left @ inner_right.mT, full_matrices=False)
        u, v = tall @ u, v @ wide.mT
    lost = float(s[..., max_rank:].norm() / s.norm().clamp_min(torch.finfo(s.dtype).tiny))
    if lost > 1e-6:
        warnings.warn(
            f"cut to rank {max_rank}, the edit of {name} loses {lost:.2g} of its norm; raise max_rank, or use "
            "export.checkpoint, which loses nothing.",
            NumericalWarning,
            stacklevel=3,
        )
    return Factors(u[..., :max_rank] * s[..., None, :max_rank], v[..., :max_rank, :], lost)


def pairs_of(model: nn.Module, patch: Patch, products: Mapping[str, Factors]) -> Iterator[Pair]:
    """Yield what to write for every edit.

    Raises:
        ModelMismatchError: the model lacks an edited weight, or it has another shape.
        UnsupportedModelError: a weight has no LoRA layout that PEFT, vLLM and llama.cpp share.
    """
    experts: dict[str, None] = {}
    for name, product in products.items():
        path, _, leaf = name.rpartition(".")
        weight = _weight(model, name)
        if tuple(weight.shape) != patch.edits[name].shape:
            raise ModelMismatchError(
                f"the edit of {name} is for shape {list(patch.edits[name].shape)}; the model has {list(weight.shape)}."
            )
        if leaf != "weight":
            experts[path] = None
            yield from _expert_pairs(model, name, product, weight)
            continue
        module, home = model.get_submodule(path), module_name(model, path)
        if isinstance(module, nn.Embedding) or type(module).__name__ == "Conv1D":
            yield Pair(name, home, path, product.left.T, product.right.T, isinstance(module, nn.Embedding))
        else:
            yield Pair(name, home, path, product.right, product.left)
    # Readers take an expert's matrices all or none, so the unedited ones come with zeros.
    for path in experts:
        for leaf, weight in model.get_submodule(path).named_parameters(recurse=False):
            if weight.ndim == 3 and f"{path}.{leaf}" not in products:
                nothing = Factors(torch.zeros(weight.shape[1], 1), torch.zeros(1, weight.shape[2]), 0.0)
                yield from _expert_pairs(model, f"{path}.{leaf}", nothing, weight)


def _expert_pairs(model: nn.Module, name: str, product: Factors, weight: Tensor) -> Iterator[Pair]:
    named = expert_names(model, name, weight.shape[0]) if weight.ndim == 3 else []
    if not named:
        raise UnsupportedModelError(
            f"{name} lies in the checkpoint as one tensor that is no module's weight, and there is no LoRA layout for "
            "such that PEFT, vLLM and llama.cpp share. Bake the attention sites only, or use export.checkpoint."
        )
    # A factor without a leading axis is shared by all experts.
    left, right = (side.expand(len(named), *side.shape[-2:]) for side in (product.left, product.right))
    for e, modules in enumerate(named):
        for module, rows in zip(modules, left[e].chunk(len(modules)), strict=True):
            yield Pair(name, module, module.rpartition(".")[2], right[e], rows)


def _weight(model: nn.Module, name: str) -> Tensor:
    try:
        return model.get_parameter(name)
    except AttributeError:
        raise ModelMismatchError(
            f"the patch edits {name}, which {type(model).__name__} does not have; it was made for another model."
        ) from None


def rounding(pairs: Iterable[Pair], dtype: torch.dtype) -> dict[str, float]:
    """Return how far every edit as written is from the edit, as a share of its norm."""
    wrong: dict[str, float] = {}
    total: dict[str, float] = {}
    for pair in pairs:
        down, up = pair.down.to(dtype).double(), pair.up.to(dtype).double()
        # up·down - up₀·down₀ as one product of small terms: the difference of the products would cancel
        left = torch.cat([up - pair.up, pair.up], dim=1)
        right = torch.cat([down, down - pair.down])
        for sums, edit in ((wrong, Edit(left, right, "rounding")), (total, Edit(pair.up, pair.down, "edit"))):
            sums[pair.edit] = sums.get(pair.edit, 0.0) + edit.norm() ** 2
    return {name: (wrong[name] / total[name]) ** 0.5 if total[name] else 0.0 for name in wrong}


def named_tensors(pairs: Iterable[Pair], rank: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the tensors of the adapter file by name, all padded with zeros to one rank."""
    tensors: dict[str, Tensor] = {}
    for pair in pairs:
        down = nn.functional.pad(pair.down, (0, 0, 0, rank - pair.rank)).to(dtype)
        up = nn.functional.pad(pair.up, (0, rank - pair.rank)).to(dtype)
        kind = (
            ("lora_embedding_A", "lora_embedding_B") if pair.embedding else ("lora_A.weight", "lora_B.weight")
        )
        for name, tensor in zip(kind, (down, up), strict=True):
            tensors[f"base_model.model.{pair.module}.{name}"] = tensor
    return tensors
