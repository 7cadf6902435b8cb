"""Positions: where every token of a running model call stands in its sequence."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .errors import InputError, ShapeError, UnsupportedModelError
from .tokens import TEXT_KINDS, Select

# What `generate` may do that feeds tokens which are taken back, or runs other sequences through the model.
_REFUSED = {
    "assistant_model": "assisted decoding",
    "prompt_lookup_num_tokens": "assisted decoding",
    "assistant_early_exit": "assisted decoding",
    "use_mtp": "assisted decoding",
    "custom_generate": "a decoding loop of its own",
    "dola_layers": "a decoding loop of its own",
    "penalty_alpha": "contrastive search",
    "guidance_scale": "guidance by a second prompt",
}


@dataclass(frozen=True, slots=True, eq=False)
class Positions:
    """``b`` sequences at ``t`` columns each.

    Attributes:
        index: ``[b, t]`` number of the token in its sequence, from 0 without padding; -1 for padding.
        number: ``[t]`` or ``[b, t]`` number of the generated token, from 0; -1 for the prompt.
        length: ``[b]`` tokens of the prompt.
        ids: ``[b, t]`` token ids; None if the model was given embeddings.
    """

    index: Tensor
    number: Tensor
    length: Tensor
    ids: Tensor | None


def selected(select: Select, at: Positions) -> Tensor:
    """Return where a selection holds, ``[b, t]`` bool; kinds that need the text count as ``"all"``.

    Args:
        select: in token ids (see ``Select.resolve``).
        at: the positions. For ``"last"`` they must hold the sequences to their end.

    Raises:
        InputError: tokens are included or excluded, and the ids are not known.
    """
    keep = (at.index >= select.sinks).expand(at.index.shape)
    if select.phase != "both" or select.kind == "after_prompt":
        keep = keep & ((at.number < 0) if select.phase == "prompt" else (at.number >= 0))
    for bound, side in ((select.start, torch.ge), (select.stop, torch.lt)):
        if bound is not None:
            keep = keep & side(at.index, at.length[:, None] + bound if bound < 0 else bound)
    if select.include or select.exclude:
        if at.ids is None:
            raise InputError(f"{select} names tokens, but the model was given embeddings; pass input_ids.")
        if select.include:
            keep = keep & torch.isin(at.ids, at.ids.new_tensor(select.include))
        if select.exclude:
            keep = keep & ~torch.isin(at.ids, at.ids.new_tensor(select.exclude))
    if select.kind == "last":
        keep = keep & (keep.flip(1).cumsum(1).flip(1) <= select.count)
    return keep


@dataclass(slots=True, eq=False)
class Call:
    """One run of the model's body.

    Attributes:
        parts: positions side by side: (positions, how often each row is repeated, which columns run now).
        shape: (b, t) of the call.
        begin: how many columns ran before, in the cache.
        prompt: how many columns the prompt has.
    """

    parts: tuple[tuple[Positions, int, slice], ...]
    shape: tuple[int, int]
    begin: int
    prompt: int
    _masks: dict[str, Tensor] = field(default_factory=dict)

    @property
    def numbers(self) -> list[int]:
        """Number of the generated token in every column, -1 for the prompt."""
        return [max(c - self.prompt, -1) for c in range(self.begin, self.begin + self.shape[1])]

    def rows_of(self, values: Tensor, site: object) -> Tensor:
        """Return one value per token as ``[b, t]``, whether the site keeps rows apart or not.

        Raises:
            ShapeError: the site does not hold one vector per token of the call.
        """
        b, t = self.shape
        if values.shape not in ((b, t), (b * t,)):
            raise ShapeError(
                f"{site} holds vectors [{', '.join(map(str, values.shape))}] where {b} x {t} tokens run; a plan with "
                "select, schedule or gate needs one vector per token there."
            )
        return values.reshape(b, t)

    def selected(self, select: Select) -> Tensor:
        """Return where a selection in token ids holds, ``[b, t]`` bool."""
        key = str(select)
        if key not in self._masks:
            self._masks[key] = torch.cat(
                [selected(select, at).repeat_interleave(k, 0)[:, now] for at, k, now in self.parts], 1
            )
        return self._masks[key]


def for_apply(select: Select, tokenizer: Any = None) -> Select:
    """Return a selection in token ids, ready for a running model.

    Raises:
        InputError: it needs the text, averages, or asks which token will turn out to be the last.
    """
    if select.kind in TEXT_KINDS or select.pooled:
        raise InputError(
            f"got select={str(select)!r}; a plan is applied to tokens as they run, where {select.kind!r} has no "
            "meaning. Use 'all' with phase, start, stop, include or exclude."
        )
    if select.kind == "last" and select.phase != "prompt":
        raise InputError(
            f"got select={str(select)!r}; which token is the last is not known while a model generates. Use "
            "phase='prompt' for the last of the prompt, or Select('all', phase='generation')."
        )
    return select.resolve(tokenizer)


@dataclass(frozen=True, slots=True, eq=False)
class _Prompt:
    """What ``generate`` was given."""

    at: Positions
    rows: int
    width: int


class Clock:
    """Knows the position of every token while a model runs, from its own inputs.

    Right for padding on either side, with and without a cache, prefill in chunks, beams, several sequences
    per prompt and rows that ended; a compiled forward is compiled once, but with a static cache for every
    token. Inside ``generate`` the prompt is what ``generate`` was given. Outside, a
    call without a cache, or of several tokens, is prompt, and single tokens that continue a cache are
    generated. Packed rows count as one sequence. One thread at a time per model.

    Attributes:
        call: the run of the model's body that is under way, or the last one; None before the first.
    """

    def __init__(self, body: nn.Module):
        self.call: Call | None = None
        self.carried: dict[str, Tensor] = {}
        self._names = tuple(inspect.signature(body.forward).parameters)
        self._prompt: _Prompt | None = None
        self._seen = self._rows = self._width = 0
        self.users = 0
        self.handle: Any = None
        self.former: dict[str, Any] = {}

    def now(self) -> Call:
        """Return the running call.

        Raises:
            InputError: the model's body never ran while the clock was on.
        """
        if self.call is None:
            raise InputError(
                "a site ran outside of the model's own forward, so the position of its tokens is unknown; run "
                "the whole model, or apply the plan without select, schedule and gate."
            )
        return self.call

    def before(self, args: tuple, kwargs: dict) -> None:
        """Read the inputs of the model's body."""
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        ids, embeds, cache = (given.get(n) for n in ("input_ids", "inputs_embeds", "past_key_values"))
        tokens = ids if ids is not None else embeds
        if tokens is None:
            raise UnsupportedModelError("the model was given neither input_ids nor inputs_embeds.")
        if self._prompt is not None:
            self.call = self._in_generate(self._prompt, tokens, ids, cache)
        else:
            self.call = self._plain(tokens, ids, cache, given.get("attention_mask"))

    def _in_generate(self, prompt: _Prompt, tokens: Tensor, ids: Tensor | None, cache: Any) -> Call:
        rows, t = tokens.shape[:2]
        if rows % prompt.rows:
            raise ShapeError(
                f"generate was given {prompt.rows} prompts and ran {rows} rows; needed a multiple."
            )
        if cache is None and t < prompt.width:
            raise UnsupportedModelError(
                f"{t} of at least {prompt.width} tokens ran without past_key_values; this model keeps its state "
                "elsewhere, so the position of its tokens is unknown. Apply the plan without select, schedule and gate."
            )
        cached = None if cache is None else cache.get_seq_length()
        # A static cache keeps its length on the device, where asking would wait; else it is counted here. Not always
        # here: a compiled forward would take the count for a constant and be compiled anew for every token.
        begin = 0 if cache is None else cached if isinstance(cached, int) else self._seen
        end = self._seen = begin + t
        width, k = prompt.width, rows // prompt.rows
        parts = []
        if begin < width:
            parts.append((prompt.at, k, slice(begin, min(end, width))))
        if end > width:
            number = torch.arange(max(begin - width, 0), end - width, device=tokens.device)
            length = prompt.at.length.repeat_interleave(k)
            fed = None if ids is None else ids[:, max(width - begin, 0) :]
            parts.append((Positions(length[:, None] + number, number, length, fed), 1, slice(None)))
        return Call(tuple(parts), (rows, t), begin, width)

    def _plain(self, tokens: Tensor, ids: Tensor | None, cache: Any, mask: Any) -> Call:
        rows, t = tokens.shape[:2]
        begin = int(cache.get_seq_length()) if cache is not None else 0
        if begin and (begin, rows) != (self._seen, self._rows):
            raise InputError(
                f"the call continues a cache of {begin} tokens x {rows} rows, but the last call ended at "
                f"{self._seen} x {self._rows}; run one conversation at a time, from its beginning and with the "
                "plan applied, or use generate."
            )
        end = begin + t
        if begin == 0 or t > 1:
            self._width = end
        self._seen, self._rows = end, rows
        real = _real(mask, rows, end, tokens.device)
        index = torch.where(real, real.cumsum(1) - 1, -1)
        length = real[:, : self._width].sum(1)
        number = (torch.arange(begin, end, device=tokens.device) - self._width).clamp_min(-1)
        at = Positions(index[:, begin:], number, length, ids)
        return Call(((at, 1, slice(None)),), (rows, t), begin, self._width)

    def begin_generate(self, model: nn.Module, given: dict[str, Any]) -> None:
        """Take note of the prompts that ``generate`` was given, by argument name."""
        config, default = given.get("generation_config"), getattr(model, "generation_config", None)

        def option(name: str) -> Any:
            values = (given.get(name), getattr(config, name, None), getattr(default, name, None))
            return next((value for value in values if value is not None), None)

        for name, what in _REFUSED.items():
            value = option(name)
            if value not in (None, False) and not (
                name in ("guidance_scale", "penalty_alpha") and value in (0, 1)
            ):
                raise UnsupportedModelError(
                    f"{what} ({name}) feeds the model tokens that are not part of the sequence, so a plan with "
                    "select, schedule or gate cannot follow their positions. Generate without it, or apply the "
                    "plan to every token."
                )
        embeds, cache = given.get("inputs_embeds"), given.get("past_key_values")
        found = (given.get("inputs"), given.get("input_ids"), embeds)
        tokens = next((x for x in found if x is not None and x.shape[1]), None)
        if tokens is None:  # an unconditional start: one BOS token
            tokens = torch.zeros(1, 1, dtype=torch.int64)
        tokens = tokens.to(getattr(model, "device", tokens.device))
        ids = tokens if tokens.ndim == 2 else None
        begin = int(cache.get_seq_length()) if cache is not None else 0
        mask = given.get("attention_mask")
        if mask is None:
            width = max(tokens.shape[1], begin + 1) if begin else tokens.shape[1]
            real = _guess(ids, option("pad_token_id"), option("eos_token_id"), tokens)
        else:
            width = mask.shape[1]
            real = _real(mask, tokens.shape[0], width, tokens.device)
        if real.shape[1] != width or (ids is not None and ids.shape[1] != width):
            raise InputError(
                f"generate was given {tokens.shape[1]} tokens to continue a cache of {begin}; pass input_ids and "
                "attention_mask of the whole conversation, so that positions are known."
            )
        index = torch.where(real, real.cumsum(1) - 1, -1)
        number = torch.full((width,), -1, device=real.device)
        self._prompt = _Prompt(Positions(index, number, real.sum(1), ids), tokens.shape[0], width)
        self._seen = begin
        self.carried.clear()

    def end_generate(self) -> None:
        """Forget the prompts; a cache that ``generate`` returned can only be continued by ``generate``."""
        self._prompt, self._seen, self._rows = None, 0, 0
        self.carried.clear()


def _real(mask: Any, rows: int, width: int, device: torch.device) -> Tensor:
    """Return where tokens are not padding, ``[rows, width]`` bool."""
    if mask is None:
        return torch.ones(rows, width, dtype=torch.bool, device=device)
    if not isinstance(mask, Tensor) or mask.shape != (rows, width):
        got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise InputError(
            f"got an attention_mask {got}; to know the position of every token, it must be [{rows}, {width}]: one "
            "entry per token that ran so far."
        )
    return mask.to(device) != 0


def _guess(ids: Tensor | None, pad: Any, eos: Any, tokens: Tensor) -> Tensor:
    """Return the mask that ``generate`` makes up when it is given none."""
    if ids is None or pad is None or pad in (eos if isinstance(eos, list | tuple) else [eos]):
        return torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    return ids != pad


_clocks: WeakKeyDictionary[nn.Module, Clock] = WeakKeyDictionary()


def watch(model: nn.Module) -> tuple[Clock, Callable[[], None]]:
    """Return the clock of a model and the function that lets go of it; the last one to do so stops it.

    Raises:
        UnsupportedModelError: an encoder-decoder, which runs two sequences.
    """
    # A PEFT model hands generate on to the model inside, which then runs itself and not the wrapper.
    host: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    if getattr(getattr(host, "config", None), "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{type(host).__name__} runs an encoder and a decoder, two sequences with positions of their own; "
            "apply the plan without select, schedule and gate."
        )
    clock = _clocks.get(host)
    if clock is None:
        body = getattr(host, "base_model", host)
        clock = _clocks[host] = Clock(body)
        # A function, not a method: a deep copy of the model goes on telling this clock, which its hooks read.
        clock.handle = body.register_forward_pre_hook(
            lambda _body, args, kwargs: clock.before(args, kwargs), with_kwargs=True
        )
        clock.former = _wrap_generate(host, clock)
    clock.users += 1

    def leave() -> None:
        clock.users -= 1
        if clock.users == 0:
            clock.handle.remove()
            host.__dict__.pop("generate", None)
            host.__dict__.update(clock.former)
            _clocks.pop(host, None)

    return clock, leave


def _wrap_generate(host: Any, clock: Clock) -> dict[str, Any]:
    """Let the clock see what ``generate`` is given; return the attribute that was in the way, if any."""
    if not hasattr(host, "generate"):
        return {}
    signature = inspect.signature(type(host).generate)
    former = {name: host.__dict__[name] for name in ("generate",) if name in host.__dict__}

    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(self, *args, **kwargs).arguments
        run = former.get("generate", MethodType(type(self).generate, self))
        clock.begin_generate(self, {**bound, **bound.get("kwargs", {})})
        try:
            return run(*args, **kwargs)
        finally:
            clock.end_generate()

    # Bound, so that a deep copy of the model generates with the copy.
    host.generate = MethodType(generate, host)
    return former
