"""Block probe: find by experiment what reads and what writes the residual stream inside one block.

Nothing is decided by a name. The tool is to *hold* modules at what they gave before and to *nudge* a tensor:
with every weight matrix of the block held, the only thing that still moves is the skip path.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from .errors import UnsupportedModelError
from .families import Absent, Experts, Layout, Read, Weight, Write
from .interventions import Call, Trace, replay, run
from .sites import Side

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Findings:
    """What the probe found in one block; paths are relative to the block.

    Attributes:
        layout: what reads and what writes.
        scale: what the sublayers' outputs are multiplied with before they are added.
        transposed: the weights of linear modules are stored [in, out].
        norm_offset: what the norms at sites add to their weight; None when none of them has a weight.
        post_layernorm: norms stand in the skip path itself.
        parallel: the MLP does not see what attention wrote.
    """

    layout: Layout
    scale: float
    transposed: bool
    norm_offset: float | None
    post_layernorm: bool
    parallel: bool


def probe_block(block: nn.Module, call: Call, where: str) -> Findings:
    """Return what reads and writes the stream in a block, each finding checked by a second experiment.

    Args:
        block: the block, in eval mode.
        call: one call of it in a run of the model.
        where: its path, for messages.

    Raises:
        UnsupportedModelError: the block is not one attention and one MLP around a stream, or something in it
            reads or writes the stream besides what was found; says what was seen.
    """
    bench = _Bench(block, call, where)
    attention, mlp = bench.writes()
    if bench.stream_norms and (len(bench.stream_norms), attention.point, mlp.point) != (2, 0, 1):
        raise UnsupportedModelError(
            f"{where} has norms in its skip path ({_listed(bench.stream_norms)}), but not one after each sublayer's "
            "sum; a row cannot say that."
        )
    reads = bench.reads(attention, mlp)
    bench.verify(attention, mlp, reads)
    # A module of stacked experts both reads and writes, with another weight.
    into = {name: bench.weights(name, axis="in") for read in reads for name in read.names}
    out_of = {name: bench.weights(name, axis="out") for found in (attention, mlp) for name in found.names}
    attn_in, mlp_in = (Read(r.path, tuple(into[n].weight for n in r.names), r.side) for r in reads)
    attn_out, mlp_out = (
        Write(w.path, tuple(out_of[n].weight for n in w.names), w.norm) for w in (attention, mlp)
    )
    shared = f"attention and MLP read one tensor, the {attn_in.side} of {attn_in.path}: ask for attn_in, which is both"
    norms = [read.path for read in reads if read.side == "output"]
    norms += [w.norm for w in (attention, mlp) if w.norm]
    return Findings(
        Layout(attn_in, Absent(shared) if reads[0] is reads[1] else mlp_in, attn_out, mlp_out),
        scale=attention.scale,
        transposed=bench.agreed(
            {s.weight: s.transposed for s in (*into.values(), *out_of.values()) if isinstance(s.weight, str)},
            default=False,
        ),
        norm_offset=bench.agreed(
            {n: gain_offset(block.get_submodule(n), bench.x) for n in norms}, default=None
        ),
        post_layernorm=bool(bench.stream_norms),
        parallel=not bench.moves(attention.path, "output", mlp.path, hold=()),
    )


@dataclass(frozen=True, slots=True)
class _Reading:
    path: str
    side: Side
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Writing:
    path: str
    names: tuple[str, ...]
    norm: str | None
    scale: float
    point: int
    """Which of the points of the stream receives it."""


@dataclass(frozen=True, slots=True)
class _Stored:
    weight: Weight
    transposed: bool


class _Bench:
    """One block, the call to repeat, and what it computed undisturbed."""

    def __init__(self, block: nn.Module, call: Call, where: str):
        self.block, self.call, self.where = block, call, where
        self.names = [name for name, _ in block.named_modules()]
        self.base = run(block, call.args, call.kwargs, watch=self.names)
        x = call.input
        assert x is not None
        self.x, self.y = x, self._root(self.base)
        self.tol = 1e-8 if x.dtype == torch.float64 else 1e-4
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        self.delta = noise.to(x) * self.y.std()
        if self._differs(self._root(self.run()), self.y) or self._differs(self.y, call.output):
            raise UnsupportedModelError(
                f"{where} gives something else when it is called again with the same input; needed a block "
                "without randomness or memory (eval mode, use_cache=False)."
            )
        self.called = [name for name in self.names if name and len(self.base.get(name, ())) == 1]
        self.mixers = weighted(block, self.base)
        held = self.run({("", "input"): self.delta})
        # The skip path is all that moves: what carries it, and what reads it.
        self.carriers = {name for name in self.called if self._moved(held, name)}
        self.on_stream = [name for name in self.mixers if self._moved(held, name, "input")]
        self.stream_norms = [
            name
            for name in self.base  # in the order of the calls
            if name in self.carriers
            and self._is_norm(name)
            and self._differs(self._root(self.run({(name, "output"): self.delta})), self.y)
        ]
        through = self._arrives(held)
        if through is None or through[0] != 0 or through[1] is None or abs(through[1] - 1) > self.tol:
            raise UnsupportedModelError(
                f"{where} has no plain skip path: with all its weight matrices held, a change of its input does "
                "not arrive unchanged where the first sublayer is added."
            )

    def run(
        self, nudge: dict[tuple[str, Side], Tensor] | None = None, hold: Collection[str] | None = None
    ) -> Trace:
        """Run the block with nudges, modules held at the base run; by default all those with weights."""
        held = self.mixers if hold is None and nudge else hold or ()
        return run(
            self.block,
            self.call.args,
            self.call.kwargs,
            watch=self.names,
            frozen={name: self.base[name] for name in held},
            nudge=nudge,
        )

    def writes(self) -> tuple[_Writing, _Writing]:
        """Return what attention and MLP add to the stream."""
        additive: dict[str, tuple[int, float]] = {}
        for name in self.called:
            if name not in self.carriers and self._is_stream_shaped(self._out(name)):
                arrived = self._arrives(self.run({(name, "output"): self.delta}))
                if arrived and arrived[1] is not None:
                    additive[name] = arrived[0], arrived[1]
        outermost = [name for name in additive if not any(_inside(name, other) for other in additive)]
        distinct: list[str] = []
        for name in outermost:
            if not any(self._same(self._out(name), self._out(other)) for other in distinct):
                distinct.append(name)
        found = [self._writing(name, additive) for name in distinct]
        self._account_for(found)
        mixing = [w for w in found if self._mixes_positions(w, found)]
        others = [w for w in found if w not in mixing]
        if len(mixing) != 1 or len(others) != 1:
            raise UnsupportedModelError(
                f"{self.where} has {len(found)} writers: {_listed(w.path for w in mixing)} carry from one position to "
                f"another, {_listed(w.path for w in others)} do not; a row has one of each."
            )
        if abs(mixing[0].scale - others[0].scale) > self.tol:
            raise UnsupportedModelError(
                f"{self.where} adds {mixing[0].path} times {mixing[0].scale:.6g} but "
                f"{others[0].path} times {others[0].scale:.6g}; a row has one scale."
            )
        return mixing[0], others[0]

    def reads(self, attention: _Writing, mlp: _Writing) -> tuple[_Reading, _Reading]:
        """Return what attention and MLP read; one object twice if it is one tensor."""
        groups: list[list[str]] = []
        for name in self.on_stream:
            group = next((g for g in groups if self._same(self._in(name), self._in(g[0]))), None)
            if group is None:
                groups.append([name])
            else:
                group.append(name)
        readings = [self._reading(tuple(group)) for group in groups]

        def read_by(own: _Writing, other: _Writing) -> _Reading:
            found = [r for r in readings if self.moves(r.path, r.side, own.path, hold=[other.path])]
            if len(found) != 1:
                raise UnsupportedModelError(
                    f"{own.path} in {self.where} depends on {len(found)} tensors of the stream "
                    f"({_listed(f'{r.path} ({r.side})' for r in found)}); a row has one."
                )
            return found[0]

        return read_by(attention, mlp), read_by(mlp, attention)

    def verify(self, attention: _Writing, mlp: _Writing, reads: tuple[_Reading, _Reading]) -> None:
        """Hold the readers that were found and nothing else: no nudge may come through anything else."""
        readers = list(dict.fromkeys(name for read in reads for name in read.names))
        for read in reads:
            after = self.run({(read.path, read.side): self._step(read.path, read.side)}, read.names)
            if self._differs(self._root(after), self.y):
                raise UnsupportedModelError(
                    f"something in {self.where} reads {read.path} ({read.side}) besides {_listed(read.names)}: "
                    "with these held, a change of it still reaches the block's output."
                )
        nudges: dict[str, tuple[tuple[str, Side], float]] = {"its input": (("", "input"), 1.0)}
        nudges |= {f"the output of {w.path}": ((w.path, "output"), w.scale) for w in (attention, mlp)}
        for what, (place, scale) in nudges.items():
            arrived = self._arrives(self.run({place: self._step(*place)}, readers))
            if arrived is None or arrived[1] is None or abs(arrived[1] - scale) > self.tol:
                raise UnsupportedModelError(
                    f"something in {self.where} reads the stream besides {_listed(readers)}: with these held, a "
                    f"change of {what} does not arrive as it is."
                )
        for w in (attention, mlp):
            for name in (name for name in w.names if name != w.path):
                after = self.run({(name, "output"): self._step(name, "output")}, [w.path])
                if self._differs(self._root(after), self.y):
                    raise UnsupportedModelError(
                        f"the output of {name} in {self.where} goes elsewhere than into {w.path}: with that held, a "
                        "change of it still reaches the block's output."
                    )

    def moves(self, path: str, side: Side, target: str, *, hold: Collection[str]) -> bool:
        """Return whether a nudge at a tensor changes the output of another module."""
        return self._moved(self.run({(path, side): self._step(path, side)}, hold), target)

    def weights(self, name: str, *, axis: Literal["in", "out"]) -> _Stored:
        """Return the weight of a module that reads (``in``) or writes (``out``), its axes measured.

        Along ``in``, a slice of the weight does nothing once that coordinate of the input is zero; along ``out``,
        a slice changes that coordinate of the output only.
        """
        module, call = self.block.get_submodule(name), self.base[name][0]
        for leaf, parameter in module.named_parameters(recurse=False):
            found = [k for k in range(parameter.ndim) if self._is_axis(module, call, leaf, k, axis)]
            if len(found) != 1 or parameter.ndim < 2:
                continue
            if parameter.ndim == 2 and leaf == "weight":
                return _Stored(name, transposed=found[0] == (0 if axis == "in" else 1))
            if parameter.ndim == 3 and found[0] > 0:
                axes = "eoi" if (found[0] == 2) == (axis == "in") else "eio"
                return _Stored(Experts(f"{name}.{leaf}", axes, self._stacked_bias(name, call, axis)), False)
        raise UnsupportedModelError(
            f"{name} in {self.where} ({type(module).__name__}) {'reads' if axis == 'in' else 'writes'} the stream "
            f"with none of its own parameters along one axis, so nothing can be baked into it."
        )

    def agreed(self, found: Mapping[str, _T], default: _T) -> _T:
        """Return the one value that all modules have which have one."""
        known = {value for value in found.values() if value is not None}
        if len(known) > 1:
            raise UnsupportedModelError(
                f"the modules of {self.where} differ where a row has one value: {dict(found)}."
            )
        return next(iter(known), default)

    def _stacked_bias(self, name: str, call: Call, axis: Literal["in", "out"]) -> str | None:
        """Return the stacked bias [expert, out] that goes with the experts' weight that reads or writes."""
        module = self.block.get_submodule(name)
        biases = {
            leaf: self._is_axis(module, call, leaf, 1, "out")
            for leaf, parameter in module.named_parameters(recurse=False)
            if parameter.ndim == 2
        }
        found = [leaf for leaf, writes in biases.items() if writes == (axis == "out")]
        return f"{name}.{found[0]}" if found else None

    def _is_axis(self, module: nn.Module, call: Call, leaf: str, k: int, axis: Literal["in", "out"]) -> bool:
        parameter = module.get_parameter(leaf)
        x = call.input
        assert x is not None
        if parameter.shape[k] != self.x.shape[-1]:
            return False
        j = parameter.shape[k] // 2
        changed = parameter.detach().clone()
        part = changed.select(k, j)
        noise = torch.randn(part.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        part += noise.to(part) * changed.std()
        step = torch.zeros_like(x)
        if axis == "in":
            step[..., j] = -x[..., j]
        old, new = (replay(module, call, step, {leaf: weight}) for weight in (parameter.detach(), changed))
        if axis == "in":
            control = replay(module, call, 0 * step, {leaf: changed}), replay(module, call, 0 * step, {})
            return not self._any_differ(new, old) and self._any_differ(*control)
        rest = torch.arange(new[0].shape[-1], device=x.device) != j
        return self._differs(new[0], old[0]) and not self._differs(new[0][..., rest], old[0][..., rest])

    def _any_differ(self, new: list[Tensor], old: list[Tensor]) -> bool:
        return any(self._differs(a, b) for a, b in zip(new, old, strict=True))

    def _writing(self, path: str, additive: Mapping[str, tuple[int, float]]) -> _Writing:
        """Return what writes, given the outermost module whose output is added: the weights in it."""
        point, scale = additive[path]
        same = [other for other in self.called if self._same(self._out(other), self._out(path))]
        linear = [name for name in same if name in self.mixers]
        if linear and not self._stacked(linear[-1]):
            return _Writing(linear[-1], (linear[-1],), None, scale, point)
        norm = next((name for name in same if self._is_norm(name) and name in additive), None)
        if norm is not None:
            names = [m for m in self.mixers if m in self.called and self._same(self._out(m), self._in(norm))]
        else:  # a sum over experts, each times a factor per position
            names = [m for m in self.mixers if m in self.called and self._writes_by_position(m, path, point)]
        if not names:
            raise UnsupportedModelError(
                f"{path} in {self.where} adds to the stream what is neither the output of linear modules nor that "
                "of a norm after one; a row cannot say that."
            )
        return _Writing(norm or path, tuple(names), norm, scale, point)

    def _stacked(self, name: str) -> bool:
        return any(p.ndim > 2 for p in self.block.get_submodule(name).parameters(recurse=False))

    def _writes_by_position(self, name: str, path: str, point: int) -> bool:
        """Return whether a module's output reaches the stream through ``path``, times one number per position."""
        if not self._is_stream_shaped(self._out(name)):
            return False
        nudge: dict[tuple[str, Side], Tensor] = {(name, "output"): self._step(name, "output")}
        new = self._points(self.run(nudge))[point]
        past = self.run(nudge, [*self.mixers, path])
        change = (new - self._points(self.base)[point]).reshape(self.delta.shape)
        factor = (change * self.delta).sum(-1, keepdim=True) / self.delta.square().sum(-1, keepdim=True)
        fits = (change - factor * self.delta).abs().max() <= self.tol * self.y.abs().max()
        return bool(change.any() and fits) and not self._differs(self._root(past), self.y)

    def _account_for(self, found: list[_Writing]) -> None:
        """Raise unless the stream is what it was plus what the writers add, at every point."""
        starts = [self.x, *(self._out(name) for name in self.stream_norms)]
        for k, (start, point) in enumerate(zip(starts, self._points(self.base), strict=True)):
            here = [w for w in found if w.point == k]
            total = sum((w.scale * self._out(w.path).reshape(self.x.shape) for w in here), start)
            if self._differs(total, point):
                share = float((point - total).norm() / (point - start).norm())
                raise UnsupportedModelError(
                    f"something in {self.where} writes the stream besides {_listed(w.path for w in here)}: "
                    f"{share:.1%} of what is added is not theirs."
                )

    def _mixes_positions(self, one: _Writing, all_of_them: list[_Writing]) -> bool:
        first = torch.zeros_like(self.x)
        first[:, 0] = self.delta[:, 0]
        others = [w.path for w in all_of_them if w is not one]
        after = self.run({("", "input"): first}, others)
        new, old = (t.reshape(self.x.shape)[:, 1:] for t in (self._out(one.path, after), self._out(one.path)))
        return self._differs(new, old)

    def _reading(self, readers: tuple[str, ...]) -> _Reading:
        tensor = self._in(readers[0])
        if not self._is_stream_shaped(tensor):
            raise UnsupportedModelError(
                f"{_listed(readers)} in {self.where} read something made from the stream of shape "
                f"{list(tensor.shape)}, not the stream's {list(self.x.shape)} itself, so no site names what they read."
            )
        for name in self.called:
            # What a norm in the skip path gives also goes on as the stream: there the site is the reader's input.
            if name in self.stream_norms:
                continue
            made_here = self._same(self._out(name), tensor) and not self._same(self._in(name), tensor)
            if made_here and not any(m == name or _inside(m, name) for m in self.mixers):
                return _Reading(name, "output", readers)
        path = readers[0]
        while not all(name == path or _inside(name, path) for name in readers):
            path = path.rpartition(".")[0]
        if path in self.called and self._same(self._in(path), tensor):
            return _Reading(path, "input", readers)
        raise UnsupportedModelError(
            f"{_listed(readers)} in {self.where} read one tensor that no module gives or gets, so no site names it."
        )

    def _arrives(self, trace: Trace) -> tuple[int, float | None] | None:
        """Return where in the stream a nudge is first seen, and times what (None: not just scaled)."""
        for k, (new, old) in enumerate(zip(self._points(trace), self._points(self.base), strict=True)):
            if self._differs(new, old):
                change = (new - old).reshape(self.delta.shape)
                scale = float((change * self.delta).sum() / self.delta.square().sum())
                left = (change - scale * self.delta).abs().max()
                return k, scale if left <= self.tol * max(old.abs().max(), change.abs().max()) else None
        return None

    def _points(self, trace: Trace) -> list[Tensor]:
        """The stream after everything up to each norm in the skip path, and at the end of the block."""
        return [*(self._in(name, trace) for name in self.stream_norms), self._root(trace)]

    def _step(self, path: str, side: Side) -> Tensor:
        target = (self._in(path) if side == "input" else self._out(path)) if path else self.x
        return self.delta.reshape(target.shape)

    def _is_norm(self, name: str) -> bool:
        """Has parameters but no matrix, nothing inside, and keeps the shape of the stream."""
        module = self.block.get_submodule(name)
        leaf = not any(True for _ in module.children())
        own = [p.ndim for p in module.parameters(recurse=False)]
        return leaf and bool(own) and max(own) < 2 and self._is_stream_shaped(self._out(name))

    def _is_stream_shaped(self, value: object) -> bool:
        return (
            isinstance(value, Tensor)
            and value.shape[-1:] == self.x.shape[-1:]
            and value.numel() == self.x.numel()
        )

    def _moved(self, trace: Trace, name: str, side: Side = "output") -> bool:
        new, old = (
            [c.input if side == "input" else c.output for c in t.get(name, ())] for t in (trace, self.base)
        )
        return any(self._differs(a, b) for a, b in zip(new, old, strict=False))

    def _differs(self, new: object, old: object) -> bool:
        if not isinstance(new, Tensor) or not isinstance(old, Tensor) or not new.is_floating_point():
            return False
        return bool((new - old.reshape(new.shape)).abs().max() > self.tol * old.abs().max())

    @staticmethod
    def _same(a: Tensor | None, b: Tensor | None) -> bool:
        """Return whether two tensors hold the same rows, whatever the shape of the leading dimensions."""
        if a is None or b is None or a.shape[-1:] != b.shape[-1:] or a.numel() != b.numel():
            return False
        return torch.equal(a.reshape(-1), b.reshape(-1))

    def _in(self, name: str, trace: Trace | None = None) -> Tensor:
        return (trace or self.base)[name][0].input  # type: ignore[return-value]  # callers ask for tensors

    def _out(self, name: str, trace: Trace | None = None) -> Tensor:
        return (trace or self.base)[name][0].output  # type: ignore[return-value]

    def _root(self, trace: Trace) -> Tensor:
        return self._out("", trace)


def weighted(root: nn.Module, trace: Trace) -> list[str]:
    """Return the innermost modules that ran and own a matrix (or more than two axes), in declaration order."""
    own = [
        name
        for name, module in root.named_modules()
        if name and name in trace and any(p.ndim > 1 for p in module.parameters(recurse=False))
    ]
    return [name for name in own if not any(_inside(other, name) for other in own)]


def gain_offset(norm: nn.Module, like: Tensor) -> float | None:
    """Return what an RMS or layer norm adds to its weight before use; None for anything else."""
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    if not isinstance(weight, Tensor) or weight.shape != like.shape[-1:]:
        return None
    # Large rows make the norm's epsilon vanish.
    x = 1e3 * torch.randn(32, len(weight), generator=torch.Generator().manual_seed(1)).to(like)
    out = norm(x)
    for centred in (x, x - x.mean(-1, keepdim=True)):
        unit = centred / centred.square().mean(-1, keepdim=True).sqrt()
        plain = unit * weight + (0 if bias is None else bias)
        offset = float(((out - plain) * unit).mean() / unit.square().mean())
        if (out - plain - offset * unit).abs().max() <= 1e-3 * out.abs().max():
            return round(offset, 3) + 0.0
    return None


def _inside(name: str, other: str) -> bool:
    return not other or name.startswith(f"{other}.")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"
