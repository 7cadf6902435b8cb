"""After a sequential fit the concept is gone at every hooked site, in every family, wherever the batches wait.

What is left is measured with plain torch hooks, independently of the package's own capture.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from tiny import CONFIGS, LAYERS, D, assert_same, hook_count, reading, snapshot, tiny
from torch import Tensor, nn

from repe_unlearn.activations import capture
from repe_unlearn.architectures import Architecture
from repe_unlearn.hooks import apply
from repe_unlearn.inputs import Inputs
from repe_unlearn.plan import ErasurePlan, solve
from repe_unlearn.sequential import fit_sequential
from repe_unlearn.sites import Site

EXAMPLES, LENGTHS = 24, (9, 7, 6)
# Its attention computes in float32 whatever the dtype of the model; float32 products are not repeatable to the bit.
FLOAT32_INSIDE = ("gptj",)


def data(model_type: str, dtype: torch.dtype) -> list[Inputs]:
    """Return batches of random tokens or images that show their class at one place."""
    generator = torch.Generator().manual_seed(3)
    batches = []
    for length in LENGTHS:
        z = torch.arange(EXAMPLES) % 2
        if model_type == "vit":
            images = torch.randn(EXAMPLES, 3, 8, 8, generator=generator)
            images[:, 0, :4, :4] += z[:, None, None]
            batches.append(Inputs({"pixel_values": images.to(dtype)}, z))
            continue
        ids = torch.randint(5, 90, (EXAMPLES, length), generator=generator)
        ids[:, 2] = 3 + z
        tensors = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if model_type == "t5":
            tensors["decoder_input_ids"] = ids.flip(1)
        batches.append(Inputs(tensors, z))
    return batches


def all_sites(model: nn.Module) -> tuple[Site, ...]:
    """Return every site of every kind of every stack of a model."""
    return tuple(site for arch in Architecture.all_of(model) for site in arch.sites(*arch.kinds))


def gaps(
    model: nn.Module, batches: list[Inputs], sites: tuple[Site, ...], plan: ErasurePlan | None
) -> dict[Site, Tensor]:
    """Return the difference between the two class means at every site, ``[d]``."""
    sums = {site: torch.zeros(2, D, dtype=torch.float64) for site in sites}
    with (
        torch.no_grad(),
        nullcontext() if plan is None else apply(model, plan),
        reading(model, sites) as seen,
    ):
        for batch in batches:
            model(**batch.tensors)
            for site, x in seen.items():
                sums[site].index_add_(0, batch.z, x.reshape(EXAMPLES, -1, D).double().mean(1))
    return {site: (total[1] - total[0]) / (len(batches) * EXAMPLES / 2) for site, total in sums.items()}


def worst(after: dict[Site, Tensor], before: dict[Site, Tensor]) -> float:
    """Return the largest share of a gap that is left at any site."""
    return max(float(after[site].norm() / before[site].norm()) for site in before)


# The stream after one block is the stream before the next: there is nothing left to erase.
@pytest.mark.filterwarnings("ignore:x and z are uncorrelated")
@pytest.mark.parametrize(
    ("model_type", "changes"),
    [*((name, {}) for name in CONFIGS), ("gpt_neox", {"use_parallel_residual": False})],
)
def test_the_concept_is_gone_at_every_site(model_type: str, changes: dict, tmp_path: Path) -> None:
    fine = 1e-6 if model_type in FLOAT32_INSIDE else 1e-9
    for dtype, bound in ((torch.float64, fine), (torch.float32, 1e-5)):
        model, batches = tiny(model_type, dtype=dtype, **changes), data(model_type, dtype)
        sites = all_sites(model)
        assert len(sites) >= 4 * LAYERS
        state = snapshot(model)
        plan = fit_sequential(model, None, batches, sites, select="mean", progress=False)
        assert set(plan.sites) == set(sites)
        before = gaps(model, batches, sites, None)
        assert min(float(gap.norm()) for gap in before.values()) > 1e-3  # control: there was something
        assert worst(gaps(model, batches, sites, plan), before) <= bound
        if dtype == torch.float64:  # control: one fit per site is not enough
            apart = solve(capture(model, None, batches, sites, select="mean", progress=False), model=model)
            assert worst(gaps(model, batches, sites, apart), before) > 1e-5
            continue
        files = fit_sequential(
            model, None, batches, sites, select="mean", memory=0, scratch=tmp_path, progress=False
        )
        assert files.sites == plan.sites
        for site in sites:
            assert all(
                torch.equal(getattr(files[site], f), getattr(plan[site], f))
                for f in ("left", "right", "shift")
            )
        assert not list(tmp_path.iterdir())
        assert hook_count(model) == 0
        assert_same(state, model)
