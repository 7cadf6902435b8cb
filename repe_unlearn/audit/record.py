"""Dataclass to JSON record and back, exactly; a number that JSON cannot hold is null with a note."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any, TypeVar

from repe_unlearn.errors import FileFormatError, InputError

NOTE = "not_finite"
_SPELLING = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}

T = TypeVar("T")


def to_strict_json(content: Any) -> str:
    """Indented JSON without NaN or Infinity (ValueError if one slipped in)."""
    return json.dumps(content, allow_nan=False, ensure_ascii=False, indent=1) + "\n"


def from_strict_json(source: str) -> Any:
    """Parsed JSON; FileFormatError for text that is cut, foreign, or uses NaN and Infinity literals."""

    def refuse(literal: str) -> Any:
        raise ValueError(f"{literal} is not JSON")

    try:
        return json.loads(source, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise FileFormatError(
            f"this is not strict JSON ({error}). Pass the full text of a report.json, not its path."
        ) from error


def to_record(instance: Any) -> dict[str, Any]:
    """Field name -> JSON value of a dataclass; ``not_finite`` names what every null number was."""
    record: dict[str, Any] = {}
    was: dict[str, Any] = {}
    for field in dataclasses.fields(instance):
        value = getattr(instance, field.name)
        if isinstance(value, tuple):
            lost = {str(i): str(v) for i, v in enumerate(value) if _is_lost(v)}
            value = [None if _is_lost(v) else v for v in value]
            if lost:
                was[field.name] = lost
        elif _is_lost(value):
            was[field.name] = str(value)
            value = None
        record[field.name] = value
    if was:
        record[NOTE] = was
    return record


def from_record(kind: type[T], record: Any, where: str) -> T:
    """The dataclass that ``to_record`` turned into ``record``; ``where`` names the record in errors."""
    if not isinstance(record, dict):
        raise FileFormatError(f"{where} is a {type(record).__name__}; it must be an object.")
    values = dict(record)
    was = values.pop(NOTE, {})
    named = {field.name for field in dataclasses.fields(kind)}  # pyright: ignore[reportArgumentType]
    if set(values) != named:
        raise FileFormatError(
            f"{where} lacks {sorted(named - set(values))} and has unknown {sorted(set(values) - named)}; "
            "it was cut or edited. Run the verification again."
        )
    try:
        for name, spelling in was.items():
            if isinstance(spelling, dict):
                for index, word in spelling.items():
                    _restore(values[name], int(index), word)
            else:
                _restore(values, name, spelling)
        return kind(**values)
    except (InputError, AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        raise FileFormatError(f"{where} cannot be used: {error}. Run the verification again.") from error


def _is_lost(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _restore(holder: Any, key: Any, spelling: str) -> None:
    if holder[key] is not None:
        raise ValueError(f"{NOTE} names {key!r}, whose value is not null")
    holder[key] = _SPELLING[spelling]
