"""Keep the results of a long benchmark in a folder, so that a second run goes on where the first one stopped."""

from __future__ import annotations

import argparse
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any


def same_settings(args: argparse.Namespace, free: Collection[str]) -> None:
    """Refuse to mix runs of several settings in the folder ``args.out``; ``free`` names those that may differ."""
    settings = {name: value for name, value in vars(args).items() if name not in free}
    file: Path = args.out / "settings.json"
    if file.exists() and json.loads(file.read_text("utf-8")) != settings:
        raise SystemExit(f"{args.out} holds runs of other settings ({file.name}); name another --out")
    file.write_text(json.dumps(settings), encoding="utf-8")


def write(file: Path, found: Any) -> None:
    """Write a result whole or not at all."""
    part = file.with_suffix(".part")
    part.write_text(json.dumps(found), encoding="utf-8")
    part.replace(file)
