"""Parking by itself: runs of plain torch code whose tensors go away while they wait and come back bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from repe_unlearn.errors import InputError
from repe_unlearn.parking import Parking, in_bytes

KB = 1000


def make(n: int = 250) -> Tensor:
    return torch.randn(n)  # 4 bytes each


def test_a_waiting_run_is_empty_and_comes_back(tmp_path: Path) -> None:
    weight = torch.randn(3, 3)
    with Parking(0, tmp_path) as parking:
        with parking.running(0):
            x, turned = make(), weight.T
            view, kept = x[5:], x.clone()
            bits = x.tolist()
        parking.park(0)
        assert parking.held(0) == 0
        assert [t.untyped_storage().nbytes() for t in (x, view, kept)] == [0, 0, 0]
        assert turned.untyped_storage().nbytes() == 36  # a weight is not the run's, nor is a view of it
        assert sum(file.stat().st_size for file in tmp_path.iterdir()) == 2 * KB
        with parking.running(0):
            assert x.tolist() == kept.tolist() == bits
            assert view.tolist() == bits[5:]
    assert not list(tmp_path.iterdir())


def test_what_fits_stays(tmp_path: Path) -> None:
    with Parking(2500, tmp_path) as parking:
        tensors = []
        for run in range(3):
            with parking.running(run):
                tensors.append(make())
            parking.park(run)
        assert [parking.held(run) for run in range(3)] == [KB, KB, 0]
        with parking.running(0):
            tensors[0] = make(1)  # the old one is gone, so the last run fits when it waits again
        parking.park(0)
        with parking.running(2):
            pass
        parking.park(2)
        assert [parking.held(run) for run in range(3)] == [4, KB, KB]


def test_what_runs_share_is_brought_back_and_stays(tmp_path: Path) -> None:
    cache: dict[str, Tensor] = {}
    with Parking(0, tmp_path) as parking:
        with parking.running(0):
            cache["mask"] = make()
        parking.park(0)
        assert parking.held(0) == 0  # control: nothing tells yet that it is shared
        with parking.running(1):
            assert float((cache["mask"] - cache["mask"]).norm()) == 0
        parking.park(1)
        assert cache["mask"].untyped_storage().nbytes() == KB
        with parking.running(0):
            pass
        parking.park(0)
        assert cache["mask"].untyped_storage().nbytes() == KB


def test_what_numpy_sees_is_left_alone(tmp_path: Path) -> None:
    with Parking(0, tmp_path) as parking:
        with parking.running(0):
            x = make()
            seen = x.numpy()
        parking.park(0)
        assert seen.tolist() == x.tolist()


def test_roomy(tmp_path: Path) -> None:
    for memory, wanted in ((0, False), (7 * KB, False), (8 * KB, True)):
        with Parking(memory, tmp_path) as parking:
            with parking.running(0):
                x = make()
            parking.park(0)
            assert parking.roomy() is wanted
            del x


def test_a_full_disk_is_said(tmp_path: Path) -> None:
    with Parking(0, tmp_path / "gone") as parking:
        with parking.running(0):
            x = make()
        with pytest.raises(OSError, match="No such file") as caught:
            parking.park(0)
        assert "give another scratch=" in caught.value.__notes__[0]
        assert len(x.tolist()) == 250


@pytest.mark.parametrize(
    ("text", "size"),
    [(7, 7), ("7", 7), ("7 B", 7), ("4GiB", 2**32), ("500 mb", 5 * 10**8), ("1.5KiB", 1536), ("0", 0)],
)
def test_sizes(text: int | str, size: int) -> None:
    assert in_bytes(text) == size


@pytest.mark.parametrize("text", [-1, "", "GiB", "4 Gb/s", "many", True, "4 PiB"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(InputError, match="needed bytes or a text such as '4GiB'"):
        in_bytes(text)
