"""Parking: what paused forward passes hold, kept in place up to a budget and beyond it on the host or in files."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import numpy as np
import torch
from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .errors import InputError

_UNITS = {
    "": 1,
    "KB": 1e3,
    "MB": 1e6,
    "GB": 1e9,
    "TB": 1e12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}


def in_bytes(memory: int | str) -> int:
    """Return a number of bytes, given as one or as text with a unit (``"4GiB"``, ``"500 MB"``).

    Raises:
        InputError: negative or not a size.

    Example:
        >>> in_bytes("1.5 KiB"), in_bytes(7)
        (1536, 7)
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?B)?", str(memory).strip().upper())
    if isinstance(memory, bool) or not found or (found[2] or "") not in (*_UNITS, "B"):
        raise InputError(
            f"got memory={memory!r}; needed bytes or a text such as '4GiB', or None for no limit."
        )
    return int(float(found[1]) * _UNITS.get(found[2] or "", 1))


# No site of a known model holds more than about four times what the first one does.
_SURELY_FITS = 8


class Parking(TorchDispatchMode):
    """Empties the tensors of waiting runs of a model and fills them again, bit for bit, before each goes on.

    While active it sees every tensor that a run makes, so it needs to know nothing of the model. At most
    ``memory`` bytes of waiting runs stay where they are; beyond that, those of an accelerator go to the host
    (again ``memory`` bytes at most), and the rest to files in ``folder``. The run that is computing is not
    counted. Weights, and tensors that were there before, are never touched; a tensor that one run made and
    another uses (a cache in a module) is brought back at once and stays.

    Args:
        memory: bytes.
        folder: an existing folder for files; whoever made it removes it.
    """

    def __init__(self, memory: int, folder: Path):
        super().__init__()
        self._memory, self._folder = memory, folder
        self._free, self._free_on_host = memory, memory
        self._running: int | None = None
        self._made: dict[int, WeakSet[UntypedStorage]] = {}  # alive storages by the run that made them
        self._stay: dict[int, int] = {}  # bytes of the waiting runs that stay where they are
        self._away: WeakKeyDictionary[UntypedStorage, Tensor | Path] = WeakKeyDictionary()

    @contextmanager
    def running(self, run: int) -> Iterator[None]:
        """Inside, run number ``run`` computes: its tensors are there, and what is made is taken to be its own."""
        self._free += self._stay.pop(run, 0)
        made = self._made.setdefault(run, WeakSet())
        for storage in [s for s in made if s in self._away]:
            self._bring(storage)
        self._running = run
        try:
            yield
        finally:
            self._running = None

    def park(self, run: int) -> None:
        """Move the tensors of a run that waits now out of the way, unless they fit into what is free."""
        held = self.held(run)
        if held <= self._free:
            self._stay[run] = held
            self._free -= held
            return
        for i, storage in enumerate(self._made[run]):
            if storage.resizable():
                self._send(storage, self._folder / f"{run}-{i}")

    def roomy(self) -> bool:
        """True when nothing is parked and many times what waits now would still fit."""
        return not self._away and _SURELY_FITS * (self._memory - self._free) <= self._memory

    def held(self, run: int) -> int:
        """Return the bytes that a run holds now, parked ones left out."""
        return sum(storage.nbytes() for storage in self._made[run])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = set(_storages((args, kwargs)))
        for storage in given:
            if storage in self._away:  # made by another run: something shared, never to be parked again
                self._bring(storage)
                for made in self._made.values():
                    made.discard(storage)
        result = func(*args, **kwargs)
        if self._running is not None:
            # A view of something given belongs to whom that belongs to: a transposed weight is not the run's.
            self._made[self._running].update(s for s in _storages(result) if s not in given)
        return result

    def _send(self, storage: UntypedStorage, path: Path) -> None:
        size = storage.nbytes()
        content = _bytes_of(storage).to("cpu", copy=True)  # what numpy has seen can no longer be emptied
        if storage.device.type != "cpu" and size <= self._free_on_host:
            self._free_on_host -= size
            self._away[storage] = content
        else:
            try:
                content.numpy().tofile(path)
            except OSError as error:
                error.add_note(
                    f"{size:,} bytes did not go into {path.parent}; give another scratch=, or more memory=."
                )
                raise
            self._away[storage] = path
        storage.resize_(0)

    def _bring(self, storage: UntypedStorage) -> None:
        place = self._away.pop(storage)
        if isinstance(place, Path):
            content = torch.from_numpy(np.fromfile(place, np.uint8))
            place.unlink()
        else:
            content = place
            self._free_on_host += len(content)
        storage.resize_(len(content))
        _bytes_of(storage).copy_(content)


def _storages(values: Any) -> Iterator[UntypedStorage]:
    for leaf in tree_leaves(values):
        if type(leaf) in (Tensor, torch.nn.Parameter) and leaf.layout == torch.strided:
            yield leaf.untyped_storage()


def _bytes_of(storage: UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
