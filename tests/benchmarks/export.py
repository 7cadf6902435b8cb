"""How fast is a patched checkpoint written, next to `cp -r` of the same files, and with how much memory?

Makes a sharded bfloat16 checkpoint with the names of a Llama and a patch of rank 2 of every o_proj and down_proj, and
exports it in turn with `cp -r` on the same disk. Every measurement starts from a source that was just read (warm cache) and
without the files of the last one. The export runs in a fresh process and is timed inside it, from the call to its return;
`cp` from its start to its end. In half of the rounds both go on until fsync has returned for every file that was written.
Then checks: untouched tensors byte for byte, and an export that is killed half-way and started again.

    python tests/benchmarks/export.py --gb 8 --rounds 5
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from _side_by_side import machine, side_by_side
from torch import Tensor

from repe_unlearn.export.matching import slice_digest
from repe_unlearn.export.safetensors_io import TensorSpec, index, read_header, write_stream
from repe_unlearn.patch import Edit, Patch

# Writing 5 to clear_refs sets the peak (VmHWM) back to what is resident now: the level after all imports.
_WORKER = """
import json, os, sys, time
from pathlib import Path
import tqdm
from repe_unlearn.export import checkpoint
from repe_unlearn.patch import Patch
def resident(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))
source, file, out, synced, workers = sys.argv[1:]
patch = Patch.load(file)
Path("/proc/self/clear_refs").write_text("5")
level, cpu, start = resident("VmRSS"), time.process_time(), time.perf_counter()
checkpoint(Path(source), patch, Path(out), check_fingerprint=False, workers=int(workers) or None, progress=False)
if synced == "True":
    for path in Path(out).iterdir():
        with path.open("rb") as stream:
            os.fsync(stream)
taken, cpu = time.perf_counter() - start, time.process_time() - cpu
print(json.dumps([taken, cpu, level, resident("VmHWM")]))
"""


@dataclass(frozen=True, slots=True)
class Run:
    """Seconds on the clock, seconds of processor, and for an export what was resident before and at most."""

    seconds: float
    cpu: float
    level: int = 0
    peak: int = 0


def specs_of(gb: float, width: int, hidden: int) -> dict[str, list[TensorSpec]]:
    """Return the tensors of a Llama of about so many gigabytes, in shards of about a sixteenth of it."""
    layer = {
        "input_layernorm": (width,),
        "self_attn.q_proj": (width, width),
        "self_attn.k_proj": (width // 4, width),
        "self_attn.v_proj": (width // 4, width),
        "self_attn.o_proj": (width, width),
        "post_attention_layernorm": (width,),
        "mlp.gate_proj": (hidden, width),
        "mlp.up_proj": (hidden, width),
        "mlp.down_proj": (width, hidden),
    }
    specs = [TensorSpec("model.embed_tokens.weight", "BF16", (8 * width, width))]
    number = 0
    while sum(spec.nbytes for spec in specs) < gb * 1e9:
        specs += [TensorSpec(f"model.layers.{number}.{n}.weight", "BF16", s) for n, s in layer.items()]
        number += 1
    shards: list[list[TensorSpec]] = [[]]
    for spec in specs:
        if sum(other.nbytes for other in shards[-1]) > gb * 1e9 / 16:
            shards.append([])
        shards[-1].append(spec)
    return {f"model-{i + 1:05}-of-{len(shards):05}.safetensors": shard for i, shard in enumerate(shards)}


def make(folder: Path, shards: dict[str, list[TensorSpec]]) -> None:
    """Write the checkpoint, with random values."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)

    def values(spec: TensorSpec) -> Tensor:
        return torch.empty(spec.shape, dtype=torch.bfloat16).normal_(generator=generator)

    for name, shard in shards.items():
        by_name = {spec.name: spec for spec in shard}
        write_stream(folder / name, shard, lambda tensor, by_name=by_name: values(by_name[tensor]))
    weight_map = {spec.name: name for name, shard in shards.items() for spec in shard}
    table = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(table))
    (folder / "config.json").write_text('{"model_type": "llama"}')


def patch_of(shards: dict[str, list[TensorSpec]]) -> Patch:
    """Return an edit of rank 2 of every o_proj and down_proj."""
    generator = torch.Generator().manual_seed(1)
    edits = {}
    for spec in (spec for shard in shards.values() for spec in shard):
        if "o_proj" in spec.name or "down_proj" in spec.name:
            left = torch.randn(spec.shape[0], 2, generator=generator)
            edits[spec.name] = Edit(left, torch.randn(2, spec.shape[1], generator=generator), "benchmark")
    return Patch(edits, "")


@dataclass(frozen=True, slots=True)
class Bench:
    """The folders of one benchmark, and what can be timed in them."""

    source: Path
    out: Path
    patch: Path
    workers: int

    def command(self, synced: bool) -> list[str]:
        """Return the command of an export."""
        words = (self.source, self.patch, self.out, synced, self.workers)
        return [sys.executable, "-c", _WORKER, *map(str, words)]

    def export(self, synced: bool) -> Run:
        """Export in a fresh process; the files stay."""
        self._start()
        done = subprocess.run(self.command(synced), check=True, capture_output=True, text=True)
        return Run(*json.loads(done.stdout))

    def cp(self, synced: bool) -> Run:
        """Copy with `cp -r`; the files stay."""
        self._start()
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run(["cp", "-r", str(self.source), str(self.out)], check=True)
        if synced:
            for path in self.out.iterdir():
                with path.open("rb") as stream:
                    os.fsync(stream)
        seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
        return Run(seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)

    def _start(self) -> None:
        shutil.rmtree(self.out, ignore_errors=True)
        os.sync()
        buffer = bytearray(1 << 22)
        for path in self.source.iterdir():
            with path.open("rb", buffering=0) as stream:
                while stream.readinto(buffer):
                    pass

    def compare(self, size: int, rounds: int, synced: bool) -> list[Run]:
        """Time both in turn, print a row of medians, return the exports."""
        runs: dict[str, list[Run]] = {"export": [], "cp": []}
        side_by_side(
            lambda: runs["export"].append(self.export(synced)),
            lambda: runs["cp"].append(self.cp(synced)),
            rounds,
        )
        measured = {name: found[1:] for name, found in runs.items()}  # the first round warms up
        speed = {n: size / statistics.median(run.seconds for run in found) for n, found in measured.items()}
        cpu = {n: statistics.median(run.cpu for run in found) for n, found in measured.items()}
        pairs = zip(measured["cp"], measured["export"], strict=True)
        ratios = sorted(one.seconds / other.seconds for one, other in pairs)
        print(
            f"{'synced' if synced else 'not synced':<11} cp -r {speed['cp'] / 1e6:5.0f} MB/s, export "
            f"{speed['export'] / 1e6:5.0f} MB/s; export / cp by rounds: median {statistics.median(ratios):.2f}, "
            f"{ratios[0]:.2f} to {ratios[-1]:.2f}; processor {cpu['cp']:.1f} s and {cpu['export']:.1f} s"
        )
        return runs["export"]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gb", type=float, default=0.2)
    parser.add_argument("--width", type=int, default=0, help="default 4096, 1024 below 2 GB")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=0, help="default that of export.checkpoint")
    parser.add_argument(
        "--folder", type=Path, help="on the disk to measure; default the one for temporary files"
    )
    args = parser.parse_args()
    width = args.width or (4096 if args.gb >= 2 else 1024)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        work = Path(name)
        shards = specs_of(args.gb, width, 3 * width + width // 2)
        make(work / "source", shards)
        patch = patch_of(shards)
        bench = Bench(work / "source", work / "out", patch.save(work / "patch.safetensors"), args.workers)
        specs = [spec for shard in shards.values() for spec in shard]
        size, largest = sum(spec.nbytes for spec in specs), max(spec.nbytes for spec in specs)
        edited = sum(spec.nbytes for spec in specs if spec.name in patch.edits)
        print(machine())
        print(
            f"{size / 1e9:.2f} GB in {len(shards)} files, {edited / size:.0%} of it edited, {os.cpu_count()} processors, "
            f"warm cache, medians of {args.rounds} rounds; load before {os.getloadavg()[0]:.1f}"
        )
        runs = [run for synced in (False, True) for run in bench.compare(size, args.rounds, synced)]
        level, peak = max(run.level for run in runs), max(run.peak for run in runs)
        grown = max(run.peak - run.level for run in runs)
        print(
            f"memory      {level / 1e6:.0f} MB after imports, peak {peak / 1e6:.0f} MB, {grown / 1e6:.0f} MB more; "
            f"largest tensor {largest / 1e6:.0f} MB"
        )
        took = bench.export(synced=False).seconds
        before, after = index(bench.source), index(bench.out)
        headers = {path: read_header(path) for path in {*before.values(), *after.values()}}
        changed = {
            name
            for name in before
            if slice_digest(headers[before[name]], name) != slice_digest(headers[after[name]], name)
        }
        exactly = changed == set(patch.edits)
        print(f"changed     {len(changed)} of {len(before)} tensors; exactly the edited ones: {exactly}")
        print(f"killed      {_killed(bench.command(synced=False), bench.out, took)}")


def _killed(command: list[str], out: Path, seconds: float) -> str:
    """Kill an export half-way, start it again; say what the second run found and whether it ended whole."""
    wanted = {path.name: _hash(path) for path in out.glob("*.safetensors")}
    shutil.rmtree(out)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    partial: list[Path] = []
    while process.poll() is None:
        partial = list(out.parent.glob(f".{out.name}.partial-*"))
        if partial and len(list((partial[0] / ".progress").glob("*.json"))) >= len(wanted) // 2:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(seconds / 1000)
    process.wait()
    visible = out.exists()
    done = len(list((partial[0] / ".progress").glob("*.json"))) if partial and partial[0].exists() else 0
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    same = all(_hash(out / name) == hashed for name, hashed in wanted.items())
    return f"{done} of {len(wanted)} files were done, final name visible: {visible}; after the rerun identical: {same}"


def _hash(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


if __name__ == "__main__":
    main()
