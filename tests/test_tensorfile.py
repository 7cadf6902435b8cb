from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
import safetensors.torch
import torch

from repe_unlearn.errors import FileFormatError, OutputExistsError
from repe_unlearn.tensorfile import read_tensors, write_tensors

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(4, 0, dtype=torch.float64)}


def write(
    path: Path, *, kind: str = "thing", version: int = 1, force: bool = False, **header: object
) -> Path:
    return write_tensors(path, TENSORS, kind=kind, version=version, header=header, force=force)


def read(path: Path) -> tuple[dict, dict]:
    return read_tensors(path, kind="thing", version=1)


def test_round_trip(tmp_path: Path) -> None:
    path = write(tmp_path / "new" / "folder" / "t.safetensors", note="π", sizes=[1, 2])
    tensors, header = read(path)
    assert header == {"kind": "thing", "version": 1, "note": "π", "sizes": [1, 2]}
    assert tensors.keys() == TENSORS.keys()
    for name, value in TENSORS.items():
        assert tensors[name].dtype == value.dtype
        assert torch.equal(tensors[name], value)
    assert [p.name for p in path.parent.iterdir()] == ["t.safetensors"]


def test_views_and_shared_tensors_are_written_whole(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    given = {"turned": base.T, "part": base[:, :2], "same": base}
    path = write_tensors(tmp_path / "t", given, kind="thing", version=1, header={}, force=False)
    tensors, _ = read(path)
    assert all(torch.equal(tensors[name], value) for name, value in given.items())


def test_others_may_read_the_file_as_the_umask_says(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.touch()
    assert os.stat(write(tmp_path / "t")).st_mode == os.stat(plain).st_mode


def test_does_not_overwrite_unless_told(tmp_path: Path) -> None:
    path = write(tmp_path / "t", note="old")
    before = path.read_bytes()
    with pytest.raises(OutputExistsError, match="force=True"):
        write(path, note="new")
    assert path.read_bytes() == before
    write(path, note="new", force=True)
    assert read(path)[1]["note"] == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("before", [True, False])
def test_a_failing_write_leaves_nothing_and_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: bool
) -> None:
    path = tmp_path / "t"
    if before:
        write(path, note="old")

    def full(tensors: dict, filename: str, metadata: dict) -> None:
        Path(filename).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        write(path, note="new", force=True)
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == ([path] if before else [])
    if before:
        assert read(path)[1]["note"] == "old"
    write(path, note="new", force=True)  # the same call works once there is space
    assert read(path)[1]["note"] == "new"


def test_a_header_that_is_no_json_writes_nothing(tmp_path: Path) -> None:
    for bad in (float("nan"), object()):
        with pytest.raises((ValueError, TypeError)):
            write(tmp_path / "t", value=bad)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 0.6, 0.9, 0.999])
def test_a_truncated_file_is_one_clear_error(tmp_path: Path, share: float) -> None:
    path = write(tmp_path / "t")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(FileFormatError, match="not a whole safetensors file"):
        read(path)
    path.write_bytes(whole)
    read(path)


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "t"
    with pytest.raises(FileFormatError, match="is not a file"):
        read(path)
    with pytest.raises(FileFormatError, match="is not a file"):
        read(tmp_path)
    path.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(FileFormatError, match="not a whole safetensors"):
        read(path)
    for metadata in (None, {"format": "pt"}):
        safetensors.torch.save_file({"a": torch.zeros(2)}, path, metadata=metadata)
        with pytest.raises(FileFormatError, match="of something else"):
            read(path)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{", "damaged header"),
        ("[1]", "damaged header"),
        (json.dumps({"kind": "other", "version": 1}), "holds 'other'; needed 'thing'"),
        (json.dumps({"version": 1}), "holds None"),
        (json.dumps({"kind": "thing", "version": 2}), "version 2; this release reads up to 1"),
        (json.dumps({"kind": "thing", "version": "1"}), "version '1'"),
        (json.dumps({"kind": "thing"}), "version None"),
    ],
)
def test_other_headers_are_refused(tmp_path: Path, text: str, match: str) -> None:
    path = tmp_path / "t"
    safetensors.torch.save_file({"a": torch.zeros(2)}, path, metadata={"repe_unlearn": text})
    with pytest.raises(FileFormatError, match=match):
        read(path)
    good = json.dumps({"kind": "thing", "version": 1})
    safetensors.torch.save_file({"a": torch.zeros(2)}, path, metadata={"repe_unlearn": good})
    read(path)
