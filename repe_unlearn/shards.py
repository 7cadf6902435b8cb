"""Shards: activations on disk, streamed by ``capture(keep=...)`` and read back without loading them all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import FileFormatError, InputError, OutputExistsError
from .moments import Accumulator, Moments
from .ranks import rank_and_world
from .sites import Site
from .tensorfile import read_tensors, write_tensors

_PARTS = ("x", "z", "owner")
_KIND, _VERSION, _INDEX = "activations", 1, "index.json"
# Large enough for a disk to be fast, small enough to be held in memory beside a model.
_SHARD_BYTES = 256 * 2**20


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Raw activations of one site.

    Attributes:
        x: ``[m, d]``; on the CPU as float32 (float64 where the model is float64) from ``gather``, in the order of the
            examples; as stored from ``Shards``.
        z: ``[m]`` labels.
        owner: ``[m]`` index of the example each row belongs to.
    """

    x: Tensor
    z: Tensor
    owner: Tensor

    @classmethod
    def joined(cls, parts: list[Rows]) -> Rows:
        """Return the parts as one, in the order of the examples."""
        owner = torch.cat([part.owner for part in parts])
        order = torch.argsort(owner, stable=True)
        x, z = (torch.cat([getattr(part, name) for part in parts])[order] for name in ("x", "z"))
        return cls(x, z, owner[order])


def on_host(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return a copy in CPU memory; from a GPU it is under way until ``arrived()``, while further work is queued."""
    host = torch.empty(x.shape, dtype=dtype or x.dtype, pin_memory=x.is_cuda)
    return host.copy_(x.to(dtype or x.dtype), non_blocking=True)


def arrived() -> None:
    """Wait for the copies of ``on_host``."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class ShardWriter:
    """Collects rows and writes a shard whenever about 256 MiB are waiting; ``finish`` writes the index.

    Without its index the folder does not open, so an interrupted run cannot be mistaken for a whole one. If nobody
    is to go on with it (``resumable=False``), an error removes what was written.

    Args:
        folder: of the shards; made here.
        sites: whose activations come.
        dtype: of the stored rows; None keeps theirs.
        written: number of shards of an interrupted run to go on after; later ones are replaced.
        resumable: leave the shards in place on an error.

    Raises:
        OutputExistsError: the folder holds something already.
    """

    def __init__(
        self,
        folder: str | Path,
        sites: tuple[Site, ...],
        *,
        dtype: torch.dtype | None,
        written: int | None,
        resumable: bool,
    ) -> None:
        self._folder, self._sites, self._dtype, self._resumable = Path(folder), sites, dtype, resumable
        self._rank, self._world = rank_and_world()
        if written is None and self._folder.exists() and any(self._folder.glob(f"{self._stem}*")):
            raise OutputExistsError(
                f"{folder} holds activations already; choose another folder or delete it."
            )
        if (self._folder / _INDEX).exists():
            raise OutputExistsError(
                f"{folder} is a finished folder of activations; choose another or delete it."
            )
        if dtype is not None and not dtype.is_floating_point:
            raise InputError(f"got keep_dtype={dtype}; needed a floating-point dtype.")
        self._folder.mkdir(parents=True, exist_ok=True)
        self.written = written or 0
        self._waiting: dict[Site, list[Rows]] = {site: [] for site in sites}
        self._bytes = 0

    @property
    def _stem(self) -> str:
        return f"shard-{self._rank:03d}-"

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and not self._resumable:
            for path in self._folder.glob(f"{self._stem}*"):
                path.unlink()
            if not any(self._folder.iterdir()):
                self._folder.rmdir()

    def add(self, site: Site, rows: Rows) -> None:
        """Take the rows of one batch."""
        kept = Rows(on_host(rows.x, self._dtype), on_host(rows.z), on_host(rows.owner))
        self._waiting[site].append(kept)
        self._bytes += kept.x.nbytes

    def after_batch(self) -> None:
        """Write a shard if enough rows are waiting; between batches only, so that a shard holds whole ones."""
        if self._bytes >= _SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what is waiting as a shard."""
        if not self._bytes:
            return
        arrived()
        tensors: dict[str, Tensor] = {}
        for i, site in enumerate(self._sites):
            for name in _PARTS:
                parts = [getattr(rows, name) for rows in self._waiting[site]]
                tensors[f"{name}.{i}"] = torch.cat(parts)
        path = self._folder / f"{self._stem}{self.written:05d}.safetensors"
        header = {"sites": [str(site) for site in self._sites]}
        write_tensors(path, tensors, kind=_KIND, version=_VERSION, header=header, force=True)
        self.written += 1
        self._waiting = {site: [] for site in self._sites}
        self._bytes = 0

    def finish(self, facts: Mapping[str, object]) -> None:
        """Write what is left, then (rank 0) the index of all ranks' shards."""
        self.flush()
        paths = [self._folder / f"{self._stem}{i:05d}.safetensors" for i in range(self.written)]
        mine = {path.name: path.stat().st_size for path in paths}
        for path in set(self._folder.glob(f"{self._stem}*.safetensors")) - set(paths):
            path.unlink()  # of the interrupted run, written after its last state was saved
        parts = [mine]
        if self._world > 1:
            parts = [{} for _ in range(self._world)]
            dist.all_gather_object(parts, mine)
        if self._rank == 0:
            index = {
                "kind": _KIND,
                "version": _VERSION,
                "sites": [str(site) for site in self._sites],
                **facts,
                "shards": {name: size for part in parts for name, size in part.items()},
            }
            partial = self._folder / f".{_INDEX}.partial"
            partial.write_text(json.dumps(index, indent=2, allow_nan=False) + "\n", encoding="utf-8")
            os.replace(partial, self._folder / _INDEX)
        if self._world > 1:
            dist.barrier()


class Shards:
    """A folder of activations that ``capture(..., keep=folder)`` wrote; rows are read when they are asked for.

    Args:
        folder: with ``index.json`` and the shards that it names.

    Attributes:
        sites: what was captured.
        facts: what the index says: ``fingerprint``, ``select``, ``classes`` (None for reals), ``examples``.

    Raises:
        FileFormatError: no index (the capture was interrupted), a foreign or newer folder, a shard that is missing or
            has another size.

    Example:
        ``rows = Shards("activations").gather(site); eraser = inlp(rows.x, rows.z)``
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        path = self._folder / _INDEX
        if not path.is_file():
            raise FileFormatError(
                f"{folder} has no {_INDEX}: it is no folder of activations, or its capture was interrupted. Resume "
                "the capture, or capture again."
            )
        try:
            index: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            whole = index["kind"] == _KIND and index["version"] <= _VERSION
            sites, shards = [Site.parse(text) for text in index["sites"]], dict(index["shards"])
        except (ValueError, KeyError, TypeError) as error:
            raise FileFormatError(f"{path} is damaged or foreign ({error}); capture again.") from error
        if not whole:
            raise FileFormatError(
                f"{path} holds {index['kind']!r} version {index['version']!r}; this release reads {_KIND!r} up to "
                f"{_VERSION}."
            )
        for name, size in shards.items():
            if not (self._folder / name).is_file() or (self._folder / name).stat().st_size != size:
                raise FileFormatError(f"{self._folder / name} is missing or not whole; capture again.")
        self.sites: tuple[Site, ...] = tuple(sites)
        self.facts: Mapping[str, Any] = {
            k: v for k, v in index.items() if k not in ("kind", "version", "sites", "shards")
        }
        self._shards = list(shards)

    def rows(self, site: Site) -> Iterator[Rows]:
        """Yield the rows of a site shard by shard, in the order of capture; one shard's rows are in memory at a time.

        Raises:
            InputError: the site was not captured.
        """
        number = self._number(site)
        for name in self._shards:
            tensors, _ = read_tensors(
                self._folder / name,
                kind=_KIND,
                version=_VERSION,
                names=[f"{part}.{number}" for part in _PARTS],
            )
            yield Rows(*(tensors[f"{part}.{number}"] for part in _PARTS))

    def gather(self, site: Site) -> Rows:
        """Return all rows of a site in the order of the examples, as ``gather`` does; for probes and solvers on rows."""
        return Rows.joined(list(self.rows(site)))

    def moments(self, site: Site) -> Moments:
        """Return the moments of a site; those of the capture bit for bit if rows were stored in their own dtype."""
        sums = Accumulator(classes=self.facts["classes"])
        for rows in self.rows(site):
            sums.add(rows.x, rows.z)
        return sums.moments()

    def _number(self, site: Site) -> int:
        if site not in self.sites:
            raise InputError(
                f"got {site!r}, which was not captured; {self._folder} holds {len(self.sites)} sites."
            )
        return self.sites.index(site)

    def __repr__(self) -> str:
        return f"Shards({str(self._folder)!r}, {len(self.sites)} sites, {len(self._shards)} shards)"
