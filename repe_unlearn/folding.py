"""Bake: an erasure plan becomes a weight patch, with an exactness class for every site."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .architectures import Absent, Architecture, Experts, Kind, Read, Weight, Write
from .eraser import Eraser
from .errors import InputError, NotBakeableError, ShapeError, UnsupportedModelError
from .fingerprints import fingerprint
from .patch import Edit, Patch, is_quantised
from .plan import ErasurePlan
from .sites import Site

Exactness = Literal["exact", "erasure-exact"]

_LEVELS: tuple[Exactness, ...] = ("exact", "erasure-exact")


def bake(model: nn.Module, plan: ErasurePlan, *, allow: Exactness = "exact") -> Patch:
    """Return the weight edits that do what the plan's hooks do; the model itself is not touched.

    *exact*: the patched model computes the same function as the hooked one (up to rounding).
    - ``attn_in``, ``mlp_in``, ``final``: every reader W of the tensor becomes ``W (I - L R)``, its bias grows
      by ``W L R shift``. All readers or none.
    - ``attn_out``, ``mlp_out`` of pre-norm families: the writer becomes ``(I - L R) W``,
      ``b -> (I - L R) b + L R shift``.
    *erasure-exact* (only with ``allow="erasure-exact"``): ``attn_out``, ``mlp_out`` of post-norm families. An
    RMS norm with gain g stands between writer and stream, so the writer is projected away from the rows of
    ``R diag(g)``: what R reads from the norm's output is then zero for every input, but the rest of the
    output differs from the hook's because its root mean square changes.

    A bias that does not exist is created where the family's config has a switch for it, so that plain
    transformers loads the exported checkpoint; the other biases of that switch are zero.

    Args:
        model: the model that the plan was fit on, weights in memory and not quantised.
        plan: what to erase where.
        allow: the weakest exactness class that is accepted.

    Raises:
        NotBakeableError: residual-stream sites (a block's skip path has no weight), the MLPs of a mixture of experts,
            a bias without a slot, a class weaker than ``allow``; says what to do instead.
        ModelMismatchError: the plan was fit on another model.
        UnknownSiteError: a site names no module.
        UnsupportedArchitectureError, UnsupportedModelError, ShapeError.

    Example:
        ``patch = bake(model, plan); patch.apply_(model)``
    """
    if allow not in _LEVELS:
        raise InputError(f"got allow={allow!r}; needed one of {', '.join(_LEVELS)}.")
    plan.require(model)
    stacks = Architecture.all_of(model)
    draft = _Draft()
    for site, eraser in plan.erasers.items():
        site.module(model)  # an unknown site is another mistake than one that cannot be baked
        arch = next((arch for arch in stacks if arch.locate(site)), stacks[0])
        located = arch.locate(site)
        if located is None:
            raise NotBakeableError(
                site,
                f"it is no site of the {arch.model_type} row, so its readers and writers are unknown",
                "use apply() to erase there as a hook",
            )
        kind, layer = located
        part = arch.part(kind, None if kind == "final" else layer)
        if part is None:
            raise NotBakeableError(
                site,
                "the residual stream also flows past the block on a skip path that has no weight",
                "erase what the sublayers read (attn_in and mlp_in of the layers from there on), or use "
                "apply() as a hook",
            )
        assert not isinstance(part, Absent)  # locate() finds no absent site
        base = "" if kind == "final" else f"{arch.block(layer)}."
        if isinstance(part, Read):
            if part.hook_only:
                raise NotBakeableError(site, part.hook_only, "use apply() to erase there as a hook")
            draft.exactness[str(site)] = "exact"
            _bake_readers(model, arch, site, eraser, part, base, draft)
        elif part.norm is None:
            draft.exactness[str(site)] = "exact"
            _bake_writer(model, arch, site, eraser, part, base, draft)
        else:
            if allow != "erasure-exact":
                raise NotBakeableError(
                    site,
                    f"{part.norm} stands between {part.writers[0]} and the stream, so no weight edit equals "
                    "the hook",
                    'pass allow="erasure-exact" to remove exactly what the eraser reads (the rest changes '
                    "a little), or use apply()",
                )
            draft.exactness[str(site)] = "erasure-exact"
            _bake_post_norm(model, arch, site, eraser, part, base, draft)
    return _finish(model, stacks, plan, draft)


@dataclass(slots=True)
class _Draft:
    edits: dict[str, Edit] = field(default_factory=dict)
    new_biases: dict[str, tuple[int, ...]] = field(default_factory=dict)
    switches: set[str] = field(default_factory=set)
    exactness: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, edit: Edit) -> None:
        if name in self.edits:
            raise InputError(f"two sites of the plan edit {name}; bake them one after the other.")
        self.edits[name] = edit


def _bake_readers(
    model: nn.Module, arch: Architecture, site: Site, e: Eraser, part: Read, base: str, draft: _Draft
) -> None:
    e = e.to("cpu", torch.float64)
    for reader in _modules(site, part.readers, base):
        name = base + reader
        weight, transposed = _weight(model, arch, name, e.dim, axis="in")
        moved = weight @ e.left  # [out, r]
        draft.add(f"{name}.weight", _edit(-moved, e.right, transposed, "reader: W (I - L R)"))
        constant = moved @ (e.right @ e.shift)
        _bias(model, arch, site, name, reader, constant, "reader: b + W L R shift", draft)


def _bake_writer(
    model: nn.Module, arch: Architecture, site: Site, e: Eraser, part: Write, base: str, draft: _Draft
) -> None:
    e = e.to("cpu", torch.float64)
    (writer,) = _modules(site, part.writers, base)  # only experts have company, and those are refused
    name = base + writer
    weight, transposed = _weight(model, arch, name, e.dim, axis="out")
    draft.add(f"{name}.weight", _edit(-e.left, e.right @ weight, transposed, "writer: (I - L R) W"))
    old = _existing_bias(model, name)
    constant = e.bias() - (e.left @ (e.right @ old) if old is not None else 0.0)
    _bias(model, arch, site, name, writer, constant, "writer: (I - L R) b + L R shift", draft)


def _bake_post_norm(
    model: nn.Module, arch: Architecture, site: Site, e: Eraser, part: Write, base: str, draft: _Draft
) -> None:
    e = e.to("cpu", torch.float64)
    assert part.norm is not None
    gain = _floating(model, f"{base}{part.norm}.weight") + arch.family.norm_offset
    q, _ = torch.linalg.qr((e.right * gain).T)  # orthonormal columns that span the rows of R diag(g)
    (writer,) = _modules(site, part.writers, base)
    name = base + writer
    weight, transposed = _weight(model, arch, name, e.dim, axis="out")
    draft.add(
        f"{name}.weight",
        _edit(-q, q.T @ weight, transposed, "post-norm writer: (I - Q Qᵀ) W, Q spans diag(g) Rᵀ"),
    )
    old = _existing_bias(model, name)
    if old is not None:
        draft.add(f"{name}.bias", Edit(-(q @ (q.T @ old)), None, "post-norm writer: (I - Q Qᵀ) b"))


def _modules(site: Site, weights: tuple[Weight, ...], base: str) -> list[str]:
    """Return the linear modules among readers or writers; refuse experts before anything is edited."""
    stacked = [weight.path for weight in weights if isinstance(weight, Experts)]
    if stacked:
        raise NotBakeableError(
            site,
            f"{base}{stacked[0]} holds the weights of all experts in one tensor, which a patch does not edit",
            "use apply() to erase there as a hook, or bake attention sites only",
        )
    return [weight for weight in weights if isinstance(weight, str)]


def _edit(left: Tensor, right: Tensor, transposed: bool, rule: str) -> Edit:
    return Edit(right.T, left.T, rule) if transposed else Edit(left, right, rule)


def _bias(
    model: nn.Module,
    arch: Architecture,
    site: Site,
    name: str,
    relative: str,
    constant: Tensor,
    rule: str,
    draft: _Draft,
) -> None:
    """Add a constant to a module's bias; make the bias if there is a switch for it."""
    if not bool(constant.any()):
        return
    if _existing_bias(model, name) is None:
        switch = next((key for key, names in arch.family.bias_switches.items() if relative in names), None)
        if switch is None:
            raise NotBakeableError(
                site,
                f"{name} has no bias and the config of {arch.model_type} has no switch to give it one, so "
                "the eraser's constant has no place",
                "fit with functools.partial(leace, affine=False), which needs no bias, or use apply()",
            )
        draft.switches.add(switch)
        draft.new_biases[f"{name}.bias"] = tuple(constant.shape)
    draft.add(f"{name}.bias", Edit(constant, None, rule))


def _finish(model: nn.Module, stacks: tuple[Architecture, ...], plan: ErasurePlan, draft: _Draft) -> Patch:
    zero: dict[str, tuple[int, ...]] = {}
    for arch in stacks:
        switched = [name for key in draft.switches for name in arch.family.bias_switches.get(key, ())]
        for name in (f"{arch.block(i)}.{relative}" for i in range(arch.n_layers) for relative in switched):
            # A block may lack a module that other blocks of the family have.
            weight = getattr(_module(model, name), "weight", None)
            if (
                isinstance(weight, Tensor)
                and f"{name}.bias" not in draft.new_biases
                and _existing_bias(model, name) is None
            ):
                zero[f"{name}.bias"] = (weight.shape[1 if arch.family.transposed else 0],)
    ties = (_tied(model, arch, draft.edits) for arch in stacks)
    return Patch(
        draft.edits,
        plan.fingerprint,
        draft.new_biases,
        zero,
        dict.fromkeys(sorted(draft.switches), True),
        next((tie for tie in ties if tie is not None), None),
        draft.exactness,
        {**plan.provenance, "coverage": _coverage(draft.edits)},
    )


def _tied(model: nn.Module, arch: Architecture, edits: Mapping[str, Edit]) -> tuple[str, str] | None:
    """Return (embedding, head) when an edit touches one of two parameters that are one tensor."""
    final = arch.family.final
    if not isinstance(final, Read) or not final.readers:
        return None
    head, embedding = str(final.readers[0]), arch.path(arch.family.embeddings[0])
    names = (f"{embedding}.weight", f"{head}.weight")
    if not set(names) & set(edits):
        return None
    one = model.get_parameter(names[1]) is model.get_parameter(names[0])
    return names if one else None


def _module(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _coverage(edits: Mapping[str, Edit]) -> str:
    """Count edited weights by what they are, e.g. ``30 q_proj, 30 k_proj``."""
    counts: dict[str, int] = {}
    for name in edits:
        if name.endswith(".weight"):
            part = name.split(".")[-2]
            counts[part] = counts.get(part, 0) + 1
    return ", ".join(f"{n} {part}" for part, n in counts.items())


def _weight(
    model: nn.Module, arch: Architecture, name: str, d: int, axis: Literal["in", "out"]
) -> tuple[Tensor, bool]:
    """Return a linear weight as float64 [out, in], and whether it is stored the other way round."""
    # Conv1D is the only transposed module, and only inside blocks: heads are ordinary Linear modules.
    transposed = arch.family.transposed and name.startswith(f"{arch.path(arch.family.blocks)}.")
    stored = _floating(model, f"{name}.weight")
    weight = stored.T if transposed else stored
    if weight.ndim != 2 or weight.shape[1 if axis == "in" else 0] != d:
        raise ShapeError(
            f"{name}.weight is {tuple(stored.shape)}; an eraser of width {d} does not fit its {axis}put side."
        )
    return weight, transposed


def _floating(model: nn.Module, name: str) -> Tensor:
    path, _, leaf = name.rpartition(".")
    try:
        weight = getattr(model.get_submodule(path), leaf)
    except AttributeError:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no {name} (another head, or a layer that was replaced); load the plain model with its head."
        ) from None
    if weight.is_meta or is_quantised(weight):
        state = "not in memory (offloaded)" if weight.is_meta else f"quantised ({weight.dtype})"
        raise UnsupportedModelError(
            f"{name} is {state}; bake from the full-precision checkpoint, loaded in memory."
        )
    return weight.detach().to("cpu", torch.float64)


def _existing_bias(model: nn.Module, name: str) -> Tensor | None:
    bias = getattr(model.get_submodule(name), "bias", None)
    return None if bias is None else bias.detach().to("cpu", torch.float64)


def exactness(model: nn.Module) -> dict[Kind, dict[str, str]]:
    """Return, for every kind of site of a model, how an affine and a linear eraser there can be baked.

    The answer comes from ``bake`` itself, tried with a rank-1 eraser at the first site of the kind in every sort
    of block that the model has.
    """
    arch = Architecture.of(model)
    found: dict[Kind, dict[str, str]] = {}
    config: Any = model.config
    width: int = getattr(config, "hidden_size", None) or config.get_text_config().hidden_size
    direction = torch.zeros(width, 1, dtype=torch.float64)
    direction[0] = 1.0
    print_ = fingerprint(model)
    layers = [arch.layouts.index(layout) for layout in dict.fromkeys(arch.layouts)]
    for kind in arch.kinds:
        sites = arch.sites(kind, layers=layers)
        found[kind] = {}
        for name, shift in (("affine", torch.ones(width)), ("linear", torch.zeros(width))):
            plan = ErasurePlan(dict.fromkeys(sites, Eraser(direction, direction.T, shift.double())), print_)
            try:
                classes = bake(model, plan, allow="erasure-exact").exactness.values()
                found[kind][name] = max(classes, key=_LEVELS.index)  # type: ignore[arg-type]
            except NotBakeableError as error:
                found[kind][name] = f"hook only: {error.reason}"
    return found
