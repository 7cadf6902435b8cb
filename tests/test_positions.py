"""Which positions a plan edits, held against a reference written by hand, for every way to run a model."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tiny import D, hook_count, oblique, tiny, token_ids
from torch import Tensor, nn

from repe_unlearn.errors import InputError, ShapeError, UnsupportedModelError
from repe_unlearn.fingerprints import fingerprint
from repe_unlearn.hooks import apply
from repe_unlearn.plan import ErasurePlan
from repe_unlearn.positions import Positions, selected
from repe_unlearn.sites import Site
from repe_unlearn.tokens import Select

SITES = {"llama": "model.layers.1.mlp", "gpt2": "transformer.h.1.mlp", "mistral": "model.layers.1.mlp"}
models = pytest.mark.parametrize("model_type", SITES)  # mistral: a sliding window of 8
PAD = 0
SELECTS = [
    "all,sinks=0,specials",
    "all,specials",
    "all,phase=prompt,specials",
    "all,phase=generation,specials",
    "after_prompt,specials,sinks=0",
    "all,start=-2,specials",
    "all,start=2,stop=-1,specials,sinks=0",
    "all,start=3,stop=9,specials",
    "all,start=-3,stop=10,specials",
    "last,phase=prompt,specials",
    "last,phase=prompt,count=3,specials,exclude=11+12",
    "all,include=11+12+13+14+15+16+17+18+19+20+21+22+23+24+25+26+27+28+29+30,specials",
    "all,exclude=31+32+33+34+35+36+37+38+39+40+41+42+43+44+45+46+47+48,specials,phase=generation",
]


def by_hand(select: Select, ids: list[int], real: list[bool], width: int) -> list[bool]:
    """Return which columns of one row are edited; the first ``width`` are the prompt."""
    length, index, kept = sum(real[:width]), -1, []
    for column, token in enumerate(ids):
        if not real[column]:
            kept.append(False)
            continue
        index += 1
        generated = column >= width
        ok = index >= select.sinks
        if select.phase == "prompt":
            ok = ok and not generated
        if select.phase == "generation" or select.kind == "after_prompt":
            ok = ok and generated
        if select.start is not None:
            ok = ok and index >= select.start + (length if select.start < 0 else 0)
        if select.stop is not None:
            ok = ok and index < select.stop + (length if select.stop < 0 else 0)
        if select.include:
            ok = ok and token in select.include
        kept.append(ok and token not in select.exclude)
    if select.kind == "last":
        last = [c for c, ok in enumerate(kept) if ok][-select.count :]
        kept = [c in last for c in range(len(kept))]
    return kept


def plan_at(model: nn.Module, path: str) -> ErasurePlan:
    return ErasurePlan({Site(path): oblique(1)}, fingerprint(model))


@contextmanager
def watching(model: nn.Module, path: str, **how: Any) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Apply a plan at one site; yield, for every call, the ids that ran and where the site's tensor changed."""
    calls: list[tuple[Tensor, Tensor]] = []
    state: dict[str, Tensor] = {}
    body = model.base_model

    def ids(_m: nn.Module, args: tuple, kwargs: dict) -> None:
        state["ids"] = kwargs["input_ids"] if "input_ids" in kwargs else args[0]

    def before(_m: nn.Module, _a: object, output: Tensor) -> None:
        state["x"] = output

    def after(_m: nn.Module, _a: object, output: Tensor) -> None:
        calls.append((state["ids"], (output != state["x"]).any(-1)))

    module = model.get_submodule(path)
    handles = [body.register_forward_pre_hook(ids, with_kwargs=True), module.register_forward_hook(before)]
    with apply(model, plan_at(model, path), **how):
        handles.append(module.register_forward_hook(after))
        try:
            yield calls
        finally:
            for handle in handles:
                handle.remove()


def prompts(side: str) -> tuple[Tensor, Tensor]:
    """Return a batch of prompts of 4, 9 and 6 tokens: ids and mask."""
    ids, mask = token_ids(3, 9), torch.ones(3, 9, dtype=torch.int64)
    for row, length in enumerate((4, 9, 6)):
        cut = slice(0, 9 - length) if side == "left" else slice(length, 9)
        ids[row, cut], mask[row, cut] = PAD, 0
    return ids, mask


def check(
    calls: list[tuple[Tensor, Tensor]], select: Select, mask: Tensor, full: Tensor, *, repeat: int = 1
) -> int:
    """Compare every call with the reference; return how many positions were edited.

    Args:
        calls: from ``watching``.
        select: what was applied.
        mask: ``[b, width]`` of the prompts.
        full: ``[b, width]`` ids of the prompts.
        repeat: rows per prompt.
    """
    width = mask.shape[1]
    done = torch.zeros(len(mask) * repeat, 0, dtype=torch.int64)
    edited = 0
    for ids, changed in calls:
        begin = 0 if ids.shape[1] >= max(width, done.shape[1]) else done.shape[1]
        done = torch.cat([done[:, :begin], ids], 1)
        for row in range(len(ids)):
            real = [bool(m) for m in mask[row // repeat]] + [True] * (done.shape[1] - width)
            line = done[row].tolist()
            if begin + ids.shape[1] < width:  # a chunk: the rest of the prompt is known to generate
                line = [*line, *full[row // repeat, len(line) :].tolist()]
            expected = by_hand(select, line, real, width)[begin : begin + ids.shape[1]]
            assert changed[row].tolist() == expected, (select, row, begin)
            edited += sum(expected)
    return edited


@models
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("cache", [True, False])
def test_generate(model_type: str, side: str, cache: bool) -> None:
    model, (ids, mask) = tiny(model_type, dtype=torch.float32), prompts(side)
    counts = []
    for text in SELECTS:
        select = Select.parse(text)
        ways: list[dict[str, Any]] = [{}]
        if cache:
            ways += [
                {"prefill_chunk_size": 4},
                {"num_beams": 3},
                {"num_return_sequences": 2, "do_sample": True},
            ]
        for way in ways:
            repeat = way.get("num_beams", way.get("num_return_sequences", 1))
            torch.manual_seed(0)
            with watching(model, SITES[model_type], select=select) as calls:
                model.generate(
                    ids, attention_mask=mask, max_new_tokens=5, min_new_tokens=5, use_cache=cache,
                    **{"do_sample": False, **way},
                )  # fmt: skip
            assert len(calls) >= 5
            counts.append(check(calls, select, mask, ids, repeat=repeat))
    assert min(counts) > 0  # control: every selection edited something ...
    assert len(set(counts)) > 8  # ... they differ ...
    with pytest.raises(AssertionError):  # ... and the reference tells one from another
        check(calls, Select.parse(SELECTS[0]), mask, ids, repeat=repeat)


@models
def test_beams_without_cache_and_two_sequences_per_beam(model_type: str) -> None:
    model, (ids, mask) = tiny(model_type, dtype=torch.float32), prompts("left")
    for text, cache in itertools.product(SELECTS[:7], (True, False)):
        select = Select.parse(text)
        with watching(model, SITES[model_type], select=select) as calls:
            model.generate(
                ids, attention_mask=mask, max_new_tokens=4, num_beams=4, num_return_sequences=2,
                do_sample=False, use_cache=cache,
            )  # fmt: skip
        check(calls, select, mask, ids, repeat=4)


@models
def test_rows_that_ended_and_masks_that_generate_makes_up(model_type: str) -> None:
    model, (ids, mask) = tiny(model_type, dtype=torch.float32), prompts("left")
    plain = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=PAD)
    eos = int(plain[0, 10])  # the first row ends early
    for text in SELECTS:
        select = Select.parse(text)
        with watching(model, SITES[model_type], select=select, strength=1e-4) as calls:
            out = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=eos, pad_token_id=PAD)
        check(calls, select, mask, ids)
        assert PAD in out[0, 9:].tolist()


@models
@pytest.mark.parametrize("side", ["left", "right"])
def test_plain_forward(model_type: str, side: str) -> None:
    model, (ids, mask) = tiny(model_type, dtype=torch.float32), prompts(side)
    for text in SELECTS:
        select = Select.parse(text)
        with watching(model, SITES[model_type], select=select) as calls:
            model(ids, attention_mask=mask)
            model(input_ids=ids, attention_mask=mask, use_cache=False)
            model.base_model(ids, attention_mask=mask)
            (model(ids[1:2]), calls.pop())  # without a mask, as another batch in between
        check(calls, select, mask, ids)
        assert len(calls) == 3


@models
def test_decoding_by_hand(model_type: str) -> None:
    """Prompt in two chunks, then token by token; index windows that do not need the end of the prompt."""
    model, (ids, mask) = tiny(model_type, dtype=torch.float32), prompts("left")
    for text in SELECTS:
        select = Select.parse(text)
        whole = select.kind == "last" or any(b is not None and b < 0 for b in (select.start, select.stop))
        with watching(model, SITES[model_type], select=select) as calls:
            cuts = [9] if whole else [5, 9]
            cache, begin = None, 0
            for end in cuts:
                out = model(
                    ids[:, begin:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True
                )
                cache, begin = out.past_key_values, end
            seen = mask
            for _ in range(4):
                token = out.logits[:, -1:].argmax(-1)
                seen = torch.cat([seen, torch.ones(3, 1, dtype=seen.dtype)], 1)
                out = model(token, attention_mask=seen, past_key_values=cache)
        check(calls, select, mask, ids)


def test_a_second_turn_on_the_same_cache() -> None:
    model, ids = tiny("llama", dtype=torch.float32), token_ids(1, 9)
    select = Select("all", phase="generation", specials=True)
    with watching(model, SITES["llama"], select=select) as calls:
        first = model.generate(ids, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
        turn = torch.cat([first.sequences, token_ids(1, 3, seed=3)], 1)
        calls.clear()
        model.generate(turn, past_key_values=first.past_key_values, max_new_tokens=3, do_sample=False)
    assert [c.tolist() for _, c in calls] == [[[False] * 4], [[True]], [[True]]]  # one token was never fed


def test_a_static_cache() -> None:
    model, (ids, mask) = tiny("llama", dtype=torch.float32), prompts("left")
    for text in SELECTS[:6]:
        with watching(model, SITES["llama"], select=text) as calls:
            model.generate(
                ids, attention_mask=mask, max_new_tokens=4, min_new_tokens=4, do_sample=False,
                cache_implementation="static",
            )  # fmt: skip
        assert check(calls, Select.parse(text), mask, ids)


def test_embeddings_instead_of_ids() -> None:
    model, ids = tiny("llama", dtype=torch.float32), token_ids(2, 6)
    embeds = model.get_input_embeddings()(ids)
    plan = plan_at(model, "model.layers.1.mlp")
    options: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    with apply(model, plan, select="all,phase=generation,specials"):
        by_ids = model.generate(ids, **options)[:, 6:]
        by_embeds = model.generate(inputs_embeds=embeds, attention_mask=torch.ones_like(ids), **options)
        assert by_ids.tolist() == by_embeds.tolist()
    with (
        apply(model, plan, select="all,include=5,specials"),
        pytest.raises(InputError, match="pass input_ids"),
    ):
        model(inputs_embeds=embeds)


# The schedule


@models
@pytest.mark.parametrize("cache", [True, False])
def test_schedule(model_type: str, cache: bool) -> None:
    """The first site of a linear readout moves by exactly the factor."""
    model, ids = tiny(model_type, dtype=torch.float64), prompts("right")[0]
    final = "transformer.ln_f" if model_type == "gpt2" else "model.norm"
    factors = {-1: 0.25, 0: 0.0, 1: 1.0, 2: -0.5}
    plan, e = plan_at(model, final), oblique(1)
    seen: list[Tensor] = []
    before = model.get_submodule(final).register_forward_hook(lambda _m, _a, x: seen.append(x))
    with apply(model, plan, schedule=factors.__getitem__, strength=2.0):
        after = model.get_submodule(final).register_forward_hook(lambda _m, _a, x: seen.append(x))
        model.generate(ids[1:2], max_new_tokens=4, min_new_tokens=4, do_sample=False, use_cache=cache)
    before.remove()
    after.remove()
    for call, (x, y) in enumerate(zip(seen[::2], seen[1::2], strict=True)):
        numbers = list(range(-9, call)) if not cache else (list(range(-9, 0)) if call == 0 else [call - 1])
        factor = torch.tensor([2 * factors[max(n, -1)] for n in numbers], dtype=x.dtype)[:, None]
        torch.testing.assert_close(y, x + factor * (e(x) - x))
    assert len(seen) == 8


def test_schedules_that_give_no_number() -> None:
    model = tiny("llama")
    with (
        apply(model, plan_at(model, "model.norm"), schedule=lambda n: float("nan")),
        pytest.raises(InputError, match=r"got schedule\(-1\) = nan; needed a finite number"),
    ):
        model(token_ids())


# Refusals


@pytest.mark.parametrize(
    ("option", "value"),
    [("prompt_lookup_num_tokens", 3), ("guidance_scale", 1.5), ("assistant_model", True)],
)
def test_what_feeds_other_tokens_is_refused(option: str, value: object) -> None:
    model = tiny("llama", dtype=torch.float32)
    value = copy.deepcopy(model) if value is True else value
    plan = plan_at(model, "model.norm")
    with apply(model, plan, select="all,specials"):
        with pytest.raises(UnsupportedModelError, match=rf"\({option}\) feeds the model tokens"):
            model.generate(token_ids(1, 5), **{option: value})
        model.generate(token_ids(1, 5), max_new_tokens=2)  # the clock is as before
    with apply(model, plan):  # every token: nothing to follow
        model.generate(token_ids(1, 5), max_new_tokens=2, do_sample=False, **{option: value})


def test_encoder_decoders_are_refused() -> None:
    model = tiny("t5")
    plan = plan_at(model, "decoder.block.1")
    with pytest.raises(UnsupportedModelError, match="two sequences with positions of their own"):
        apply(model, plan, select="all,specials")
    assert hook_count(model) == 0


def test_continuing_what_was_not_seen_is_refused() -> None:
    model, ids = tiny("llama", dtype=torch.float32), token_ids(2, 5)
    cache = model(ids, use_cache=True).past_key_values
    with apply(model, plan_at(model, "model.norm"), select="all,specials"):
        with pytest.raises(
            InputError, match="continues a cache of 5 tokens x 2 rows, but the last call ended at 0"
        ):
            model(ids[:, :1], past_key_values=cache)
        with pytest.raises(InputError, match=r"attention_mask \(2, 2\).*must be \[2, 5\]"):
            model(ids, attention_mask=torch.ones(2, 2))
        with pytest.raises(InputError, match="whole conversation"):
            model.generate(ids[:, :1], past_key_values=cache, attention_mask=torch.ones(2, 6))
        model(ids)


def test_sites_without_one_vector_per_token() -> None:
    model = tiny("llama")
    plan = plan_at(model, "model.layers.0.self_attn.q_proj")
    body = ErasurePlan({Site("lm_head", "input"): oblique(1)}, fingerprint(model))
    with apply(model, plan, select="all,specials"):
        model(token_ids())
    with (
        apply(model, body, select="all,specials"),
        pytest.raises(ShapeError, match=r"lm_head:input holds vectors \[2, 1\] where 2 x 9 tokens run"),
    ):
        model(token_ids(), logits_to_keep=1)


def test_a_site_outside_of_a_forward() -> None:
    model = tiny("llama")
    with (
        apply(model, plan_at(model, "model.norm"), select="all,specials"),
        pytest.raises(InputError, match="ran outside of the model's own forward"),
    ):
        model.get_submodule("model.norm")(torch.randn(2, D, dtype=torch.float64))


# Coming and going


def test_an_error_in_generate_does_not_upset_the_clock() -> None:
    model, ids = tiny("llama", dtype=torch.float32), token_ids(2, 5)
    select = "all,phase=generation,specials"

    def stop(ids: Tensor, scores: Tensor) -> Tensor:
        if ids.shape[1] > 6:
            raise KeyboardInterrupt
        return scores

    with watching(model, "model.norm", select=select) as calls:

        def run() -> list[list[list[bool]]]:
            calls.clear()
            model(ids)
            model.generate(ids, max_new_tokens=3, min_new_tokens=3, do_sample=False)
            return [changed.tolist() for _, changed in calls]

        expected = run()
        with pytest.raises(KeyboardInterrupt):
            model.generate(ids, max_new_tokens=5, logits_processor=[stop])
        with pytest.raises(IndexError):
            model(torch.tensor([[999]]))
        assert run() == expected
    assert expected == [[[False] * 5] * 2] * 2 + [[[True]] * 2] * 2


def test_two_plans_share_one_clock_and_leave_nothing() -> None:
    model = tiny("llama")
    before, plan = dict(model.__dict__), plan_at(model, "model.norm")
    one, two = apply(model, plan, select="all,specials"), apply(model, plan, schedule=lambda n: 1.0)
    assert hook_count(model) == 2  # one clock, one hook at the site
    assert "generate" in model.__dict__
    one.remove()
    one.remove()
    assert hook_count(model) == 2
    assert "generate" in model.__dict__
    two.remove()
    assert hook_count(model) == 0
    assert model.__dict__ == before


def test_a_wrapper_of_the_users_stays() -> None:
    model = tiny("llama")
    model.generate = mine = lambda *a, **k: "mine"  # type: ignore[method-assign]
    with apply(model, plan_at(model, "model.norm"), select="all,specials"):
        assert model.generate(token_ids()) == "mine"
    assert model.generate is mine


def test_the_model_is_freed_while_a_plan_is_on_it() -> None:
    import gc
    import weakref

    model = tiny("llama")
    handle = apply(model, plan_at(model, "model.norm"), select="all,specials")
    gone = weakref.ref(model)
    del model, handle
    gc.collect()
    assert gone() is None


# The selection itself


def test_selected_by_hand() -> None:
    at = Positions(
        torch.tensor([[-1, 0, 1, 2, 3, 4]]), torch.tensor([-1, -1, -1, -1, 0, 1]), torch.tensor([3]), None
    )
    for text, expected in {
        "all,sinks=0": [0, 1, 1, 1, 1, 1],
        "all": [0, 0, 1, 1, 1, 1],
        "all,phase=prompt": [0, 0, 1, 1, 0, 0],
        "after_prompt": [0, 0, 0, 0, 1, 1],
        "all,start=-1": [0, 0, 0, 1, 1, 1],
        "all,stop=-1,sinks=0": [0, 1, 1, 0, 0, 0],
        "last,count=2,phase=prompt,sinks=0": [0, 0, 1, 1, 0, 0],
        "last": [0, 0, 0, 0, 0, 1],
    }.items():
        assert selected(Select.parse(text), at).long().tolist() == [expected], text
