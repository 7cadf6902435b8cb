"""How fast is a patched checkpoint written, next to `cp -r` of the same files, and with how much memory?

Makes a sharded bfloat16 checkpoint with the names of a Llama, a patch of rank 2 of every o_proj and down_proj, and
exports it in a fresh process (timed inside it) in turn with `cp -r` on the same disk. Both read files that were just read (warm cache),
and both end with the data handed to the system; with --sync both end with `sync`, when it is on the disk. Then checks:
untouched tensors byte for byte, and an export that is killed half-way and started again.

    python tests/benchmarks/export.py --gb 8 --sync
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from _side_by_side import machine, side_by_side
from torch import Tensor

from repe_unlearn.export.matching import slice_digest
from repe_unlearn.export.safetensors_io import TensorSpec, index, read_header, write_stream
from repe_unlearn.patch import Edit, Patch

_WORKER = """
import json, os, resource, sys, time
from pathlib import Path
import tqdm
from repe_unlearn.export import checkpoint
from repe_unlearn.patch import Patch
patch = Patch.load(sys.argv[2])
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before, start = peak(), time.perf_counter()
checkpoint(Path(sys.argv[1]), patch, Path(sys.argv[3]), force=True, check_fingerprint=False, progress=False)
if sys.argv[4] == "True":
    os.sync()
print(json.dumps([time.perf_counter() - start, peak() - before]))
"""


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


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gb", type=float, default=0.2)
    parser.add_argument("--width", type=int, default=0, help="default 4096, 1024 below 2 GB")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sync", action="store_true", help="wait until the data are on the disk")
    parser.add_argument(
        "--folder", type=Path, help="on the disk to measure; default the one for temporary files"
    )
    args = parser.parse_args()
    width = args.width or (4096 if args.gb >= 2 else 1024)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        work = Path(name)
        source, out, copy = work / "source", work / "out", work / "copy"
        shards = specs_of(args.gb, width, 3 * width + width // 2)
        make(source, shards)
        patch = patch_of(shards)
        file = patch.save(work / "patch.safetensors")
        size = sum(spec.nbytes for shard in shards.values() for spec in shard)
        largest = max(spec.nbytes for shard in shards.values() for spec in shard)
        edited = sum(s.nbytes for shard in shards.values() for s in shard if s.name in patch.edits)
        command = [sys.executable, "-c", _WORKER, str(source), str(file), str(out), str(args.sync)]
        peaks: list[int] = []

        def finish() -> None:
            if args.sync:
                os.sync()

        def export() -> None:
            shutil.rmtree(out, ignore_errors=True)
            finish()
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            taken, peak = json.loads(done.stdout)
            seconds["export"].append(taken)
            peaks.append(peak)

        def cp() -> None:
            shutil.rmtree(copy, ignore_errors=True)
            finish()
            start = time.perf_counter()
            subprocess.run(["cp", "-r", str(source), str(copy)], check=True)
            finish()
            seconds["cp"].append(time.perf_counter() - start)

        seconds: dict[str, list[float]] = {"export": [], "cp": []}
        side_by_side(export, cp, args.rounds)
        best = {name: min(values) for name, values in seconds.items()}

        before, after = index(source), index(out)
        headers = {path: read_header(path) for path in {*before.values(), *after.values()}}
        changed = {
            name
            for name in before
            if slice_digest(headers[before[name]], name) != slice_digest(headers[after[name]], name)
        }
        shutil.rmtree(copy)
        resumed = _killed(command, out, best["export"])
        print(machine())
        print(
            f"{size / 1e9:.2f} GB in {len(shards)} files, {edited / size:.0%} of it edited, warm cache, "
            f"{'synced' if args.sync else 'not synced'}, best of {args.rounds + 1}"
        )
        print(f"cp -r               {size / best['cp'] / 1e6:8.0f} MB/s")
        print(f"export              {size / best['export'] / 1e6:8.0f} MB/s")
        print(f"export / cp         {best['cp'] / best['export']:8.2f} of the throughput")
        print(f"memory above start  {max(peaks) / 1e6:8.0f} MB; largest tensor {largest / 1e6:.0f} MB")
        print(
            f"changed tensors     {len(changed):8} of {len(before)}; exactly the edited ones: {changed == set(patch.edits)}"
        )
        print(f"killed half-way     {resumed}")


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
