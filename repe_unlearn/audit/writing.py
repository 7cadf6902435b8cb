"""Write several text files so that a failure leaves none of them behind."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from repe_unlearn.errors import OutputExistsError


def refuse_taken(folder: Path, names: Iterable[str], *, force: bool) -> None:
    """Refuse a folder in which files of these names may not be written.

    Raises:
        OutputExistsError: a file exists and ``force`` is False, or a file and a folder are confused.

    Example:
        >>> refuse_taken(Path(tempfile.mkdtemp()), ["a.txt"], force=False)
    """
    if folder.exists() and not folder.is_dir():
        raise OutputExistsError(f"{folder} is a file; pass a folder to save into.")
    targets = [folder / name for name in names]
    taken = [str(target) for target in targets if target.is_dir() or (target.exists() and not force)]
    if taken:
        raise OutputExistsError(
            f"{', '.join(taken)} already there. Save to another folder, or pass --force (in Python force=True) to replace files."
        )


def write_together(folder: Path, contents: Mapping[str, str], *, force: bool) -> None:
    """Write every file of ``contents`` (name -> text, UTF-8) into ``folder``; a failure leaves no new file.

    All texts go to temporary siblings first, where a full disk shows, and are moved into place last.

    Raises:
        OutputExistsError: as ``refuse_taken``.

    Example:
        >>> write_together(Path(tempfile.mkdtemp()), {"a.txt": "hello"}, force=False)
    """
    refuse_taken(folder, contents, force=force)
    targets = [folder / name for name in contents]
    made = _make(folder)
    pending: list[Path] = []
    placed: list[Path] = []
    try:
        for name, content in contents.items():
            handle, temporary = tempfile.mkstemp(prefix=f".{name}.", dir=folder)
            pending.append(Path(temporary))
            with os.fdopen(handle, "wb") as file:
                # a lone surrogate (a prompt cut inside a character) must not lose the report
                file.write(content.encode("utf-8", "backslashreplace"))
            os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes files that only their owner may read
        for target in targets:
            fresh = not target.exists()
            os.replace(pending[0], target)
            del pending[0]
            if fresh:
                placed.append(target)
    except BaseException:
        for leftover in (*pending, *placed):
            leftover.unlink(missing_ok=True)
        for directory in made:
            directory.rmdir()
        raise


def _make(folder: Path) -> list[Path]:
    """Make the folder and its parents; return those that were missing, deepest first."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
