"""The main job from end to end on the built-in real model: what ``repe-unlearn demo`` runs."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import export
from .architectures import Architecture
from .audit import Report, verify
from .audit.neutral import NEUTRAL
from .errors import OutputExistsError
from .export.folder import new_folder
from .folding import bake
from .hooks import apply
from .models import DEFAULT, load
from .patch import Patch
from .plan import ErasurePlan
from .recipe import Recipe
from .sequential import fit_sequential
from .solvers import leace, mean_difference

_PROMPT = "The nurse came home, took off the coat, and then"


@dataclass(frozen=True, slots=True)
class Size:
    """How much data a demo run uses: pairs to fit on and for the comparison, prompts to probe, every how
    many layers, neutral texts.
    """

    fit_pairs: int
    other_pairs: int
    probe_prompts: int
    every: int
    neutral: int


FULL = Size(fit_pairs=900, other_pairs=200, probe_prompts=560, every=1, neutral=20)
QUICK = Size(fit_pairs=200, other_pairs=40, probe_prompts=176, every=5, neutral=6)


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """What a demo made.

    Attributes:
        report: of ``verify``.
        plan, patch: the eraser and its weight edit.
        folder: where everything lies: plan.safetensors, patch.safetensors, model/, report.html.
        seconds: of each step.
        peak_bytes: largest resident memory of this process so far.
        continuations: what the model says before and after.
    """

    report: Report
    plan: ErasurePlan
    patch: Patch
    folder: Path
    seconds: dict[str, float]
    peak_bytes: int
    continuations: dict[str, str]


def demo(
    out: str | Path,
    *,
    concept: str = "gender",
    model: str = DEFAULT,
    size: Size = FULL,
    force: bool = False,
    seed: int = 0,
    progress: bool = True,
    say: Callable[[str], None] = print,
) -> Outcome:
    """Erase a built-in concept from a real model, as hooks and in the weights, export it and verify everything.

    Args:
        out: folder for the results.
        concept: ``"gender"`` or ``"tense"``.
        model: as for ``load``.
        size: ``FULL`` or ``QUICK``.
        force: replace an earlier result in ``out``.
        seed: of the prompts, the split and all controls.
        progress: show progress bars.
        say: gets one line per step.

    Returns:
        What was made. ``out`` appears whole at the end, or (after an error or Ctrl-C) not at all.

    Raises:
        OutputExistsError: ``out`` exists and ``force`` is False, or it is no earlier result of a demo.
    """
    out = Path(out)
    _refuse_taken(out, force)
    with new_folder(out, force) as folder:
        outcome = _run(folder, concept, model, size, seed, progress, say)
    return replace(outcome, folder=out)


def _refuse_taken(out: Path, force: bool) -> None:
    """Refuse a place that must not be written; only an earlier result or an empty folder is ever replaced."""
    if not (out.exists() or out.is_symlink()):
        return
    if not force:
        raise OutputExistsError(f"{out} exists; choose another folder or pass force=True (--force).")
    folder = out.is_dir() and not out.is_symlink()
    if not folder or (any(out.iterdir()) and not (out / "plan.safetensors").is_file()):
        raise OutputExistsError(
            f"{out} is not replaced even with force: it is no result of a demo (no plan.safetensors)."
        )


def _run(
    out: Path,
    concept: str,
    model: str,
    size: Size,
    seed: int,
    progress: bool,
    say: Callable[[str], None],
) -> Outcome:
    seconds: dict[str, float] = {}

    def step(name: str, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = work()
        seconds[name] = time.perf_counter() - start
        say(f"{name}: {seconds[name]:.1f} s")
        return result

    loaded = step("load", lambda: load(model, progress=progress))
    network, tokenizer = loaded.model, loaded.tokenizer
    recipe = Recipe(concept, size.fit_pairs, seed=seed)
    fit, heldout = step("prompts", recipe.split)
    say(str(fit.describe()))
    arch = Architecture.of(network)
    sites = arch.sites(*arch.reads, layers=range(0, arch.n_layers, size.every))
    fitting = {"select": "mean", "progress": progress, "provenance": recipe.record(fit)}
    plan = step("fit LEACE", lambda: fit_sequential(network, tokenizer, fit, sites, leace, **fitting))
    other = step(
        "fit mean difference",
        lambda: fit_sequential(
            network,
            tokenizer,
            fit.sample(min(size.other_pairs, size.fit_pairs), seed),
            sites,
            mean_difference,
            **fitting,
        ),
    )
    said = step("continue a prompt", lambda: _continuations(network, tokenizer, plan))
    patch = step("bake", lambda: bake(network, plan))
    plan.save(out / "plan.safetensors")
    patch.save(out / "patch.safetensors")
    folder = step(
        "export",
        lambda: export.checkpoint(
            loaded.source, patch, out / "model", tokenizer=tokenizer, progress=progress
        ),
    )
    report = step(
        "verify",
        lambda: verify(
            network,
            tokenizer,
            plan,
            fit=fit,
            heldout=heldout,
            others={"mean difference": other},
            exported=folder,
            neutral=NEUTRAL[: size.neutral],
            probe_prompts=size.probe_prompts,
            seed=seed,
            progress=progress,
        ),
    )
    report.save(out)
    return Outcome(report, plan, patch, out, seconds, _peak_bytes(), said)


def _continuations(model: nn.Module, tokenizer: Any, plan: ErasurePlan) -> dict[str, str]:
    # Only what every model takes: some tokenizers also give token_type_ids, which generate() refuses.
    inputs = {"input_ids": (ids := tokenizer(_PROMPT, return_tensors="pt")["input_ids"])}
    inputs["attention_mask"] = torch.ones_like(ids)
    generator: Any = model

    def go() -> str:
        tokens = generator.generate(
            **inputs, max_new_tokens=16, do_sample=False, pad_token_id=tokenizer.pad_token_id
        )
        return tokenizer.decode(tokens[0], skip_special_tokens=True)

    before = go()
    with apply(model, plan):
        return {"before": before, "after": go()}


def _peak_bytes() -> int:
    # ru_maxrss is in kilobytes on Linux and in bytes on macOS
    import sys

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
