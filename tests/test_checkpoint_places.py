"""Checkpoints from pickles, from and to stores, by several workers, and taken up after a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import torch
from folders import save, tiny_llama
from safetensors.torch import load_file, save_file
from torch import nn

from repe_unlearn.errors import FileFormatError, InputError, MissingDependencyError, OutputExistsError
from repe_unlearn.export import checkpoint
from repe_unlearn.export.folder import PROGRESS
from repe_unlearn.export.safetensors_io import index, read_header
from repe_unlearn.fingerprints import fingerprint
from repe_unlearn.patch import Edit, Patch

NAMES = ("model.layers.1.self_attn.o_proj.weight", "model.layers.0.mlp.down_proj.weight")
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def patch_of(model: nn.Module, *names: str, seed: int = 0, **more: object) -> Patch:
    generator = torch.Generator().manual_seed(seed)
    edits = {}
    for name in names or NAMES:
        rows, columns = model.get_parameter(name).shape
        left = torch.randn(rows, 2, generator=generator)
        edits[name] = Edit(left, torch.randn(2, columns, generator=generator), "test")
    return Patch(edits, fingerprint(model), **more)


def state(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in set(index(folder).values()) for k, v in load_file(file).items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.fixture
def memory() -> Iterator[str]:
    yield "memory://store"
    fsspec.filesystem("memory").rm("/store", recursive=True)


# Pickles


def as_pickles(source: Path, folder: Path, *, shards: int) -> Path:
    """The same folder with pytorch_model.bin instead of safetensors."""
    tensors = state(source)
    folder.mkdir()
    (folder / "config.json").write_text((source / "config.json").read_text())
    if shards == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
        return folder
    weight_map = {}
    for i in range(shards):
        file = f"pytorch_model-{i + 1:05}-of-{shards:05}.bin"
        part = {name: tensors[name] for name in sorted(tensors)[i::shards]}
        torch.save(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    table = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(table))
    return folder


@pytest.mark.parametrize("shards", [1, 3])
def test_pickles_become_patched_safetensors(tmp_path: Path, shards: int) -> None:
    model = tiny_llama(dtype=torch.bfloat16)
    plain = save(tmp_path / "plain", model)
    source = as_pickles(plain, tmp_path / "pickles", shards=shards)
    patch = patch_of(model)
    wanted = checkpoint(plain, patch, tmp_path / "wanted", progress=False)
    out = checkpoint(source, patch, tmp_path / "out", progress=False, verify=True)
    assert same(state(out), state(wanted))
    assert not same(state(out), state(plain))  # control
    assert not list(out.glob("*.bin*"))
    names = sorted(path.name for path in out.glob("model*"))
    if shards == 1:
        assert names == ["model.safetensors"]
    else:
        assert names[0] == "model-00001-of-00003.safetensors"
        assert names[-1] == "model.safetensors.index.json"


def test_tied_head_in_a_pickle_is_written_once(tmp_path: Path) -> None:
    model = tiny_llama(tied=True)
    source = save(tmp_path / "source", model)
    (source / "model.safetensors").unlink()
    torch.save(model.state_dict(), source / "pytorch_model.bin")
    assert HEAD in model.state_dict()
    out = checkpoint(source, patch_of(model, EMBED), tmp_path / "out", progress=False)
    assert HEAD not in state(out)
    untied = patch_of(model, EMBED, tied=(EMBED, HEAD))
    apart = checkpoint(source, untied, tmp_path / "apart", progress=False)
    assert torch.equal(state(apart)[HEAD], model.get_parameter(EMBED))
    assert not torch.equal(state(apart)[EMBED], model.get_parameter(EMBED))


class Boom:
    def __reduce__(self) -> tuple:
        return (os.mkdir, ("boom",))


def test_hostile_and_broken_pickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = tiny_llama()
    source = save(tmp_path / "source", model)
    (source / "model.safetensors").unlink()
    file = source / "pytorch_model.bin"
    torch.save({"w": Boom()}, file)
    with pytest.raises(FileFormatError, match=r"pytorch_model\.bin"):
        checkpoint(source, patch_of(model), tmp_path / "out", progress=False)
    torch.save(["no table"], file)
    with pytest.raises(FileFormatError, match="no table"):
        checkpoint(source, patch_of(model), tmp_path / "out", progress=False)
    torch.save(model.state_dict(), file)
    file.write_bytes(file.read_bytes()[:-2000])
    with pytest.raises(FileFormatError, match=r"pytorch_model\.bin"):
        checkpoint(source, patch_of(model), tmp_path / "out", progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


# Stores


def upload(folder: Path, url: str) -> str:
    fs = fsspec.filesystem("memory")
    fs.put(str(folder), url.removeprefix("memory:/"), recursive=True)
    return url


def download(url: str, folder: Path) -> Path:
    fsspec.filesystem("memory").get(url.removeprefix("memory:/"), str(folder), recursive=True)
    return folder


@pytest.mark.parametrize("shard", [None, "15KB"])
def test_from_and_to_a_store(tmp_path: Path, memory: str, shard: str | None) -> None:
    model = tiny_llama(dtype=torch.bfloat16)
    source = save(tmp_path / "source", model, shard=shard)
    patch = patch_of(model)
    wanted = checkpoint(source, patch, tmp_path / "wanted", progress=False)
    url = upload(source, f"{memory}/source")
    fetched = checkpoint(url, patch, tmp_path / "fetched", progress=False, verify=True)
    sent = checkpoint(url, patch, f"{memory}/sent", progress=False, verify=True)
    assert sent == f"{memory}/sent".replace("://", ":///")
    for out in (fetched, download(f"{memory}/sent", tmp_path / "sent")):
        files = {path.name: path.read_bytes() for path in out.iterdir()}
        for path in wanted.iterdir():
            if path.name == "repe_manifest.json":
                ours, theirs = json.loads(files[path.name]), json.loads(path.read_text())
                assert ours["edited"] == theirs["edited"]
            else:
                assert files[path.name] == path.read_bytes(), path.name
    with pytest.raises(OutputExistsError, match="force=True"):
        checkpoint(url, patch, f"{memory}/sent", progress=False)
    checkpoint(url, patch, f"{memory}/sent", progress=False, force=True)
    with pytest.raises(InputError, match="lie apart"):
        checkpoint(url, patch, f"{url}/inside", progress=False)


def test_a_failure_leaves_nothing_in_a_store(tmp_path: Path, memory: str) -> None:
    model = tiny_llama()
    source = save(tmp_path / "source", model, shard="15KB")
    fs = fsspec.filesystem("memory")
    fs.makedirs("/store", exist_ok=True)

    class Failing:
        def apply(self, weight: torch.Tensor) -> torch.Tensor:
            assert any(name.endswith(".safetensors") for name in fs.find("/store/out"))  # control: under way
            assert not fs.exists("/store/out/config.json")  # what makes it a model comes last
            return weight * float("nan")

    patch = patch_of(model)
    object.__setattr__(patch, "edits", {sorted(index(source), key=lambda n: index(source)[n])[-1]: Failing()})
    with pytest.raises(InputError, match="NaN"):
        checkpoint(source, patch, f"{memory}/out", progress=False, workers=1)
    assert fs.find("/store") == []


def test_unknown_and_missing_file_systems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    source, patch = save(tmp_path / "source", model), patch_of(model)
    with pytest.raises(InputError, match="nonsense"):
        checkpoint(source, patch, "nonsense://x/out", progress=False)
    url = f"file://{tmp_path}/by-url"
    assert checkpoint(source, patch, url, progress=False) == tmp_path / "by-url"
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(MissingDependencyError, match="pip install fsspec"):
        checkpoint(source, patch, "memory://out", progress=False)


# Workers and reading back


def test_workers_write_the_same_files(tmp_path: Path) -> None:
    model = tiny_llama(dtype=torch.bfloat16)
    source = save(tmp_path / "source", model, shard="15KB")
    patch = patch_of(model)
    outs = [
        checkpoint(source, patch, tmp_path / f"out{n}", workers=n, progress=False, verify=n == 4)
        for n in (1, 4)
    ]
    one, four = ({path.name: path.read_bytes() for path in out.glob("model*")} for out in outs)
    assert one == four
    plain, verified = (json.loads((out / "repe_manifest.json").read_text()) for out in outs)
    assert plain["edited"] == verified["edited"]
    assert set(verified["files"]) == {path.name for path in outs[1].glob("*.safetensors")}
    assert "files" not in plain
    with pytest.raises(InputError, match="workers=0"):
        checkpoint(source, patch, tmp_path / "none", workers=0, progress=False)


def test_verify_finds_one_wrong_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import repe_unlearn.export.checkpoint  # noqa: F401  (the name in the package is the function)

    module = sys.modules["repe_unlearn.export.checkpoint"]
    model = tiny_llama()
    source = save(tmp_path / "source", model)
    patch, real = patch_of(model), module._write_file
    where = {name: read_header(source / "model.safetensors").slices[name].begin for name in (EMBED, NAMES[0])}
    for name, position in where.items():

        def flip(folder: Path, file: str, *rest: object, position: int = position) -> object:
            notes = real(folder, file, *rest)
            with (folder / file).open("r+b") as stream:
                stream.seek(position)
                byte = stream.read(1)[0]
                stream.seek(position)
                stream.write(bytes([byte ^ 1]))
            return notes

        monkeypatch.setattr(module, "_write_file", flip)
        with pytest.raises(FileFormatError, match=name):
            checkpoint(source, patch, tmp_path / "out", progress=False, verify=True)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("workers", [1, 3])
def test_an_error_in_one_worker_ends_all(tmp_path: Path, workers: int) -> None:
    model = tiny_llama()
    source = save(tmp_path / "source", model, shard="15KB")
    bad = patch_of(model)
    huge = Edit(torch.full((32, 1), 1e30), torch.full((1, 48), 1e30), "overflows float32")
    patch = Patch({**bad.edits, NAMES[1]: huge}, bad.fingerprint)
    with pytest.raises(InputError, match="NaN or infinite"):
        checkpoint(source, patch, tmp_path / "out", workers=workers, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


# Taken up after a kill

_KILLED = """
import sys, time
from pathlib import Path
from repe_unlearn.export import checkpoint
from repe_unlearn.patch import Patch
module = sys.modules["repe_unlearn.export.checkpoint"]
real, done = module._write_file, []
def slow(*args):
    if len(done) == 2:
        Path(sys.argv[4]).touch()
        time.sleep(60)
    done.append(real(*args))
    return done[-1]
module._write_file = slow
checkpoint(Path(sys.argv[1]), Patch.load(sys.argv[2]), Path(sys.argv[3]), workers=1, progress=False)
"""


def killed_half_way(tmp_path: Path, source: Path, patch: Patch) -> Path:
    """Start an export in another process, kill it after two shards, and return the unfinished folder."""
    file, sign = patch.save(tmp_path / "patch.safetensors", force=True), tmp_path / "half-way"
    command = [sys.executable, "-c", _KILLED, str(source), str(file), str(tmp_path / "out"), str(sign)]
    process = subprocess.Popen(command)
    for _ in range(600):
        if sign.exists():
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists()
    (folder,) = tmp_path.glob(".out.partial-*")
    assert len(list(folder.glob("*.safetensors"))) == 2
    return folder


def test_a_killed_export_is_taken_up(tmp_path: Path) -> None:
    model = tiny_llama()
    source = save(tmp_path / "source", model, shard="15KB")
    patch = patch_of(model, *NAMES)
    folder = killed_half_way(tmp_path, source, patch)
    finished = {path.name: path.stat().st_ino for path in folder.glob("*.safetensors")}
    first = sorted(finished)[0]
    (folder / first).write_bytes((folder / first).read_bytes()[:-1])  # damaged meanwhile: made again
    out = checkpoint(source, patch, tmp_path / "out", progress=False, verify=True)
    kept = [name for name, inode in finished.items() if (out / name).stat().st_ino == inode]
    assert len(kept) >= 1  # control: something was indeed taken over
    wanted = checkpoint(source, patch, tmp_path / "wanted", progress=False)
    assert same(state(out), state(wanted))
    manifests = [json.loads((path / "repe_manifest.json").read_text()) for path in (out, wanted)]
    assert manifests[0]["edited"] == manifests[1]["edited"]
    assert not (out / PROGRESS).exists()
    assert not list(tmp_path.glob(".out*"))


def test_another_patch_or_source_starts_anew(tmp_path: Path) -> None:
    model = tiny_llama()
    source = save(tmp_path / "source", model, shard="15KB")
    killed_half_way(tmp_path, source, patch_of(model))
    other = patch_of(model, seed=1)
    out = checkpoint(source, other, tmp_path / "out", progress=False)
    wanted = checkpoint(source, other, tmp_path / "wanted", progress=False)
    assert same(state(out), state(wanted))
    assert not list(tmp_path.glob(".out*"))  # what the other patch had left is gone


def test_two_processes_at_the_same_work(tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    model = tiny_llama()
    source = save(tmp_path / "source", model, shard="15KB")
    patch = patch_of(model)
    folder = killed_half_way(tmp_path, source, patch)
    with (folder / PROGRESS / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(OutputExistsError, match="Another process"):
            checkpoint(source, patch, tmp_path / "out", progress=False)
        checkpoint(source, patch_of(model, seed=1), tmp_path / "out", progress=False)
        assert folder.exists()  # another's work is no leftover
    assert checkpoint(source, patch, tmp_path / "out", progress=False, force=True).is_dir()


def test_a_float16_overflow_is_no_false_alarm(tmp_path: Path) -> None:
    """Sums of large finite values overflow; only the values count."""
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    save_file({"w": torch.full((64, 64), 1.6e308, dtype=torch.float64)}, folder / "model.safetensors")
    patch = Patch({"w": Edit(torch.zeros(64, 1), torch.zeros(1, 64), "nothing")}, "")
    out = checkpoint(folder, patch, tmp_path / "out", progress=False)
    assert state(out)["w"].isfinite().all()
