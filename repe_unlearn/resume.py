"""Progress: the state of an interrupted capture, in one file, from which it goes on to the same bits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from .errors import FileFormatError, InputError, ModelMismatchError
from .moments import Accumulator
from .ranks import rank_and_world
from .sites import Site
from .tensorfile import read_tensors, write_tensors

_KIND, _VERSION = "capture in progress", 1


class Progress:
    """Saves accumulators every few batches and takes them up again; each rank has a file of its own.

    The file is replaced as a whole, between batches, so it is valid whenever the run stops.

    Args:
        path: of the file; ranks after the first add ``.rank1``, ...
        every: batches between two savings, >= 1.
        facts: what has to be the same when the capture goes on; the names appear in the error.

    Raises:
        InputError: every is not a positive number.
    """

    def __init__(self, path: str | Path, every: int, facts: Mapping[str, str]) -> None:
        if not isinstance(every, int) or every < 1:
            raise InputError(f"got every={every!r}; needed a number of batches >= 1.")
        rank, world = rank_and_world()
        self.path = Path(path) if rank == 0 else Path(f"{path}.rank{rank}")
        self.every = every
        self._facts = {**facts, "rank": f"{rank} of {world}"}

    def load(self, sums: Mapping[Site, Accumulator]) -> tuple[int, int]:
        """Restore the accumulators and return the numbers of batches and shards that are done; (0, 0) without a file.

        Raises:
            ModelMismatchError: the file is of another model.
            InputError: it is of other sites, data or options.
            FileFormatError: truncated or foreign file.
        """
        if not self.path.exists():
            return 0, 0
        tensors, header = read_tensors(self.path, kind=_KIND, version=_VERSION)
        saved = header.get("facts", {})
        if different := [name for name, value in self._facts.items() if saved.get(name) != value]:
            told = "; ".join(
                f"{name}: {saved.get(name)} there, {self._facts[name]} here" for name in different
            )
            error = ModelMismatchError if "model" in different else InputError
            raise error(
                f"{self.path} is the progress of another capture ({told}). Go on with the same, or delete it to begin "
                "anew."
            )
        try:
            for i, (accumulator, device) in enumerate(zip(sums.values(), header["devices"], strict=True)):
                prefix = f"{i}."
                state = {
                    name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)
                }
                accumulator.restore({name: t.to(device) for name, t in state.items()})
            return int(header["batches"]), int(header["shards"])
        except (KeyError, ValueError, RuntimeError) as error:
            raise FileFormatError(
                f"{self.path} cannot be taken up here ({error}); delete it and begin anew."
            ) from error

    def save(self, sums: Mapping[Site, Accumulator], batches: int, shards: int) -> None:
        """Write the state after a number of batches."""
        states = [accumulator.state() for accumulator in sums.values()]
        header = {
            "facts": self._facts,
            "batches": batches,
            "shards": shards,
            "devices": [str(state["rows"].device) if state else "cpu" for state in states],
        }
        tensors = {f"{i}.{name}": t for i, state in enumerate(states) for name, t in state.items()}
        tensors = tensors or {"none": torch.zeros(0)}
        write_tensors(self.path, tensors, kind=_KIND, version=_VERSION, header=header, force=True)

    def remove(self) -> None:
        """Delete the file: the capture is complete."""
        self.path.unlink(missing_ok=True)
