"""Read labelled prompts from JSONL, CSV and datasets into tables with named columns."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from repe_unlearn.errors import FileFormatError, InputError, NotEnoughDataError

__all__ = ["Columns", "Table", "read_csv", "read_dataset", "read_jsonl"]


@dataclass(frozen=True, slots=True)
class Columns:
    """Which column holds what; None where there is none.

    Attributes:
        text: the prompt.
        label: the label.
        group: content that must not be shared across splits.
        template: wording that must not be shared across splits.
        pair: name shared by prompts that differ only in the label.
        positive: class-1 text of a pair; with `negative` it replaces text, label and pair.
        negative: class-0 text of a pair.
    """

    text: str = "text"
    label: str = "label"
    group: str | None = None
    template: str | None = None
    pair: str | None = None
    positive: str | None = None
    negative: str | None = None

    @property
    def needed(self) -> tuple[str, ...]:
        """Names of the columns that will be read."""
        body = (
            (self.positive, self.negative)
            if self.positive or self.negative
            else (self.text, self.label, self.pair)
        )
        return tuple(name for name in (*body, self.group, self.template) if name is not None)


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of a file or data set, and where they came from.

    Attributes:
        source: what to call it in messages, such as the path.
        columns: names of the columns found.
        rows: one mapping per row.
        first: number that the source itself gives to the first row (line 2 of a CSV file with a header).
        class_names: class names that the source declares, if any.

    Example:
        >>> Table("memory", ("text",), ({"text": "hello"},)).texts("text")
        ['hello']
    """

    source: str
    columns: tuple[str, ...]
    rows: tuple[Mapping[str, Any], ...]
    first: int = 0
    class_names: tuple[str, ...] | None = None

    def check(self, names: Iterable[str]) -> None:
        """Raise InputError with the columns found unless every one of `names` is a column."""
        for name in names:
            if name not in self.columns:
                found = ", ".join(self.columns) or "none"
                raise InputError(
                    f"{self.source} has no column {name!r}; found: {found}. Rename the column, or in Python "
                    "say which one it is."
                )

    def column(self, name: str) -> list[Any]:
        """Values of one column.

        Args:
            name: the column.

        Returns:
            One value per row, unconverted.

        Raises:
            InputError: no such column, or a row lacks it; the message lists the columns found.
        """
        self.check((name,))
        for i, row in enumerate(self.rows):
            if row.get(name) is None:
                raise InputError(f"{self.source}, row {i + self.first}: column {name!r} is missing or null")
        return [row[name] for row in self.rows]

    def texts(self, name: str, *, blank: bool = False) -> list[str]:
        """Values of a column of strings; InputError names the row that holds something else, or nothing unless `blank`."""
        values = self.column(name)
        for i, value in enumerate(values):
            if not isinstance(value, str):
                raise InputError(
                    f"{self.source}, row {i + self.first}: column {name!r} holds {value!r}, text is needed"
                )
            if not blank and not value.strip():
                raise InputError(
                    f"{self.source}, row {i + self.first}: column {name!r} is empty; remove the row or fill it"
                )
        return values

    def strings(self, name: str | None) -> list[str] | None:
        """Values of a column as strings, whole numbers included; None where `name` is None."""
        return None if name is None else [str(value) for value in self.column(name)]

    def labels(self, name: str, classes: Sequence[str] | None = None) -> list[str | int]:
        """Values of a column of class names or ids; numbers as text are ids, unless they name classes."""
        values = self.column(name)
        named = classes is not None and all(value in classes for value in values)
        if not named and all(
            isinstance(value, str) and value.strip().lstrip("-").isdecimal() for value in values
        ):
            return [int(value) for value in values]
        return [value.strip() if isinstance(value, str) else value for value in values]

    def reals(self, name: str) -> list[float]:
        """Values of a column of numbers; InputError names the row that holds something else."""
        values = []
        for i, value in enumerate(self.column(name)):
            try:
                values.append(float(value))
            except (TypeError, ValueError):
                where = f"{self.source}, row {i + self.first}"
                raise InputError(f"{where}: column {name!r} holds {value!r}, a number is needed") from None
        return values

    def sentences(self, words: str, tags: str) -> list[tuple[list[str], list[str | None]]]:
        """Words and tags of every row: lists, or strings split at whitespace where "-" is no tag."""
        made = []
        for i, (left, right) in enumerate(zip(self.column(words), self.column(tags), strict=True)):
            listed = [value.split() if isinstance(value, str) else value for value in (left, right)]
            if not all(isinstance(value, Sequence) for value in listed):
                where = f"{self.source}, row {i + self.first}"
                raise InputError(
                    f"{where}: {words!r} and {tags!r} must be lists, or strings of words separated by spaces"
                )
            spoken = [None if isinstance(right, str) and tag == "-" else tag for tag in listed[1]]
            made.append((list(listed[0]), spoken))
        return made


def read_jsonl(path: str | Path) -> Table:
    """Read a file of one JSON object per line; blank lines are skipped.

    Args:
        path: the file, UTF-8 with or without a byte-order mark.

    Returns:
        The rows; a column that only some lines have is a column.

    Raises:
        InputError: no such file.
        FileFormatError: a line is no JSON object, or the file is not UTF-8; the message gives the line.
        NotEnoughDataError: no lines.
    """
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise FileFormatError(
                f"{path}, line {number}: bad JSON ({error.msg} at column {error.colno})"
            ) from error
        if not isinstance(row, dict):
            kind = type(row).__name__
            raise FileFormatError(f"{path}, line {number}: a JSON object {{...}} is needed, this is {kind}")
        rows.append(row)
    if not rows:
        raise NotEnoughDataError(f"{path} is empty; one JSON object per line is needed")
    return Table(str(path), tuple(dict.fromkeys(key for row in rows for key in row)), tuple(rows), first=1)


def read_csv(path: str | Path, *, delimiter: str = ",") -> Table:
    """Read a CSV file whose first line names the columns.

    Args:
        path: the file, UTF-8 with or without a byte-order mark.
        delimiter: the character between cells.

    Returns:
        The rows, every value a string.

    Raises:
        InputError: no such file, or the delimiter is not one character.
        FileFormatError: a row has more or fewer cells than the header, a column name occurs twice, or the
            file is
            not UTF-8 or no CSV; the message gives the line.
        NotEnoughDataError: no rows.
    """
    if len(delimiter) != 1:
        raise InputError(f"delimiter={delimiter!r}: one character is needed")
    reader = csv.reader(_lines(path), delimiter=delimiter, strict=True)
    rows: list[dict[str, str]] = []
    header: list[str] | None = None
    try:
        for cells in reader:
            if not cells:
                continue
            if header is None:
                header = [cell.strip() for cell in cells]
                if len(set(header)) < len(header):
                    raise FileFormatError(
                        f"{path}: a column name occurs twice in the first line: {', '.join(header)}"
                    )
                continue
            if len(cells) != len(header):
                raise FileFormatError(
                    f"{path}, line {reader.line_num}: {len(cells)} cells, but the header has {len(header)}; "
                    "quote cells that contain the delimiter"
                )
            rows.append(dict(zip(header, cells, strict=True)))
    except csv.Error as error:
        raise FileFormatError(f"{path}, line {reader.line_num}: bad CSV ({error})") from error
    if header is None or not rows:
        raise NotEnoughDataError(f"{path} is empty; a line of column names and at least one row are needed")
    return Table(str(path), tuple(header), tuple(rows), first=2)


def read_dataset(dataset: Any, columns: Columns) -> Table:
    """Read the needed columns of one split of a Hugging Face dataset.

    Args:
        dataset: one split; iterable over mappings.
        columns: which columns will be read; the others (audio, images) are not decoded.

    Returns:
        The rows, with the class names of the label column where it declares them.

    Raises:
        InputError: a dictionary of splits, or a column is missing.
        NotEnoughDataError: no rows.
    """
    if isinstance(dataset, Mapping):
        splits = ", ".join(map(repr, dataset))
        raise InputError(
            f"this is a dictionary of splits ({splits}); pass one of them, such as "
            f"dataset[{next(iter(dataset), '')!r}]"
        )
    found = getattr(dataset, "column_names", None)
    if found and hasattr(dataset, "select_columns"):
        Table("the dataset", tuple(found), ()).check(columns.needed)
        dataset = dataset.select_columns(list(dict.fromkeys(columns.needed)))
    rows = tuple(dict(row) for row in dataset)
    if not rows:
        raise NotEnoughDataError("the dataset has no rows")
    feature = (getattr(dataset, "features", None) or {}).get(columns.label)
    names = getattr(getattr(feature, "feature", feature), "names", None)  # tags are lists of class labels
    return Table(
        "the dataset",
        tuple(found or dict.fromkeys(key for row in rows for key in row)),
        rows,
        class_names=tuple(names) if names else None,
    )


def _lines(path: str | Path) -> Iterable[str]:
    path = Path(path)
    if not path.is_file():
        raise InputError(f"there is no file {str(path)!r}; check the path")
    try:
        # newline="" leaves line ends inside quoted CSV cells alone.
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from file
    except UnicodeDecodeError as error:
        raise FileFormatError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); convert it first"
        ) from error
