"""Bake: an erasure plan becomes a weight patch, with an exactness class for every site."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .architectures import IN_BLOCK, Absent, Architecture, Experts, Read, Weight, Write
from .eraser import Eraser
from .errors import InputError, NotBakeableError, UnsupportedModelError
from .fingerprints import fingerprint
from .linears import Linear, existing, find, floating, linear
from .patch import Edit, Patch
from .plan import ErasurePlan
from .sites import Site
from .stream import plan_stream, stream_sites

Exactness = Literal["exact", "erasure-exact", "approximate"]
Tied = Literal["untie", "adapter", "skip"]

_LEVELS: tuple[Exactness, ...] = ("exact", "erasure-exact", "approximate")
_TIED: tuple[Tied, ...] = ("untie", "adapter", "skip")
_LINEAR = "fit with functools.partial(leace, affine=False), which needs no bias, or use apply()"


def bake(model: nn.Module, plan: ErasurePlan, *, allow: Exactness = "exact", tied: Tied = "untie") -> Patch:
    """Return the weight edits that do what the plan's hooks do; the model itself is not touched.

    *exact*: the patched model computes the same function as the hooked one (up to rounding).
    - ``attn_in``, ``mlp_in``, ``final``: every reader W of the tensor becomes ``W (I - L R)``, its bias grows
      by ``W L R shift``. All readers or none: routers, shared experts and every expert too.
    - ``attn_out``, ``mlp_out`` of pre-norm families: every writer becomes ``(I - L R) W``,
      ``b -> (I - L R) b + L R shift``. What several experts write is weighted, so the constant of an affine eraser
      has a place only where those weights sum to 1 and the experts have biases (gpt-oss).
    - the input of a writer that is one module, ``Site(f"{block}.mlp.down_proj", "input")``: as a reader.
    - ``resid_pre`` of the first layer: the rows of the embeddings, the constant in the one that every position gets.
    - ``plan_stream(model, eraser)``: all of these writers.
    *erasure-exact* (only with ``allow="erasure-exact"``): ``attn_out``, ``mlp_out`` of post-norm families. An
    RMS norm with gain g stands between writer and stream, so the writer is projected away from the rows of
    ``R diag(g)``: what R reads from the norm's output is then zero for every input, but the rest of the
    output differs from the hook's because its root mean square changes. The same for embeddings behind a LayerNorm.

    A bias that does not exist is created where the family's config has a switch for it, so that plain
    transformers loads the exported checkpoint; the other biases of that switch are zero.

    Args:
        model: the model that the plan was fit on, weights in memory and not quantised.
        plan: what to erase where.
        allow: the weakest exactness class that is accepted.
        tied: what to do when an edit is for one of two tied weights, embedding and head. ``untie``: they part, and
            the other one stays as it is. ``adapter``: the same, but files are to keep the tie, with the edit in an
            adapter (``export.lora``). ``skip``: neither is edited, the site becomes ``approximate`` and
            ``provenance["skipped"]`` says how large the edit would have been; asking for it is consent.

    Returns:
        The patch. ``provenance["coverage"]`` counts what was edited of what there is: ``30/30 o_proj``.

    Raises:
        NotBakeableError: residual-stream sites (a block's skip path has no weight), a constant without a bias slot,
            a class weaker than ``allow``, a stream plan that lacks a writer; says what to do instead.
        ModelMismatchError: the plan was fit on another model.
        UnknownSiteError: a site names no module.
        UnsupportedArchitectureError, UnsupportedModelError, ShapeError.

    Example:
        ``patch = bake(model, plan); patch.apply_(model)``
    """
    if allow not in _LEVELS:
        raise InputError(f"got allow={allow!r}; needed one of {', '.join(_LEVELS)}.")
    if tied not in _TIED:
        raise InputError(f"got tied={tied!r}; needed one of {', '.join(_TIED)}.")
    plan.require(model)
    stacks = Architecture.all_of(model)
    draft = _Draft()
    for site, eraser in plan.erasers.items():
        site.module(model)  # an unknown site is another mistake than one that cannot be baked
        arch = next((arch for arch in stacks if arch.locate(site) or writer_input(arch, site)), stacks[0])
        _bake_site(_Job(model, arch, site, eraser.to("cpu", torch.float64), draft), allow)
    if plan.provenance.get("scope") == "stream":
        _require_all_writers(stacks, plan)
    return _finish(model, stacks, plan, draft, tied)


@dataclass(slots=True)
class _Draft:
    edits: dict[str, Edit] = field(default_factory=dict)
    sites: dict[str, Site] = field(default_factory=dict)  # of every edit
    new_biases: dict[str, tuple[int, ...]] = field(default_factory=dict)
    switches: set[str] = field(default_factory=set)
    exactness: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Job:
    """One site to bake."""

    model: nn.Module
    arch: Architecture
    site: Site
    e: Eraser
    draft: _Draft
    base: str = ""  # prefix of the block

    def add(self, name: str, edit: Edit) -> None:
        if name in self.draft.edits:
            raise InputError(f"two sites of the plan edit {name}; bake them one after the other.")
        self.draft.edits[name] = edit
        self.draft.sites[name] = self.site

    def refuse(self, reason: str, instead: str = "use apply() to erase there as a hook") -> NotBakeableError:
        return NotBakeableError(self.site, reason, instead)

    def weights(self, listed: tuple[Weight, ...], axis: Literal["in", "out"]) -> Iterator[Linear]:
        return (linear(self.model, self.arch, self.base, weight, self.e.dim, axis) for weight in listed)


def _bake_site(job: _Job, allow: Exactness) -> None:
    arch, draft, key = job.arch, job.draft, str(job.site)
    located = arch.locate(job.site)
    if located is None and (inner := writer_input(arch, job.site)) is not None:
        draft.exactness[key] = "exact"
        layer, path = inner
        _bake_readers(replace(job, base=f"{arch.block(layer)}."), Read(path, (path,), "input"))
        return
    if located is None:
        raise job.refuse(
            f"it is no site of the {arch.model_type} row, so its readers and writers are unknown"
        )
    kind, layer = located
    part = arch.part(kind, None if kind == "final" else layer)
    if part is None and (kind, layer) == ("resid_pre", 0):
        draft.exactness[key] = _bake_embeddings(job, allow)
        return
    if part is None:
        raise job.refuse(
            "the residual stream also flows past the block on a skip path that has no weight",
            "erase what the sublayers read (attn_in and mlp_in of the layers from there on), erase all of the "
            "stream by one map (plan_stream(model, eraser)), or use apply() as a hook",
        )
    assert not isinstance(part, Absent)  # locate() finds no absent site
    job = replace(job, base="" if kind == "final" else f"{arch.block(layer)}.")
    if isinstance(part, Read):
        if part.hook_only:
            raise job.refuse(part.hook_only)
        draft.exactness[key] = "exact"
        _bake_readers(job, part)
    elif part.norm is None:
        draft.exactness[key] = "exact"
        _bake_writers(job, part)
    else:
        if allow == "exact":
            raise job.refuse(
                f"{part.norm} stands between {part.writers[0]} and the stream, so no weight edit equals the hook",
                'pass allow="erasure-exact" to remove exactly what the eraser reads (the rest changes '
                "a little), or use apply()",
            )
        draft.exactness[key] = "erasure-exact"
        _bake_post_norm(job, part, part.norm)


def writer_input(arch: Architecture, site: Site) -> tuple[int, str] | None:
    """Return layer and path in its block if a site is what one writer reads, the neurons or the heads; else None."""
    layer, _, path = site.path.removeprefix(f"{arch.path(arch.family.blocks)}.").partition(".")
    if site.side != "input" or not layer.isdecimal() or int(layer) >= arch.n_layers:
        return None
    parts = (arch.part(kind, int(layer)) for kind in IN_BLOCK)
    writers = [weight for part in parts if isinstance(part, Write) for weight in part.writers]
    return (int(layer), path) if path in writers and site.path == f"{arch.block(int(layer))}.{path}" else None


def _bake_readers(job: _Job, part: Read) -> None:
    e = job.e
    for reader in job.weights(part.readers, "in"):
        moved = reader.each(lambda w: w @ e.left)  # [..., out, r]
        job.add(reader.name, reader.edit(-moved, e.right, "reader: W (I - L R)"))
        _bias(job, reader, moved @ (e.right @ e.shift), "reader: b + W L R shift")


def _bake_writers(job: _Job, part: Write) -> None:
    e, constant = job.e, job.e.bias()
    if any(isinstance(w, Experts) for w in part.writers) and not part.convex and constant.any():
        raise job.refuse(
            f"{part.path} adds up experts with weights that need not sum to 1 (or a shared expert without weight), so "
            "the eraser's constant has no place",
            _LINEAR,
        )
    for writer in job.weights(part.writers, "out"):
        read = writer.each(lambda w: e.right @ w)  # [..., r, in]
        job.add(writer.name, writer.edit(-e.left, read, "writer: (I - L R) W"))
        old = existing(job.model, writer.bias)
        change = constant if old is None else constant - (old @ e.right.T) @ e.left.T
        _bias(job, writer, change, "writer: (I - L R) b + L R shift")


def _bake_post_norm(job: _Job, part: Write, norm: str) -> None:
    gain = floating(job.model, f"{job.base}{norm}.weight").to("cpu", torch.float64)
    # orthonormal columns that span the rows of R diag(g)
    q, _ = torch.linalg.qr((job.e.right * (gain + job.arch.family.norm_offset)).T)
    for writer in job.weights(part.writers, "out"):
        read = writer.each(lambda w: q.T @ w)
        job.add(writer.name, writer.edit(-q, read, "post-norm writer: (I - Q Qᵀ) W, Q spans diag(g) Rᵀ"))
        old = existing(job.model, writer.bias)
        if old is not None:
            job.add(writer.bias, Edit(-(old @ q) @ q.T, None, "post-norm writer: (I - Q Qᵀ) b"))


def _bake_embeddings(job: _Job, allow: Exactness) -> Exactness:
    family, e = job.arch.family, job.e
    if family.embedding_hook_only:
        raise job.refuse(family.embedding_hook_only)
    if family.embedding_linear_only and e.bias().any():
        raise job.refuse(f"{family.embedding_linear_only}, so the eraser's constant has no place", _LINEAR)
    if family.embedding_norm and allow == "exact":
        raise job.refuse(
            f"{family.embedding_norm} stands between the embeddings and the stream, so no weight edit equals the hook",
            'pass allow="erasure-exact" to remove exactly what the eraser reads, or use apply()',
        )
    if family.embedding_norm:
        e = _before_layernorm(job, job.arch.path(family.embedding_norm))
    for i, path in enumerate(map(job.arch.path, family.embeddings)):
        constant = e.right @ e.shift / _embedding_scale(job, path) if i == 0 else e.shift.new_zeros(e.rank)
        found = find(job.model, path)
        name = path if isinstance(found, nn.Parameter) else f"{path}.weight"
        stored = floating(job.model, name)
        if isinstance(found, nn.Conv2d):  # patches of an image
            flat = stored.to("cpu", torch.float64).flatten(1)
            job.add(name, Edit(-(e.left @ (e.right @ flat)).view_as(stored), None, "embedding: (I - L R) W"))
            old = existing(job.model, f"{path}.bias")
            if old is not None:
                job.add(f"{path}.bias", Edit(-e.left @ (e.right @ old), None, "embedding: (I - L R) b"))
            continue
        if stored.shape[-1] != e.dim:
            raise job.refuse(
                f"{name} is {stored.shape[-1]} wide and the eraser {e.dim}: it fits another model, or a projection "
                "stands between the embeddings and the stream"
            )
        # A vocabulary is long: a part of it at a time in float64.
        read = torch.cat(
            [rows.to("cpu", torch.float64) @ e.right.T for rows in stored.split(4096, dim=-2)], dim=-2
        )
        rule = "embedding: E (I - L R)ᵀ" + (" + L R shift" if constant.any() else "")
        job.add(name, Edit(constant - read, e.left.T, rule))
    return "erasure-exact" if family.embedding_norm else "exact"


def _before_layernorm(job: _Job, norm: str) -> Eraser:
    """Edit a LayerNorm's bias; return the projection before it after which R reads a constant behind it."""
    e = job.e
    gain = floating(job.model, f"{norm}.weight").to("cpu", torch.float64)
    seen = e.right * gain  # what R reads of the normalised vector, which is centred
    q, _ = torch.linalg.qr((seen - seen.mean(dim=1, keepdim=True)).T)
    old = existing(job.model, f"{norm}.bias")
    assert old is not None
    job.add(f"{norm}.bias", Edit(e.left @ (e.right @ (e.shift - old)), None, "norm: (I - L R) b + L R shift"))
    return Eraser(q, q.T, torch.zeros_like(e.shift))


def _embedding_scale(job: _Job, path: str) -> float:
    """Return the factor between the first embedding and the stream, as rounded by the model."""
    key = job.arch.family.embedding_scale
    module = find(job.model, path)
    if (
        key is None
        and isinstance(module, nn.Embedding)
        and type(module) is not nn.Embedding
        and job.e.bias().any()
    ):
        raise job.refuse(
            f"{path} is a {type(module).__name__}, which may scale what it looks up, and the row of "
            f"{job.arch.model_type} has no embedding_scale",
            "set embedding_scale in its row, use a linear eraser, or use apply()",
        )
    if key is None:
        return 1.0
    scale = getattr(module, key, None)
    if isinstance(scale, Tensor):
        return float(scale.to(floating(job.model, f"{path}.weight").dtype))
    return float(getattr(job.model.config, key))  # type: ignore[union-attr]


def _bias(job: _Job, weight: Linear, constant: Tensor, rule: str) -> None:
    """Add a constant to a weight's bias; make the bias if there is a switch for it."""
    if not bool(constant.any()):
        return
    if existing(job.model, weight.bias) is None:
        relative = weight.bias.removeprefix(job.base).removesuffix(".bias")
        switches = job.arch.family.bias_switches
        switch = next((key for key, names in switches.items() if relative in names), None)
        if switch is None:
            raise job.refuse(
                f"{weight.name.removesuffix('.weight')} has no bias and the config of {job.arch.model_type} has no "
                "switch to give it one, so the eraser's constant has no place",
                _LINEAR,
            )
        job.draft.switches.add(switch)
        job.draft.new_biases[weight.bias] = tuple(constant.shape)
    job.add(weight.bias, Edit(constant, None, rule))


def _require_all_writers(stacks: tuple[Architecture, ...], plan: ErasurePlan) -> None:
    arch = next(arch for arch in stacks if arch.locate(plan.sites[0]))
    missing = [site for site in stream_sites(arch) if site not in plan.erasers]
    if missing:
        raise NotBakeableError(
            missing[0],
            f"the plan is for the whole stream and lacks {len(missing)} of its writers, which would go on writing",
            "make the plan with plan_stream(model, eraser)",
        )


def _finish(
    model: nn.Module, stacks: tuple[Architecture, ...], plan: ErasurePlan, draft: _Draft, tied: Tied
) -> Patch:
    facts = dict(plan.provenance)
    tie = next((tie for arch in stacks if (tie := _tied(model, arch, draft)) is not None), None)
    if tie is not None and tied == "skip":
        facts["skipped"] = _skip(model, draft, tie)
        tie = None
    zero: dict[str, tuple[int, ...]] = {}
    for arch in stacks:
        switched = [name for key in draft.switches for name in arch.family.bias_switches.get(key, ())]
        for name in (f"{arch.block(i)}.{relative}" for i in range(arch.n_layers) for relative in switched):
            # A block may lack a module that other blocks of the family have.
            weight = getattr(find(model, name), "weight", None)
            if (
                isinstance(weight, Tensor)
                and f"{name}.bias" not in draft.new_biases
                and existing(model, f"{name}.bias") is None
            ):
                zero[f"{name}.bias"] = (weight.shape[1 if arch.family.transposed else 0],)
    return Patch(
        draft.edits,
        plan.fingerprint,
        draft.new_biases,
        zero,
        dict.fromkeys(sorted(draft.switches), True),
        tie,
        draft.exactness,
        {**facts, "coverage": _coverage(model, stacks, draft.edits)},
        adapter=tie is not None and tied == "adapter",
    )


def _tied(model: nn.Module, arch: Architecture, draft: _Draft) -> tuple[str, str] | None:
    """Return (embedding, head) when an edit touches one of two parameters that are one tensor."""
    final, embedding = arch.family.final, f"{arch.path(arch.family.embeddings[0])}.weight"
    head = f"{final.readers[0]}.weight" if isinstance(final, Read) and final.readers else ""
    one = find(model, embedding)
    if one is None or not {embedding, head} & set(draft.edits):
        return None
    others = {
        name
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter is one and name != embedding
    }
    if embedding in draft.edits and others - {head}:
        raise NotBakeableError(
            draft.sites[embedding],
            f"{embedding} is one tensor with {', '.join(sorted(others - {head}))}, which no config can part",
            "use apply() to erase there as a hook",
        )
    return (embedding, head) if head in others else None


def _skip(model: nn.Module, draft: _Draft, tie: tuple[str, str]) -> str:
    """Drop the edits of tied weights; return what they would have changed, in words."""
    told = []
    for name in tie:
        edit = draft.edits.pop(name, None)
        if edit is None:
            continue
        draft.edits.pop(
            f"{name.removesuffix('weight')}bias", None
        )  # its constant belongs to the weight's edit
        draft.exactness[str(draft.sites[name])] = "approximate"
        share = edit.norm() / float(torch.linalg.vector_norm(floating(model, name), dtype=torch.float64))
        told.append(f"{name} keeps what its edit would have changed: {share:.2%} of its norm")
    return "; ".join(told)


def _coverage(model: nn.Module, stacks: tuple[Architecture, ...], edits: Mapping[str, Edit]) -> str:
    """Count edited weights among those that the rows name, by what they are: ``30/30 q_proj, 30/30 k_proj``."""
    known = {name for arch in stacks for name in _parameters(model, arch)}
    counts: dict[str, int] = {}
    for name in edits:
        if name in known:
            counts[_label(name)] = counts.get(_label(name), 0) + 1
    total = [_label(name) for name in known]
    return ", ".join(f"{n}/{total.count(label)} {label}" for label, n in counts.items())


def _parameters(model: nn.Module, arch: Architecture) -> Iterator[str]:
    """Yield the weights of all readers and writers that a row names and the model has."""
    listed: list[tuple[str, Weight]] = [("", path) for path in map(arch.path, arch.family.embeddings)]
    parts = [("", arch.family.final)]
    for layer, layout in enumerate(arch.layouts):
        parts += [(f"{arch.block(layer)}.", layout.part(kind)) for kind in IN_BLOCK]
    for base, part in parts:
        if not isinstance(part, Absent):
            listed += [(base, w) for w in (part.readers if isinstance(part, Read) else part.writers)]
    for base, weight in listed:
        name = base + (weight.path if isinstance(weight, Experts) else weight)
        yield name if isinstance(find(model, name), nn.Parameter) else f"{name}.weight"


def _label(name: str) -> str:
    *path, leaf = name.removesuffix(".weight").split(".")
    return f"{path[-1]}.{leaf}" if path and "expert" in path[-1] else leaf


def exactness(model: nn.Module) -> dict[str, dict[str, str]]:
    """Return, for every kind of site of a model and for ``stream``, how an affine and a linear eraser can be baked.

    The answer comes from ``bake`` itself, tried with a rank-1 eraser at the first site of the kind in every sort
    of block that the model has (for ``stream`` at all that it needs): ``exact``, ``erasure-exact``, or ``hook only:``
    and the reason. Where not even hooks can do it (``stream`` in post-LayerNorm models): ``impossible:`` and the
    reason.
    """
    arch = Architecture.of(model)
    config: Any = model.config
    width: int = getattr(config, "hidden_size", None) or config.get_text_config().hidden_size
    direction = torch.eye(width, 1, dtype=torch.float64)
    print_ = fingerprint(model)
    layers = [arch.layouts.index(layout) for layout in dict.fromkeys(arch.layouts)]
    found: dict[str, dict[str, str]] = {}
    for kind in (*arch.kinds, "stream"):
        found[kind] = {}
        for name, shift in (("affine", torch.ones(width)), ("linear", torch.zeros(width))):
            eraser = Eraser(direction, direction.T, shift.double())
            try:
                if kind == "stream":
                    plan = plan_stream(model, eraser)
                else:
                    # Before the first block the stream has weights, which is what "stream" tells of.
                    first = 1 if kind == "resid_pre" and arch.n_layers > 1 else 0
                    sites = arch.sites(kind, layers=[first] if first else layers)
                    plan = ErasurePlan(dict.fromkeys(sites, eraser), print_)
                classes = bake(model, plan, allow="approximate").exactness.values()
                found[kind][name] = max(classes, key=_LEVELS.index)  # type: ignore[arg-type]
            except NotBakeableError as error:
                found[kind][name] = f"hook only: {error.reason}"
            except UnsupportedModelError as error:
                if kind != "stream":
                    raise
                found[kind][name] = f"impossible: {error}"
    return found
