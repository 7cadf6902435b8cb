"""Parts: the tensors of a model that are localised, and the units into which each of them is cut."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from repe_unlearn.architectures import KINDS, Architecture, Kind, Write
from repe_unlearn.errors import InputError, UnsupportedModelError
from repe_unlearn.linears import find
from repe_unlearn.sites import Site

Units = Literal["heads", "neurons"]


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor of a block, cut into equal units along its last axis.

    Attributes:
        layer: number of the block.
        site: where it is.
        units: into how many units it is cut; 1 for the whole vector.
    """

    layer: int
    site: Site
    units: int = 1

    def cut(self, x: Tensor, rows: int) -> Tensor:
        """Return a view ``[rows, t, units, size]`` of the tensor at the site."""
        return x.reshape(rows, -1, self.units, x.shape[-1] // self.units)


def parts(model: nn.Module, what: str, layers: Iterable[int] | None = None) -> tuple[Part, ...]:
    """Return the parts of one sort, layer by layer.

    Args:
        model: of a family with a row.
        what: ``heads`` (what each attention head gives to the output projection), ``neurons`` (each activation that
            the MLP's last matrix reads), or a kind of site such as ``resid_pre`` or ``mlp_out``.
        layers: block numbers; default all.

    Raises:
        InputError: another word, or a layer that does not exist.
        UnsupportedModelError: neurons of a mixture of experts.
    """
    arch = Architecture.of(model)
    if what in ("heads", "neurons"):
        return tuple(
            Part(layer, site, _count(model, arch, site, what)) for layer, site in _inputs(arch, what, layers)
        )
    if what not in KINDS or what == "final":
        kinds = ", ".join(kind for kind in arch.kinds if kind != "final")
        raise InputError(f"got {what!r}; needed heads, neurons, or a kind of site: {kinds}.")
    kind: Kind = what  # type: ignore[assignment]  # checked above
    sites = arch.sites(kind, layers=layers)
    return tuple(Part(located[1], site) for site in sites if (located := arch.locate(site)) is not None)


def unit_sites(model: nn.Module, what: Units, layers: Iterable[int] | None = None) -> tuple[Site, ...]:
    """Return the sites where heads or neurons are: what the last matrix of attention or MLP reads.

    Raises:
        as ``parts``.

    Example:
        ``means = capture(model, tokenizer, contrast, unit_sites(model, "neurons"), select="all")``
    """
    if what not in ("heads", "neurons"):
        raise InputError(f"got {what!r}; needed heads or neurons.")
    return tuple(part.site for part in parts(model, what, layers))


def _inputs(arch: Architecture, what: Units, layers: Iterable[int] | None) -> list[tuple[int, Site]]:
    kind: Kind = "attn_out" if what == "heads" else "mlp_out"
    found = []
    for layer in (located[1] for site in arch.sites(kind, layers=layers) if (located := arch.locate(site))):
        part = arch.part(kind, layer)
        assert isinstance(part, Write)  # sites() refuses what is absent
        writers = [w for w in part.writers if isinstance(w, str)]
        if len(part.writers) != 1 or not writers:
            raise UnsupportedModelError(
                f"block {layer} of this {arch.model_type} is a mixture of experts, where the router chooses which "
                "neurons run for which token; localise mlp_out or heads instead, or pass the layers that are dense."
            )
        found.append((layer, Site(f"{arch.block(layer)}.{writers[0]}", "input")))
    return found


def width(model: nn.Module, arch: Architecture, site: Site) -> int:
    """Return how many numbers the matrix at one of the ``unit_sites`` reads."""
    weight = find(model, f"{site.path}.weight")
    assert isinstance(weight, Tensor)
    return weight.shape[0 if arch.family.transposed else 1]


def _count(model: nn.Module, arch: Architecture, site: Site, what: Units) -> int:
    wide = width(model, arch, site)
    if what == "neurons":
        return wide
    config: Any = model.config
    owner = find(model, site.path.rpartition(".")[0])
    # A linear attention (Qwen3-Next) has a head count of its own.
    heads = getattr(owner, "num_v_heads", None) or config.get_text_config().num_attention_heads
    if wide % heads:
        raise UnsupportedModelError(
            f"{site.path} reads {wide} numbers, which {heads} heads do not divide; heads of unequal width are not "
            "supported."
        )
    return heads
