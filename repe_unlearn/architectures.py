"""Architecture: the row of a model's family bound to one model, so that sites have names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from .errors import InputError, UnsupportedArchitectureError, UnsupportedModelError
from .families import (
    FAMILIES,
    IN_BLOCK,
    KINDS,
    REFUSED,
    Absent,
    Experts,
    Family,
    Index,
    Kind,
    Layout,
    Read,
    Weight,
    Write,
    disk_names,
)
from .sites import Site

__all__ = [
    "FAMILIES",
    "IN_BLOCK",
    "KINDS",
    "Absent",
    "Architecture",
    "Experts",
    "Family",
    "Kind",
    "Layout",
    "Read",
    "Weight",
    "Write",
    "supported",
]


def supported() -> tuple[str, ...]:
    """Return the supported values of ``config.model_type``, sorted."""
    return tuple(sorted({name for family in FAMILIES for name in family.model_types}))


@dataclass(frozen=True, slots=True)
class Architecture:
    """A family's row bound to the blocks of one model.

    Attributes:
        family: the row.
        model_type: of the model.
        layouts: what each block looks like, one per block.
        root: the first component of the row's paths where this model lacks it (loaded without its head), or "".

    Example:
        ``Architecture.of(model).sites("attn_in", layers=range(4))``
    """

    family: Family
    model_type: str
    layouts: tuple[Layout, ...]
    root: str = ""

    @classmethod
    def of(cls, model: nn.Module, *, stack: Literal["encoder", "decoder"] | None = None) -> Architecture:
        """Return the architecture of a model.

        Args:
            model: with or without its head.
            stack: which half of an encoder-decoder model; default the encoder, which is what reads a prompt.

        Raises:
            UnsupportedArchitectureError: its family has no row.
            UnsupportedModelError: the family is known, but the model has no such blocks.
            InputError: the model has no such stack.
        """
        found = cls.all_of(model)
        chosen = next((arch for arch in found if stack in (None, arch.family.stack)), None)
        if chosen is None:
            raise InputError(f"got stack={stack!r}; {type(model).__name__} is one stack. Leave it out.")
        return chosen

    @classmethod
    def all_of(cls, model: nn.Module) -> tuple[Architecture, ...]:
        """Return the architectures of all stacks of a model: two for an encoder-decoder, else one.

        Raises:
            as ``of``.
        """
        config = getattr(model, "config", None)
        model_type = getattr(config, "model_type", None)
        rows = [row for row in FAMILIES if model_type in row.model_types]
        if not rows:
            why = f" ({REFUSED[name]})" if (name := str(model_type)) in REFUSED else ""
            raise UnsupportedArchitectureError(
                f"got {type(model).__name__} with model_type {model_type!r}{why}; supported: "
                f"{', '.join(supported())}. To add a family, add a row to FAMILIES in "
                "repe_unlearn/families.py (repe_unlearn.discover(model) prints it) and run pytest "
                "tests/conformance. Hooks need no row: "
                "name sites yourself, Site('path.of.module')."
            )
        fitting = [
            row for row in rows if all(getattr(config, k, wanted) == wanted for k, wanted in row.when.items())
        ]
        if not fitting:
            needed = " or ".join(str(dict(row.when)) for row in rows)
            raise UnsupportedModelError(
                f"got a {model_type} model with other settings than its row is for; needed {needed} in the "
                "config. Hooks need no row: name sites yourself, Site('path.of.module')."
            )
        found = [arch for row in fitting if (arch := cls.bind(row, model)) is not None]
        if not found:
            raise UnsupportedModelError(
                f"got {type(model).__name__}, which has no {' or '.join(repr(row.blocks) for row in fitting)}; load "
                "the whole model, e.g. AutoModelForCausalLM, or AutoModel without its head."
            )
        return tuple(found)

    @classmethod
    def bind(cls, family: Family, model: nn.Module) -> Architecture | None:
        """Return a row bound to a model, or None if the model has no such list of blocks.

        Raises:
            UnsupportedModelError: a block holds the modules of none of the row's layouts.
        """
        first, _, rest = family.blocks.partition(".")
        headed = isinstance(_find(model, family.blocks), nn.ModuleList)
        blocks = _find(model, family.blocks if headed else rest)
        if not isinstance(blocks, nn.ModuleList):
            return None
        layouts = []
        for i, block in enumerate(blocks):
            fitting = (a for a in family.layouts if all(_find(block, path) is not None for path in a.paths()))
            layout = next(fitting, None)
            if layout is None:
                lacking = [path for path in family.layouts[-1].paths() if _find(block, path) is None]
                raise UnsupportedModelError(
                    f"got a {family.model_types[0]} model whose block {i} has no {', '.join(lacking)} (layers that "
                    "were replaced?); load the plain model. Hooks need no row: name sites yourself, "
                    "Site('path.of.module')."
                )
            layouts.append(layout)
        model_type = str(getattr(getattr(model, "config", None), "model_type", family.model_types[0]))
        return cls(family, model_type, tuple(layouts), "" if headed else f"{first}.")

    @property
    def n_layers(self) -> int:
        """The number of blocks."""
        return len(self.layouts)

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kinds of sites that every block has, and ``final`` if there is one."""
        return tuple(kind for kind in KINDS if not isinstance(self.part(kind), Absent))

    @property
    def reads(self) -> tuple[Kind, ...]:
        """The kinds of sites that sublayers read: with these erased in all layers, no layer reads the concept."""
        reads: tuple[Kind, ...] = ("attn_in", "cross_in", "mlp_in")
        return tuple(kind for kind in reads if kind in self.kinds)

    @property
    def entry(self) -> str:
        """Path of the submodule to run when only this stack is wanted; "" for the whole model."""
        return self.path(self.family.entry)

    def path(self, path: str) -> str:
        """Return a path of the row as it is in this model."""
        return path.removeprefix(self.root)

    def on_disk(self, name: str, shape: Sequence[int] = ()) -> tuple[tuple[str, Index], ...]:
        """Return the tensors of a checkpoint that hold a parameter: see ``families.disk_names``."""
        return disk_names(self.model_type, name, shape)

    def block(self, layer: int) -> str:
        """Return the path of one block."""
        return f"{self.path(self.family.blocks)}.{layer}"

    def part(self, kind: Kind, layer: int | None = None) -> Read | Write | Absent | None:
        """Return what the row says of a kind of site, None for the stream itself.

        Args:
            kind: of the site.
            layer: number of the block; default any: what is absent in one block is absent.
        """
        if kind == "final":
            return self.family.final
        if kind in ("resid_pre", "resid_post"):
            return None
        if layer is not None:
            return self.layouts[layer].part(kind)
        parts = [layout.part(kind) for layout in dict.fromkeys(self.layouts)]
        return next((part for part in parts if isinstance(part, Absent)), parts[0])

    def sites(self, *kinds: Kind, layers: Iterable[int] | None = None) -> tuple[Site, ...]:
        """Return the sites of the given kinds, layer by layer; ``final`` comes last.

        Args:
            kinds: ``attn_in`` and ``mlp_in``: what attention and MLP read (their norm's output); ``attn_out``
                and ``mlp_out``: what they add to the stream; ``cross_in`` and ``cross_out``: the same of the
                cross-attention of a decoder; ``resid_pre`` and ``resid_post``: the stream before and after a
                block; ``final``: what the head reads.
            layers: block numbers, negative ones count from the end; default all.

        Raises:
            InputError: no kind, an unknown kind, a kind that the family does not have (the message says why), or
                a layer that does not exist.
        """
        unknown = [kind for kind in kinds if kind not in KINDS]
        if unknown or not kinds:
            raise InputError(f"got site kinds {list(kinds)}; needed some of {', '.join(self.kinds)}.")
        chosen = range(self.n_layers) if layers is None else [self._layer(i) for i in layers]
        per_block: list[Kind] = [kind for kind in KINDS if kind != "final" and kind in kinds]
        sites = [self._site(kind, layer) for layer in chosen for kind in per_block]
        return (*sites, *([self._site("final", 0)] if "final" in kinds else []))

    def _layer(self, index: int) -> int:
        if not -self.n_layers <= index < self.n_layers:
            raise InputError(f"got layer {index}; this model has layers 0 to {self.n_layers - 1}.")
        return index % self.n_layers

    def _site(self, kind: Kind, layer: int) -> Site:
        block = self.block(layer)
        part = self.part(kind, layer)
        if isinstance(part, Absent):
            raise InputError(f"{self.model_type} has no {kind}: {part.reason}.")
        if part is None:
            return Site(block, "input" if kind == "resid_pre" else "output")
        path = self.path(part.path) if kind == "final" else f"{block}.{part.path}"
        return Site(path, part.side if isinstance(part, Read) else "output")

    def locate(self, site: Site) -> tuple[Kind, int] | None:
        """Return the kind and layer of a site (``n_layers`` for ``final``), or None if it is none of ours."""
        if "final" in self.kinds and site == self._site("final", 0):
            return "final", self.n_layers
        blocks = f"{self.path(self.family.blocks)}."
        head, _, rest = site.path.removeprefix(blocks).partition(".")
        if not site.path.startswith(blocks) or not head.isdecimal() or int(head) >= self.n_layers:
            return None
        layer = int(head)
        if not rest:
            return ("resid_pre" if site.side == "input" else "resid_post"), layer
        for kind in IN_BLOCK:
            absent = isinstance(self.part(kind, layer), Absent)
            if not absent and self._site(kind, layer) == site:
                return kind, layer
        return None


def _find(module: nn.Module, path: str) -> object | None:
    """Return the submodule or parameter at a path, or None."""
    found: object | None = module
    for name in path.split("."):
        found = getattr(found, name, None)
    return found
