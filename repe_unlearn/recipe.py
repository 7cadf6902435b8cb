"""Recipe: which prompts a plan was fit on, so that a later verification finds the held-out ones again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .builtin import BUILTINS
from .contrast import Contrast
from .errors import InputError
from .readers import read_csv, read_jsonl


@dataclass(frozen=True, slots=True)
class Recipe:
    """Where labelled prompts come from and how they are split; the same recipe gives the same two sides.

    Args:
        contrast: a built-in name, or a ``.jsonl`` / ``.csv`` file with the columns text and label (and optionally
            group, template, pair), or positive and negative.
        pairs: most pairs to fit on.
        test: share that is held out, content and wording.
        seed: of generation, split and sampling.

    Example:
        >>> fit, heldout = Recipe("gender", pairs=20, test=0.25, seed=0).split()
        >>> len(fit), set(fit.templates) & set(heldout.templates)
        (40, set())
    """

    contrast: str
    pairs: int
    test: float = 0.25
    seed: int = 0

    def split(self) -> tuple[Contrast, Contrast]:
        """Return the fitting and the held-out prompts.

        Raises:
            InputError: no such contrast or file.
            NotEnoughDataError: nothing can be held out.
        """
        if self.contrast in BUILTINS:
            # A split holds out content and wording and drops what mixes the two: make more than is used.
            everything = Contrast.builtin(self.contrast, pairs=4 * self.pairs, seed=self.seed)
        else:
            everything = _read(Path(self.contrast))
        fit, heldout = everything.split(self.test, seed=self.seed)
        if self.pairs < len(set(fit.pairs)):
            fit = fit.sample(min(self.pairs, fit.units()[0]), self.seed)
        return fit, heldout

    def record(self, fit: Contrast) -> dict[str, str]:
        """Return what a plan's provenance keeps: this recipe and a digest of the fitting prompts."""
        return {
            "contrast": self.contrast,
            "pairs": str(self.pairs),
            "test": str(self.test),
            "seed": str(self.seed),
            "data": fit.digest(),
        }

    @classmethod
    def prompts_of(
        cls, provenance: Mapping[str, str], contrast: str | None = None
    ) -> tuple[Contrast, Contrast]:
        """Return the fitting and held-out prompts that a plan's provenance records.

        Args:
            provenance: of a plan that was made with ``record``.
            contrast: other prompts than the recorded ones.

        Raises:
            InputError: nothing (usable) is recorded, or the prompts are not those of the fit any more, so that
                held-out ones might have been fit on.
        """
        missing = [key for key in ("contrast", "pairs", "test", "seed") if key not in provenance]
        if missing:
            raise InputError(
                f"the plan does not record its {', '.join(missing)}; it was not made by 'fit'. Verify it from Python instead."
            )
        try:
            numbers = int(provenance["pairs"]), float(provenance["test"]), int(provenance["seed"])
        except ValueError as error:
            raise InputError(
                f"the plan records no usable numbers of its split ({error}); fit it again."
            ) from None
        fit, heldout = cls(contrast or provenance["contrast"], *numbers).split()
        if contrast is None and "data" in provenance and fit.digest() != provenance["data"]:
            raise InputError(
                f"the prompts of {provenance['contrast']} changed since the plan was fit, so held-out prompts may have "
                "been fit on; fit the plan again, or restore the file."
            )
        return fit, heldout


def _read(path: Path) -> Contrast:
    if path.suffix not in (".jsonl", ".csv"):
        raise InputError(f"got contrast {str(path)!r}; needed gender, tense, or a .jsonl or .csv file.")
    jsonl = path.suffix == ".jsonl"
    present = set((read_jsonl if jsonl else read_csv)(path).columns)
    paired = {"positive", "negative"} <= present

    def column(name: str, wanted: bool = True) -> str | None:
        return name if wanted and name in present else None

    return (Contrast.from_jsonl if jsonl else Contrast.from_csv)(
        path,
        group=column("group"),
        template=column("template"),
        pair=column("pair", not paired),
        positive=column("positive", paired),
        negative=column("negative", paired),
    )
