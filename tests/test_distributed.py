"""Moments over several processes, started as users start them: equal to one process that has all the data."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from repe_unlearn.errors import InputError
from repe_unlearn.moments import Moments
from repe_unlearn.thin_moments import ThinMoments

FIELDS = ("mean_x", "mean_z", "m_xx", "m_xz", "m_zz")

# Both ranks make the same data and keep their part of it: 11 and 389 rows, then 0 and 400, then nothing at all.
WORKER = """
import sys
import torch
import torch.distributed as dist
from repe_unlearn.errors import ShapeError
from repe_unlearn.moments import Moments
from repe_unlearn.thin_moments import ThinMoments

dist.init_process_group("gloo")
rank = dist.get_rank()
assert dist.get_world_size() == 2
g = torch.Generator().manual_seed(0)
x = torch.randn(400, 6, generator=g, dtype=torch.float64) * torch.logspace(-3, 3, 6) + 1e3
z = torch.arange(400) // 7 % 3
for name, cut in (("uneven", 11), ("empty", 0)):
    part = slice(0, cut) if rank == 0 else slice(cut, None)
    mine = Moments.of(x[part], z[part], classes=3) if len(x[part]) else Moments.empty(6, 3)
    mine.all_reduce().save(f"{sys.argv[1]}/{name}-{rank}")
    thin = ThinMoments.of(x[part], z[part], classes=3) if len(x[part]) else ThinMoments.empty(6, 3)
    thin.all_reduce().save(f"{sys.argv[1]}/thin-{name}-{rank}")
weight = torch.arange(12) + 1.0
part = slice(0, 5) if rank == 0 else slice(5, 12)
rows = x[part].to(torch.bfloat16 if rank else torch.float16)
ThinMoments.of(rows, z[part], classes=3, weight=weight[part]).all_reduce().save(f"{sys.argv[1]}/mixed-{rank}")
for kind in (Moments, ThinMoments):
    assert kind.empty(6, 3).all_reduce().n == 0
    try:
        kind.empty(6, 3 + rank).all_reduce()
    except ShapeError as error:
        assert "k from 3 to 4" in str(error)
    else:
        raise AssertionError("moments of different widths went through")
Moments.of(x, z).save(f"{sys.argv[1]}/whole-{rank}")
ThinMoments.of(x, z).save(f"{sys.argv[1]}/thin-whole-{rank}")
dist.destroy_process_group()
"""


def test_two_processes_equal_one(tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(WORKER, encoding="utf-8")
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            script,
            tmp_path,
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    whole = Moments.load(tmp_path / "whole-0")
    for name in ("uneven", "empty"):
        first, second = (Moments.load(tmp_path / f"{name}-{rank}") for rank in (0, 1))
        assert first.n == second.n == whole.n == 400
        for field in FIELDS:
            found, wanted = getattr(first, field), getattr(whole, field)
            assert torch.equal(found, getattr(second, field)), field  # the same bits on every rank
            assert float((found - wanted).abs().max() / wanted.abs().max()) < 1e-12, field
            if field.startswith("m_x"):  # every coordinate by itself: their units span six decades
                assert float(((found - wanted).abs() / wanted.abs().amax(1, keepdim=True)).max()) < 1e-8
        thin = [ThinMoments.load(tmp_path / f"thin-{name}-{rank}") for rank in (0, 1)]
        for field in ("x", "z", "weight"):
            wanted = getattr(ThinMoments.load(tmp_path / "thin-whole-0"), field)
            assert all(torch.equal(getattr(m, field), wanted) for m in thin), field
    mixed = [ThinMoments.load(tmp_path / f"mixed-{rank}") for rank in (0, 1)]
    assert all(torch.equal(m.weight, torch.arange(12).double() + 1) for m in mixed)
    assert torch.equal(mixed[0].x, mixed[1].x)
    assert mixed[0].x.dtype == torch.float32  # holds both float16 and bfloat16
    # Control: means averaged without the counts, the usual mistake, are far off.
    g = torch.Generator().manual_seed(0)
    x = torch.randn(400, 6, generator=g, dtype=torch.float64) * torch.logspace(-3, 3, 6) + 1e3
    assert float(((x[:11].mean(0) + x[11:].mean(0)) / 2 - whole.mean_x).abs().max()) > 1e-1


def test_needs_a_process_group() -> None:
    for kind in (Moments, ThinMoments):
        with pytest.raises(InputError, match="torchrun"):
            kind.empty(2, 2).all_reduce()
