"""Discovery: find by experiment where an unknown model keeps its blocks, what reads and what writes the stream."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Collection, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .architectures import Architecture
from .block_probe import Findings, probe_block, weighted
from .errors import InputError, UnsupportedModelError
from .families import Absent, Family, Layout, Read
from .interventions import Trace, run
from .placement import evaluating
from .taps import compiled

_MODEL_ERRORS = (TypeError, ValueError, RuntimeError, LookupError, AttributeError, NotImplementedError)
"""What a model may raise when it is built or called with something that does not suit it."""


@dataclass(frozen=True, slots=True)
class Discovery:
    """The row of the architecture table that a model was found to have.

    Attributes:
        family: the row.
        notes: what could not be decided or has no place in a row, one sentence each.
    """

    family: Family
    notes: tuple[str, ...]

    def row(self) -> Family:
        """Return the row to add to ``FAMILIES`` in ``repe_unlearn/families.py``."""
        return self.family

    @property
    def text(self) -> str:
        """The Python source of the row."""
        return _source(self.family) + "\n"


def discover(model: nn.Module, inputs: Tensor | Mapping[str, Tensor] | None = None) -> Discovery:
    """Return the architecture row of a model without one, every part of it found and checked by experiment.

    Modules are watched, nudged and held at what they gave before; no name decides anything. The model is left as it
    was: no hook, no changed weight, the same train / eval mode.

    - blocks: the list of modules called one after the other, each of which gets what the one before gave.
    - writers: what arrives, as it is or times a constant, in the stream while every other weight is held.
      Together they must be all that is added, in every block.
    - readers: modules whose input is one tensor that depends on the stream. With these held, a change of that
      tensor must not reach anything else.
    - axes of weights and of stacked experts, what norms add to their weight, a norm in the skip path: measured.
    - bias switches: boolean config keys that make biases when the config's model is built with them flipped.

    Args:
        model: with its head, all weights in memory, float32 or float64.
        inputs: what to run it on: a tensor for its first argument, or tensors by keyword. Default 2 x 9 random
            token ids, or 2 random images if its ``main_input_name`` is ``pixel_values``.

    Returns:
        The row as an object and as source, with notes. The findings about readers are from the first block of each
        sort (same parameter shapes); that the writers are all that is added is checked in every block.

    Raises:
        InputError: inputs of one token.
        UnsupportedModelError: the model is not a stack of blocks with one attention and one MLP each, or something
            reads or writes the stream besides what a row can say; the message tells what was seen.

    Example:
        ``print(discover(model).text)``
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    _require_usable(model, model_type)
    with evaluating(model), torch.no_grad():
        return _Search(model, str(model_type), inputs).discovery()


def _require_usable(model: nn.Module, model_type: object) -> None:
    if not isinstance(model_type, str) or not model_type:
        raise UnsupportedModelError(
            f"got {type(model).__name__} without config.model_type; needed one, because rows are found by it. "
            "Set model.config.model_type to a name of your own."
        )
    if compiled(model):
        raise UnsupportedModelError("the model was compiled; hooks would be ignored. Pass the plain model.")
    dtypes = {p.dtype for p in model.parameters() if not p.is_meta}
    if any(p.is_meta for p in model.parameters()) or not dtypes <= {torch.float32, torch.float64}:
        raise UnsupportedModelError(
            f"got weights of {', '.join(sorted(map(str, dtypes))) or 'no values'}, or some that are not in memory; "
            "needed float32 or float64, so that small differences mean something. Load with dtype=torch.float32."
        )


class _Search:
    """One model, one input, and what a plain run of it computed."""

    def __init__(self, model: nn.Module, model_type: str, inputs: Tensor | Mapping[str, Tensor] | None):
        self.model, self.model_type = model, model_type
        self.args, self.kwargs = _call(model, inputs)
        self.notes: list[str] = []
        self.names = [name for name, _ in model.named_modules()]
        try:
            self.base = self.run()
        except _MODEL_ERRORS as error:
            raise UnsupportedModelError(
                f"{type(model).__name__} does not run on {'the given' if inputs is not None else 'the default'} "
                f"inputs ({type(error).__name__}: {error}); pass inputs= that it takes."
            ) from error
        self.blocks = self._find_blocks()
        self.n = len(model.get_submodule(self.blocks))  # type: ignore[arg-type]  # a ModuleList
        first, last = self._block(0), self._block(self.n - 1)
        self.x, self.y = _tensor(self.base[first][0].input), _tensor(self.base[last][0].output)
        if self.x.shape[1] < 2:
            raise InputError(
                "got inputs of one token; needed at least two, to see what carries from one to another."
            )
        self.tol = 1e-8 if self.x.dtype == torch.float64 else 1e-4
        self.outside = [n for n in weighted(model, self.base) if not n.startswith(f"{self.blocks}.")]

    def run(
        self,
        nudge: tuple[str, Tensor] | None = None,
        hold: Collection[str] = (),
        parameters: Mapping[str, Tensor] | None = None,
    ) -> Trace:
        """Run the model, one output nudged, modules held at the base run, other values for parameters."""
        return run(
            self.model,
            self.args,
            self.kwargs,
            watch=self.names,
            frozen={name: self.base[name] for name in hold},
            nudge={(nudge[0], "output"): nudge[1]} if nudge else None,
            parameters=parameters,
        )

    def discovery(self) -> Discovery:
        found = self._probe_blocks()
        first = found[0]
        final = self._final()
        embeddings, norm = self._embeddings(final)
        self._note(first)
        family = Family(
            model_types=(self.model_type,),
            blocks=self.blocks,
            layouts=self._layouts(found),
            final=final,
            embeddings=embeddings,
            embedding_norm=norm,
            bias_switches=self._bias_switches(),
            transposed=first.transposed,
            norm_offset=first.norm_offset or 0.0,
            residual_scale=self._residual_scale(first.scale),
            post_layernorm=first.post_layernorm,
        )
        self._require_fit(family, found)
        return Discovery(family, tuple(self.notes))

    def _require_fit(self, family: Family, found: list[Findings]) -> None:
        """Raise if the row, bound to the model as any other, gives a block another layout than was found."""
        arch = Architecture.bind(family, self.model)
        bound = [replace(layout, name="") for layout in arch.layouts] if arch else []
        wrong = [i for i, f in enumerate(found) if i >= len(bound) or bound[i] != f.layout]
        if wrong:
            raise UnsupportedModelError(
                f"blocks {wrong} of {self.blocks} have the modules of another sort of block but use them in another "
                "way; a row tells the sorts of blocks apart by their modules."
            )

    def _block(self, layer: int) -> str:
        return f"{self.blocks}.{layer}"

    def _find_blocks(self) -> str:
        lists = {name: len(m) for name, m in self.model.named_modules() if isinstance(m, nn.ModuleList)}
        chains = [name for name, length in lists.items() if length and self._is_chain(name, length)]
        outer = [c for c in chains if not any(c.startswith(f"{other}.") for other in chains)]
        longest = [c for c in outer if lists[c] == max(lists[o] for o in outer)]
        if len(longest) != 1:
            raise UnsupportedModelError(
                f"{type(self.model).__name__} has {len(longest) or 'no'} lists of blocks that pass a stream [batch, tokens, "
                f"width] on ({', '.join(longest) or 'none'}); needed one. Its module lists: "
                f"{', '.join(f'{name} ({length})' for name, length in lists.items()) or 'none'}."
            )
        return longest[0]

    def _is_chain(self, name: str, length: int) -> bool:
        stream: Tensor | None = None
        for i in range(length):
            calls = self.base.get(f"{name}.{i}", [])
            x, y = (calls[0].input, calls[0].output) if len(calls) == 1 else (None, None)
            if x is None or y is None or x.ndim != 3 or x.shape != y.shape or not x.is_floating_point():
                return False
            if stream is not None and not torch.equal(stream, x):
                return False
            stream = y
        return True

    def _probe_blocks(self) -> list[Findings]:
        """Probe one block of each sort, and check in all of them that nothing else writes; one finding a block."""
        sorts: dict[tuple, Findings] = {}
        found: list[Findings] = []
        for layer in range(self.n):
            path = self._block(layer)
            block = self.model.get_submodule(path)
            sort = tuple((name, tuple(p.shape)) for name, p in block.named_parameters())
            # With norms in the skip path there is no sum to check, so every block is probed.
            if sort not in sorts or sorts[sort].post_layernorm:
                try:
                    sorts[sort] = probe_block(block, self.base[path][0], path)
                except _MODEL_ERRORS as error:
                    raise UnsupportedModelError(
                        f"{path} does not run again with parts of it held or changed ({type(error).__name__}: {error})."
                    ) from error
            self._account_for(path, sorts[sort])
            found.append(sorts[sort])
        for what in ("scale", "transposed", "norm_offset", "post_layernorm"):
            values = [float(getattr(f, what) or 0) for f in found]
            if max(values) - min(values) > self.tol:
                raise UnsupportedModelError(
                    f"blocks of {self.blocks} differ in {what}: {values}; a row has one."
                )
        return found

    def _layouts(self, found: list[Findings]) -> tuple[Layout, ...]:
        """Return the layouts, those with most modules first, since a block has the first one that fits it."""
        layouts = sorted({f.layout: None for f in found}, key=lambda layout: -len(list(layout.paths())))
        if len(layouts) == 1:
            return tuple(layouts)
        first = {layout: next(i for i, f in enumerate(found) if f.layout == layout) for layout in layouts}
        return tuple(replace(layout, name=f"as block {first[layout]}") for layout in layouts)

    def _account_for(self, path: str, findings: Findings) -> None:
        """Raise if a block adds anything but its two writes (in blocks where the stream is their sum)."""
        if findings.post_layernorm:
            return
        call, layout = self.base[path][0], findings.layout
        before, after = _tensor(call.input), _tensor(call.output)
        written = [
            self.base[f"{path}.{w.path}"][0]
            for w in (layout.attn_out, layout.mlp_out)
            if not isinstance(w, Absent)
        ]
        total = before + findings.scale * sum(_tensor(c.output).reshape(before.shape) for c in written)
        if (total - after).abs().max() > self.tol * after.abs().max():
            raise UnsupportedModelError(
                f"{path} adds something else to the stream than its first block of this sort does: its attention "
                f"and MLP leave {float((after - total).norm() / (after - before).norm()):.1%} of it unexplained."
            )

    def _final(self) -> Read | Absent:
        """Return what reads the stream after the last block, and the norm that it is read through."""
        delta = _noise(self.y)
        last = self._block(self.n - 1)
        held = self.run((last, delta), self.outside)
        heads = [name for name in self.outside if self._moved(self.base[name][0].input, held[name][0].input)]
        if not heads:
            self.notes.append(
                "No head was found: paths are those of a model without one, so give the model with its head."
            )
            return Absent("the model has no head")
        read = _tensor(self.base[heads[0]][0].input)
        alike = [h for h in heads if _same(self.base[h][0].input, read)]
        norms = [
            name
            for name, calls in self.base.items()
            if name not in heads
            and not any(True for _ in self.model.get_submodule(name).children())
            and not name.startswith(f"{self.blocks}.")
            and isinstance(calls[0].output, Tensor)
            and _holds(calls[0].output, read)
            and not _same(calls[0].input, calls[0].output)
        ]
        if not norms:
            self.notes.append(f"{', '.join(heads)} read no module's output, so `final` has no site.")
            return Absent("there is no norm after the last block: ask for resid_post of the last layer")
        site = norms[0]
        after = self.run((site, _noise(_tensor(self.base[site][0].output))), alike)
        if self._moved(self.base[""][0].output, after[""][0].output) or len(alike) != len(heads):
            raise UnsupportedModelError(
                f"something reads {site} besides {', '.join(alike)}: with these held, a change of it still reaches "
                "the model's output."
            )
        return Read(site, tuple(alike))

    def _embeddings(self, final: Read | Absent) -> tuple[tuple[str, ...], str | None]:
        """Return what writes the stream before the first block, and a norm between those and the block."""
        norm = next(
            (
                name
                for name, calls in self.base.items()
                if not name.startswith(f"{self.blocks}.")
                and name not in self.outside
                and not any(True for _ in self.model.get_submodule(name).children())
                and isinstance(calls[0].input, Tensor)
                and calls[0].input.is_floating_point()
                and isinstance(calls[0].output, Tensor)
                and _same(calls[0].output, self.x)
                and not _same(calls[0].input, self.x)
            ),
            None,
        )
        where = norm or self._block(0)
        start = _tensor(self.base[where][0].input)
        writers: list[str] = []
        total = torch.zeros_like(start)
        for name in self.outside:
            out = self.base[name][0].output
            if out is None or not out.is_floating_point():
                continue
            delta = _noise(out)
            change = _tensor(self.run((name, delta), self.outside)[where][0].input) - start
            if not self._moved(start, start + change):
                continue
            scale = None
            if out.shape[-1:] == start.shape[-1:] and out.numel() <= start.numel():
                wide = delta.expand_as(start)
                scale = float((change * wide).sum() / wide.square().sum())
                total = total + scale * out
            if scale is None or self._moved(start + change, start + scale * delta):
                self.notes.append(f"{name} writes the stream before the first block, but not as it is.")
            elif abs(scale - 1) > self.tol:
                self.notes.append(
                    f"The output of {name} is multiplied by {scale:.6g} before it enters the stream: set "
                    "`embedding_scale` by hand."
                )
            writers.append(name)
        added = self._added_parameters(where, start)
        if self._moved(start, total) and not added:
            self.notes.append(
                f"{', '.join(writers) or 'No module'} write the stream before the first block, but something else "
                "that is neither a module nor a parameter does too."
            )
        heads = [self.model.get_submodule(str(name)) for name in getattr(final, "readers", ())]
        shared = {id(p) for head in heads for p in head.parameters()}

        def order(name: str) -> tuple[bool, int]:  # what the head may be tied to comes first
            own = self.model.get_submodule(name).parameters()
            return not any(id(p) in shared for p in own), list(self.base).index(name)

        return (*sorted(writers, key=order), *added), norm

    def _added_parameters(self, where: str, start: Tensor) -> list[str]:
        """Return the parameters that no module with a weight owns and that write the stream too (ViT)."""
        found = []
        for name, parameter in self.model.named_parameters():
            owner = name.rpartition(".")[0]
            if parameter.ndim < 2 or owner in self.outside or name.startswith(f"{self.blocks}."):
                continue
            other = {name: parameter + _noise(parameter)}
            if self._moved(start, self.run(parameters=other)[where][0].input):
                found.append(name)
        return found

    def _residual_scale(self, scale: float) -> str | None:
        if abs(scale - 1) <= self.tol:
            return None
        values = _settings(self.model).items()
        keys = [k for k, v in values if isinstance(v, float) and abs(v - scale) <= self.tol * abs(scale)]
        if len(keys) == 1:
            return keys[0]
        self.notes.append(
            f"Sublayers are multiplied by {scale:.6g} before they are added, and {len(keys)} config keys "
            f"({', '.join(keys) or 'none'}) have that value: set `residual_scale` by hand."
        )
        return None

    def _bias_switches(self) -> dict[str, tuple[str, ...]]:
        """Return the boolean config keys that make biases in blocks and nothing else."""
        have = [name for name, _ in self.model.named_parameters()]
        if self._names() != have:
            self.notes.append(
                f"{type(self.model).__name__}(config) does not build this model again, so config keys that make "
                "biases could not be looked for."
            )
            return {}
        switches: dict[str, tuple[str, ...]] = {}
        for key, value in _settings(self.model).items():
            if not isinstance(value, bool):
                continue
            other = self._names(**{key: not value})
            if other is None or set(other) == set(have):
                continue
            on, off = (have, other) if value else (other, have)
            made = [name for name in on if name not in set(off)]
            if set(off) <= set(on) and all(name.endswith(".bias") for name in made):
                paths = dict.fromkeys(self._in_block(name.removesuffix(".bias")) for name in made)
                switches[key] = tuple(path for path in paths if path)
                if None in paths:
                    self.notes.append(f"Config key {key} also makes biases outside of the blocks.")
        return {key: paths for key, paths in switches.items() if paths}

    def _in_block(self, path: str) -> str | None:
        inside = path.removeprefix(f"{self.blocks}.")
        return inside.partition(".")[2] if inside != path else None

    def _names(self, **changes: bool) -> list[str] | None:
        """Return the parameter names of the config's model with some keys changed, or None if there is none."""
        config = copy.deepcopy(self.model.config)
        build: Any = type(self.model)
        try:
            for key, value in changes.items():
                setattr(config, key, value)
            with torch.device("meta"):
                return [name for name, _ in build(config).named_parameters()]
        except _MODEL_ERRORS:
            return None

    def _note(self, findings: Findings) -> None:
        if findings.parallel:
            self.notes.append(
                "Attention and MLP read the stream in parallel: the MLP does not see what attention wrote."
            )
        if findings.norm_offset is None:
            self.notes.append("No norm at a site has a weight, so `norm_offset` could not be measured.")

    def _moved(self, old: Tensor | None, new: Tensor | None) -> bool:
        if old is None or new is None or not old.is_floating_point():
            return False
        return bool((new - old).abs().max() > self.tol * old.abs().max())


def _call(model: nn.Module, inputs: Tensor | Mapping[str, Tensor] | None) -> tuple[tuple, dict[str, Any]]:
    """Return the arguments of the call that is repeated."""
    device = next(model.parameters()).device
    wanted = inspect.signature(model.forward).parameters
    named: dict[str, Any] = {"use_cache": False} if "use_cache" in wanted else {}
    if isinstance(inputs, Mapping):
        return (), {**named, **{key: value.to(device) for key, value in inputs.items()}}
    if inputs is None:
        inputs = _random_input(model)
    return (inputs.to(device),), named


def _random_input(model: nn.Module) -> Tensor:
    config: Any = model.config
    generator = torch.Generator().manual_seed(0)
    if getattr(model, "main_input_name", "input_ids") == "pixel_values":
        shape = (2, config.num_channels, config.image_size, config.image_size)
        return torch.randn(shape, generator=generator).to(next(model.parameters()).dtype)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    vocab = getattr(text, "vocab_size", None)
    if not isinstance(vocab, int):
        raise UnsupportedModelError("got a model without config.vocab_size; pass inputs= that it takes.")
    return torch.randint(vocab, (2, 9), generator=generator)


def _settings(model: nn.Module) -> dict[str, Any]:
    """Return the config's own keys and values, without those that every transformers config has."""
    config: Any = model.config
    if not hasattr(config, "to_dict"):
        return dict(vars(config))
    base = [cls for cls in type(config).__mro__ if hasattr(cls, "to_dict")][-1]
    common = {*vars(base), *getattr(base, "__annotations__", {})}
    return {key: value for key, value in config.to_dict().items() if key not in common}


def _tensor(value: Tensor | None) -> Tensor:
    assert value is not None
    return value


def _noise(like: Tensor) -> Tensor:
    noise = torch.randn(like.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return noise.to(like) * like.std()


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is not None and b is not None and a.shape == b.shape and torch.equal(a, b)


def _holds(stream: Tensor, read: Tensor) -> bool:
    """Return whether a head reads a whole tensor [b, t, d] or one position of it."""
    if stream.shape == read.shape:
        return torch.equal(stream, read)
    one = stream.ndim == 3 and read.shape == stream[:, 0].shape
    return one and any(torch.equal(stream[:, i], read) for i in range(stream.shape[1]))


def _source(value: object, indent: str = "") -> str:
    """Return the source of a dataclass, without the fields that have their defaults."""
    if is_dataclass(value):
        parts = []
        for f in fields(value):
            default = f.default_factory() if f.default_factory is not MISSING else f.default
            content = getattr(value, f.name)
            if content != default:
                parts.append(f"{f.name}={_source(content, indent + '    ')}")
        return _wrapped(
            f"{type(value).__name__}(", parts, ")", indent, nested=isinstance(value, Family | Layout)
        )
    if isinstance(value, tuple):
        parts = [_source(part, indent + "    ") for part in value]
        return _wrapped("(", parts, ",)" if len(parts) == 1 else ")", indent)
    if isinstance(value, Mapping):
        parts = [f"{_source(key)}: {_source(content, indent + '    ')}" for key, content in value.items()]
        return _wrapped("{", parts, "}", indent)
    return '"' + value.replace('"', '\\"') + '"' if isinstance(value, str) else repr(value)


def _wrapped(start: str, parts: list[str], end: str, indent: str, *, nested: bool = False) -> str:
    line = start + ", ".join(parts) + end
    if not nested and "\n" not in line and len(indent) + len(line) < 90:
        return line
    return "\n".join([start, *(f"{indent}    {part}," for part in parts), indent + end.lstrip(",")])
