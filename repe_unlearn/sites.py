"""Site: the name of one activation tensor of a model."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Literal

from torch import nn

from .errors import InputError, UnknownSiteError

Side = Literal["input", "output"]

_SIDES = ("input", "output")


@dataclass(frozen=True, slots=True, order=True)
class Site:
    """One named activation tensor: what enters or leaves one module.

    The name is the dotted path that ``model.named_modules()`` gives, so a site means the same thing to hooks,
    to baking and to a reader. It is hashable, ordered and parses back from its own text.

    Args:
        path: dotted module path, e.g. ``"model.layers.7.mlp.down_proj"``.
        side: ``"output"`` (default) or ``"input"`` of that module.

    Raises:
        InputError: empty path or a side that is neither input nor output.

    Example:
        >>> site = Site("model.layers.7.input_layernorm")
        >>> str(site), Site.parse("model.layers.7.mlp:input")
        ('model.layers.7.input_layernorm', Site('model.layers.7.mlp:input'))
    """

    path: str
    side: Side = "output"

    def __post_init__(self) -> None:
        if not self.path or not isinstance(self.path, str):
            raise InputError(
                f"got the site path {self.path!r}; needed a dotted module path such as 'model.layers.0'."
            )
        if self.side not in _SIDES:
            raise InputError(f"got side {self.side!r} for site {self.path!r}; needed one of {_SIDES}.")

    @classmethod
    def parse(cls, text: str) -> Site:
        """Return the site that ``str(site)`` was made from."""
        path, colon, side = text.rpartition(":")
        if not colon:
            return cls(text)
        return cls(path, side)  # type: ignore[arg-type]  # __post_init__ checks the value

    def __str__(self) -> str:
        # A module name may hold a colon (a ModuleDict key); then the side is written out, so that it parses back.
        plain = self.side == "output" and ":" not in self.path
        return self.path if plain else f"{self.path}:{self.side}"

    def __repr__(self) -> str:
        return f"Site({str(self)!r})"

    def module(self, model: nn.Module) -> nn.Module:
        """Return the module that the site names.

        Raises:
            UnknownSiteError: the model has no such module; the message holds the nearest names.
        """
        try:
            return model.get_submodule(self.path)
        except AttributeError:
            names = [name for name, _ in model.named_modules() if name]
            near = difflib.get_close_matches(self.path, names, n=3, cutoff=0.4)
            hint = f"nearest: {', '.join(near)}" if near else "see model.named_modules()"
            raise UnknownSiteError(
                f"got the site {self.path!r}; {type(model).__name__} has no module of that name ({hint})."
            ) from None
