"""Time two ways of doing the same thing in turn, and say on which machine."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch


@dataclass(frozen=True, slots=True)
class Timing:
    """Medians in seconds of ``a`` and ``b``, and the median of the ratios a / b of the single rounds."""

    a: float
    b: float
    ratio: float


def side_by_side(a: Callable[[], object], b: Callable[[], object], rounds: int, warmup: int = 1) -> Timing:
    """Run both in turn, so that whatever else the machine does hits both alike; the order flips every round."""
    seconds: dict[str, list[float]] = {"a": [], "b": []}
    for i in range(warmup + rounds):
        pair = (("a", a), ("b", b))
        for name, run in pair if i % 2 else reversed(pair):
            start = time.perf_counter()
            run()
            if i >= warmup:
                seconds[name].append(time.perf_counter() - start)
    ratios = [x / y for x, y in zip(seconds["a"], seconds["b"], strict=True)]
    return Timing(statistics.median(seconds["a"]), statistics.median(seconds["b"]), statistics.median(ratios))


def machine(*packages: str) -> str:
    """Return one line: processor, threads, versions."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", *packages))
    return (
        f"{_processor()}, {torch.get_num_threads()} threads, Python {platform.python_version()}, {versions}"
    )


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
