"""Measured: what an edit did to a model, in one row of numbers that is the same for every method."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from .answers import answers
from .audit.check import Check
from .audit.neutral import NEUTRAL
from .audit.preservation import costs
from .errors import FileFormatError
from .facts import Facts, Role
from .facts_files import Corpus
from .methods import Method
from .patch import Patch

__all__ = ["Effort", "Goals", "Measured", "attempt", "effort", "measure", "patched"]

NAN = math.nan
# name -> what it is and its unit, in the order in which a table shows them
COLUMNS: Mapping[str, str] = {
    "forget_seen": "forget, seen wordings (greedy accuracy)",
    "forget_unseen": "forget, unseen wordings (greedy accuracy)",
    "forget_chosen": "forget, unseen wordings (right among the options)",
    "margin": "forget, unseen wordings (right over wrong options, nats)",
    "retain": "retain, unseen wordings (greedy accuracy)",
    "neighbour": "neighbours, unseen wordings (greedy accuracy)",
    "forget_loss": "forget text (nats per token)",
    "retain_loss": "retain text (nats per token)",
    "kl": "KL from before on neutral text (nats per token)",
    "kl_p95": "its 95th percentile (nats per token)",
    "relative": "size of the edit over all weights",
    "touched": "size of the edit over the weights that it touches",
    "seconds": "time to make the edit (s)",
    "peak_bytes": "peak memory while it was made (bytes)",
}


@dataclass(frozen=True, slots=True)
class Effort:
    """What making an edit took: wall time, and the most memory that was resident meanwhile (NaN where unknown)."""

    seconds: float = NAN
    peak_bytes: float = NAN


@dataclass(frozen=True, slots=True)
class Measured:
    """One row: a model after an edit, or before any. ``COLUMNS`` says what each number is; NaN is not measured.

    Accuracies count every fact once, whatever its number of wordings. Where a set has no unseen wordings the accuracy
    of what is to be kept is over the seen ones.
    """

    method: str = "before"
    settings: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    forget_seen: float = NAN
    forget_unseen: float = NAN
    forget_chosen: float = NAN
    margin: float = NAN
    retain: float = NAN
    neighbour: float = NAN
    forget_loss: float = NAN
    retain_loss: float = NAN
    kl: float = NAN
    kl_p95: float = NAN
    relative: float = NAN
    touched: float = NAN
    seconds: float = NAN
    peak_bytes: float = NAN

    def kept(self, before: Measured) -> float:
        """Return the smaller share that is left of ``retain`` and ``neighbour``; NaN where neither was there before."""
        pairs = ((self.retain, before.retain), (self.neighbour, before.neighbour))
        return min((now / then for now, then in pairs if then > 0 and not math.isnan(now)), default=NAN)

    def rows(self) -> list[tuple[str, float]]:
        """Return (name, value) of what was measured."""
        found = [(name, getattr(self, name)) for name in COLUMNS]
        return [(name, value) for name, value in found if not math.isnan(value)]

    def to_json(self) -> str:
        """Return strict JSON on one line; what was not measured is null."""
        record = {
            name: None if isinstance(value, float) and math.isnan(value) else value
            for name, value in asdict(self).items()
        }
        return json.dumps(record, allow_nan=False, default=list)

    @classmethod
    def from_json(cls, text: str) -> Measured:
        """Read what ``to_json`` wrote.

        Raises:
            FileFormatError: something else.
        """
        try:
            record: dict[str, Any] = json.loads(text)
            if set(record) != {f.name for f in fields(cls)}:
                raise ValueError(f"it has the keys {sorted(record)}")
            numbers: dict[str, Any] = {k: NAN if v is None else v for k, v in record.items()}
            return cls(**numbers)
        except (ValueError, TypeError) as error:
            raise FileFormatError(f"this is no row of measurements ({error}); measure again.") from error


@dataclass(frozen=True, slots=True)
class Goals:
    """What counts as forgotten, and what damage is accepted.

    Attributes:
        forget: most greedy accuracy on unseen wordings of what is to be forgotten.
        kept: least share of before, of what is retained and of neighbours.
        kl: most KL from before on neutral text, nats per token.
    """

    forget: float = 0.15
    kept: float = 0.9
    kl: float = 0.05

    def checks(self, before: Measured, after: Measured) -> tuple[Check, ...]:
        """Return one check per goal; the control is the model before."""
        left = {
            role: getattr(after, role) / getattr(before, role)
            for role in ("retain", "neighbour")
            if getattr(before, role) > 0
        }
        return (
            Check.at_most(
                "forget_unseen",
                after.forget_unseen,
                self.forget,
                control=before.forget_unseen,
                note=COLUMNS["forget_unseen"],
            ),
            *(
                Check.at_least(
                    f"{role}.kept", share, self.kept, control=1.0, note=f"{COLUMNS[role]}, share of before"
                )
                for role, share in left.items()
            ),
            Check.at_most("kl", after.kl, self.kl, control=0.0, note=COLUMNS["kl"]),
        )


GOALS = Goals()

Edited = Patch | Callable[[], AbstractContextManager[Any]] | None


def measure(
    model: nn.Module,
    tokenizer: Any,
    source: Facts | Corpus,
    edit: Edited = None,
    *,
    retain: Corpus | None = None,
    texts: Sequence[str] = NEUTRAL,
    method: str = "",
    settings: Mapping[str, Any] | None = None,
    seed: int = 0,
    effort: Effort | None = None,
    progress: bool = True,
) -> Measured:
    """Return what an edit does, on wordings that no method has seen and on neutral text.

    Args:
        model: the model before; it is edited while it is asked, and put back bit for bit.
        tokenizer: its tokenizer.
        source: facts, or free text to forget.
        edit: a patch; or what gives a context in which the model is edited, such as ``lambda: apply(model, plan)``;
            None measures the model as it is.
        retain: free text to keep.
        texts: neutral text for the KL.
        method: for the row; default "before" without an edit, else "edit".
        settings: for the row.
        seed: for the row.
        effort: for the row, what ``effort`` gave.
        progress: show a progress bar.

    Raises:
        ModelMismatchError: the patch is of another model.
        InputError, NonFiniteError: as ``answers``; NaN in the edited model among them.

    Example:
        ``measure(model, tokenizer, facts, patch).forget_unseen``
    """
    enter = _context(model, edit)
    if isinstance(source, Facts):
        numbers = _asked(model, tokenizer, source, enter, progress)
    else:
        numbers = {"forget_loss": _loss(model, tokenizer, source, enter)}
    if retain is not None:
        numbers["retain_loss"] = _loss(model, tokenizer, retain, enter)
    if edit is None:
        numbers |= {"kl": 0.0, "kl_p95": 0.0, "relative": 0.0, "touched": 0.0}
    else:
        cost = costs(model, tokenizer, texts, {"edited": enter})["edited"]
        numbers |= {"kl": cost.kl_mean, "kl_p95": cost.kl_p95}
    if isinstance(edit, Patch):
        numbers["relative"], numbers["touched"] = _sizes(model, edit)
    name = method or ("before" if edit is None else "edit")
    spent = {} if effort is None else asdict(effort)
    return Measured(name, dict(settings or {}), seed, **numbers, **spent)


def attempt(
    model: nn.Module,
    tokenizer: Any,
    source: Facts | Corpus,
    method: Method,
    options: Mapping[str, Any] | None = None,
    *,
    retain: Corpus | None = None,
    texts: Sequence[str] = NEUTRAL,
    seed: int = 0,
    progress: bool = True,
) -> tuple[Patch, Measured]:
    """Return the patch of a method with some options, and what it does and took.

    Raises:
        as ``Method.run`` and ``measure``.
    """
    settings = method.settings(options or {})
    patch, spent = effort(
        lambda: method.run(model, tokenizer, source, retain, seed=seed, progress=progress, **settings)
    )
    row = measure(
        model,
        tokenizer,
        source,
        patch,
        retain=retain,
        texts=texts,
        method=method.name,
        settings=settings,
        seed=seed,
        effort=spent,
        progress=progress,
    )
    return patch, row


def effort(make: Callable[[], Patch]) -> tuple[Patch, Effort]:
    """Return what a function makes, and what that took.

    Peak memory is that of the process, model included, and is known on Linux only.
    """
    status = Path("/proc/self/status")
    try:
        # Writing 5 sets the peak (VmHWM) back to what is resident now.
        Path("/proc/self/clear_refs").write_text("5")
        known = status.exists()
    except OSError:
        known = False
    start = time.perf_counter()
    made = make()
    seconds = time.perf_counter() - start
    lines = status.read_text().splitlines() if known else []
    peak = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), NAN)
    return made, Effort(seconds, float(peak))


def _context(model: nn.Module, edit: Edited) -> Callable[[], AbstractContextManager[Any]]:
    if edit is None:
        return nullcontext
    return (lambda: patched(model, edit)) if isinstance(edit, Patch) else edit


@contextmanager
def patched(model: nn.Module, patch: Patch) -> Iterator[nn.Module]:
    """Apply a patch for as long as the context lasts."""
    patch.apply_(model)
    try:
        yield model
    finally:
        patch.revert_(model)


def _asked(
    model: nn.Module,
    tokenizer: Any,
    facts: Facts,
    enter: Callable[[], AbstractContextManager[Any]],
    progress: bool,
) -> dict[str, float]:
    kept: tuple[Role, ...] = ("retain", "neighbour")
    form = "unseen" if facts.questions("unseen", roles=kept) else "seen"
    # Wrong options count for one number only; each of several tokens is a run of its own, so the others go without.
    plain = (*facts.questions("seen", roles=["forget"]), *facts.questions(form, roles=kept))
    questions = (
        *(replace(question, options=()) for question in plain),
        *facts.questions("unseen", roles=["forget"]),
    )
    with enter():
        said = answers(model, tokenizer, facts, questions=questions, progress=progress)
    return {
        "forget_seen": said.accuracy("forget", form="seen"),
        "forget_unseen": said.accuracy("forget", form="unseen"),
        "forget_chosen": said.mean(said.chosen, "forget", form="unseen"),
        "margin": said.mean(said.margin, "forget", form="unseen"),
        **{role: said.accuracy(role, form=form) for role in kept},
    }


def _loss(
    model: nn.Module, tokenizer: Any, corpus: Corpus, enter: Callable[[], AbstractContextManager[Any]]
) -> float:
    return math.log(costs(model, tokenizer, corpus.texts, {"edited": enter})["edited"].perplexity)


def _sizes(model: nn.Module, patch: Patch) -> tuple[float, float]:
    """Return the norm of the edit over that of all weights, and over that of the weights it touches."""
    squares = {name: float(p.detach().double().square().sum()) for name, p in model.named_parameters()}
    edit = sum(edit.norm() ** 2 for edit in patch.edits.values())
    touched = sum(squares.get(name, 0.0) for name in patch.edits)
    return tuple(float(np.sqrt(edit / size)) if size else NAN for size in (sum(squares.values()), touched))  # type: ignore[return-value]  # two of them
