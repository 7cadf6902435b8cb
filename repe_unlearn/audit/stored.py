"""Stored results: what an interrupted audit has measured already, one JSON file per attack and model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from repe_unlearn.audit.record import from_record, from_strict_json, to_record, to_strict_json
from repe_unlearn.audit.scores import Scores
from repe_unlearn.audit.series import Series
from repe_unlearn.errors import FileFormatError, InputError
from repe_unlearn.tensorfile import write_text

KIND, VERSION = "repe_unlearn.scores", 1


class Stored:
    """Results by what they depend on; a file is written whole, and one for other inputs is never taken up.

    Args:
        folder: where the files are; None keeps nothing.

    Raises:
        InputError: the folder is a file.
    """

    def __init__(self, folder: str | Path | None) -> None:
        self._folder = None if folder is None else Path(folder)
        if self._folder is not None:
            if self._folder.exists() and not self._folder.is_dir():
                raise InputError(f"{self._folder} is a file; give a folder to resume from.")
            self._folder.mkdir(parents=True, exist_ok=True)

    def load(self, name: str, key: Mapping[str, str]) -> dict[str, Any] | None:
        """Return what was saved under this name for exactly this key, or None.

        Raises:
            FileFormatError: the file is damaged.
        """
        path = self._path(name, key)
        if path is None or not path.exists():
            return None
        content = from_strict_json(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or content.get("kind") != KIND or content.get("version") != VERSION:
            raise FileFormatError(f"{path} is no result of an audit by this release; delete it.")
        return content["result"] if content.get("key") == dict(key) else None

    def save(self, name: str, key: Mapping[str, str], result: Mapping[str, Any]) -> None:
        """Write a result."""
        path = self._path(name, key)
        if path is not None:
            content = {"kind": KIND, "version": VERSION, "key": dict(key), "result": dict(result)}
            write_text(path, to_strict_json(content), force=True)

    def _path(self, name: str, key: Mapping[str, str]) -> Path | None:
        if self._folder is None:
            return None
        digest = hashlib.blake2b(json.dumps(dict(key), sort_keys=True).encode(), digest_size=8).hexdigest()
        return self._folder / f"{name.replace(' ', '_')}-{digest}.json"


def scores_to_record(found: Sequence[Scores]) -> list[dict[str, Any]]:
    """Return scores as JSON values, read back exactly by ``scores_from_record``."""
    return [
        {
            "attack": one.attack,
            "tier": one.tier,
            "unit": one.unit,
            "values": {str(i): value for i, value in one.values.items()},
            "curves": [to_record(series) for series in one.curves],
            "facts": dict(one.facts),
        }
        for one in found
    ]


def scores_from_record(records: Any) -> tuple[Scores, ...]:
    """Return the scores that ``scores_to_record`` wrote.

    Raises:
        FileFormatError: anything else.
    """
    try:
        return tuple(
            Scores(
                one["attack"],
                one["tier"],
                {int(i): value for i, value in one["values"].items()},
                one["unit"],
                tuple(from_record(Series, series, "curves") for series in one["curves"]),
                one["facts"],
            )
            for one in records
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FileFormatError(f"stored scores cannot be used ({error}); delete the file.") from error
