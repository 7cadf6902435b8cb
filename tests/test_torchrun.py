"""Capture and the command line under torchrun: the same as one process, whatever the share of each rank."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from auditkit import jsonl, sounds
from folders import save
from textkit import pairs, text_model, text_tokenizer
from typer.testing import CliRunner

from repe_unlearn.activations import capture
from repe_unlearn.architectures import Architecture
from repe_unlearn.cli import app
from repe_unlearn.errors import NotEnoughDataError
from repe_unlearn.moments import Moments
from repe_unlearn.plan import ErasurePlan
from repe_unlearn.ranks import process_group, rank_and_world, together
from repe_unlearn.shards import Shards
from repe_unlearn.sites import Site

FIELDS = ("mean_x", "mean_z", "m_xx", "m_xz", "m_zz")
ONE_BATCH = 10**6

# Many batches of unequal size; one batch, so that a rank has none; and an interrupted capture that goes on.
WORKER = """
import sys
import torch
from textkit import pairs, text_model, text_tokenizer
from repe_unlearn import activations
from repe_unlearn.activations import capture, gather
from repe_unlearn.architectures import Architecture
from repe_unlearn.ranks import process_group

folder = sys.argv[1]
model, tokenizer = text_model("llama"), text_tokenizer()
sites = Architecture.of(model).sites("attn_in", "mlp_in")
with process_group() as rank:
    assert torch.distributed.get_world_size() == 2
    def save(moments, name):
        for i, site in enumerate(sites):
            moments[site].save(f"{folder}/{name}-{rank}-{i}")
    go = lambda **o: capture(model, tokenizer, pairs(), sites, select="all", progress=False, **o)
    save(go(batch_tokens=300, keep=f"{folder}/kept"), "many")
    save(go(batch_tokens=10**6), "one")
    assert len(activations.prepare(model, tokenizer, pairs(), "all", 10**6)) == 1 - rank
    real = activations.tqdm
    def interrupted(work, **_):
        for i, batch in enumerate(work):
            if i == 3:
                raise KeyboardInterrupt
            yield batch
    activations.tqdm = interrupted
    try:
        go(batch_tokens=300, resume=f"{folder}/progress", every=1)
    except KeyboardInterrupt:
        activations.tqdm = real
    save(go(batch_tokens=300, resume=f"{folder}/progress", every=1), "resumed")
    rows = gather(model, tokenizer, pairs(), sites[:1], progress=False)[sites[0]]
    assert rows.owner.tolist() == list(range(96))
"""


def torchrun(*arguments: str | Path, processes: int = 2) -> subprocess.CompletedProcess[str]:
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *start, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=240,
        env=environment,
    )


def apart(a: Moments, b: Moments) -> float:
    assert a.n == b.n
    return max(float((getattr(a, f) - getattr(b, f)).abs().max() / getattr(b, f).abs().max()) for f in FIELDS)


def test_capture_over_two_processes_equals_one(tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(WORKER, encoding="utf-8")
    result = torchrun(script, tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    model, tokenizer = text_model("llama"), text_tokenizer()
    sites = Architecture.of(model).sites("attn_in", "mlp_in")
    for name, budget in (("many", 300), ("one", ONE_BATCH), ("resumed", 300)):
        whole = capture(model, tokenizer, pairs(), sites, select="all", batch_tokens=budget, progress=False)
        for i, site in enumerate(sites):
            first, second = (Moments.load(tmp_path / f"{name}-{rank}-{i}") for rank in (0, 1))
            assert all(torch.equal(getattr(first, f), getattr(second, f)) for f in FIELDS)
            assert apart(first, whole[site]) < 1e-12
    kept = Shards(tmp_path / "kept")
    assert apart(kept.moments(sites[1]), whole[sites[1]]) < 1e-12
    assert kept.gather(sites[0]).owner.unique().tolist() == list(range(96))
    assert not list(tmp_path.glob("progress*"))
    # control: the comparison sees a prompt
    fewer = capture(model, tokenizer, pairs(47), sites[:1], select="all", progress=False)
    assert fewer[sites[0]].n != whole[sites[0]].n


@pytest.mark.filterwarnings("ignore::repe_unlearn.errors.NumericalWarning")
def test_the_command_line(tmp_path: Path) -> None:
    model = save(tmp_path / "model", text_model("llama"))  # type: ignore[arg-type]  # a Llama
    text_tokenizer().save_pretrained(model)
    common = ["fit", model, "--contrast", jsonl(tmp_path / "sounds.jsonl", sounds()), "--quiet"]
    alone = CliRunner().invoke(app, [*map(str, [*common, tmp_path / "alone.safetensors"])])
    assert alone.exit_code == 0, alone.output
    result = torchrun("-m", "repe_unlearn", *common, tmp_path / "both.safetensors")
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("written: ") == 1
    one, two = (ErasurePlan.load(tmp_path / f"{name}.safetensors") for name in ("alone", "both"))
    for site, eraser in one.erasers.items():
        torch.testing.assert_close(two.erasers[site].matrix(), eraser.matrix(), rtol=0, atol=1e-9)
    # The file of --resume goes once it is not needed, and a fit in sequence has no use for it.
    state = ["--resume", str(tmp_path / "state")]
    for more, code in ((["--independent"], 0), ([], 1)):
        found = CliRunner().invoke(app, [*map(str, common), str(tmp_path / f"{code}.st"), *state, *more])
        assert found.exit_code == code, found.output
    assert "--resume needs --independent" in found.output
    assert not (tmp_path / "state").exists()


def test_one_process() -> None:
    site = Site("a")
    assert rank_and_world() == (0, 1)
    with process_group() as rank:
        assert rank == 0
    m = Moments.of(torch.randn(4, 2), torch.tensor([0, 1, 0, 1]))
    assert together({site: m}, [site]) == {site: m}
    with pytest.raises(NotEnoughDataError, match="no activation reached a"):
        together({site: None}, [site])
