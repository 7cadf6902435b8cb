"""Sampling: whether any of several answers, drawn at random, is the right one (leak@k)."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from math import comb
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from repe_unlearn.answers import Beginning, continuation
from repe_unlearn.audit.lens import per_fact
from repe_unlearn.audit.likelihoods import BATCH_TOKENS, end_tokens, equally_long
from repe_unlearn.audit.scores import Scores, curves
from repe_unlearn.encoding import longest_text
from repe_unlearn.errors import InputError, NonFiniteError, NotEnoughDataError
from repe_unlearn.facts import Facts, Form, Question, Role
from repe_unlearn.head import only_last
from repe_unlearn.placement import input_device, require_whole


def leak_at_k(
    model: nn.Module,
    tokenizer: Any,
    facts: Facts,
    *,
    k: int = 8,
    forms: Sequence[Form] = ("unseen",),
    roles: Iterable[Role] | None = None,
    seed: int = 0,
    batch_tokens: int = BATCH_TOKENS,
    progress: bool = True,
) -> Scores:
    """Return the share of questions to which any of k sampled answers is right, per fact.

    Sampled at temperature 1 from all tokens (top-p 1), one token more than the longest answer or option of the question
    has. A sample is right when it begins with the answer, letter case, accents and punctuation aside, and goes on with
    another word if at all. Guessing among n options gives 1 - (1 - 1/n)^k, not 0: compare with decoys. The draws depend
    on the seed and the model only, not on batches.

    Args:
        model: a causal language model with its head.
        tokenizer: its tokenizer, a fast one.
        facts: the facts of all roles.
        k: samples per question, >= 1.
        forms: wordings to ask in.
        roles: of the facts that are asked for; default all.
        seed: of the draws.
        batch_tokens: positions per batch.
        progress: show a progress bar.

    Returns:
        Scores, and as curves the expected share for 1 to k samples.

    Raises:
        InputError: k < 1, or as ``answers``.
        NotEnoughDataError: no fact has such a wording.
        NonFiniteError: the model's logits hold NaN or infinity.

    Example:
        ``leak_at_k(model, tokenizer, facts, k=16).of(facts, "forget").mean()``
    """
    if k < 1:
        raise InputError(f"got k={k}; needed at least 1 sample.")
    questions = facts.questions(*forms, roles=roles, seed=seed)
    if not questions:
        raise NotEnoughDataError(f"no fact of {facts.name!r} has a wording {' or '.join(forms)}.")
    drawn = samples(
        model,
        tokenizer,
        questions,
        k,
        seed,
        batch_tokens,
        progress,
        going_on=lambda i, text: undecided(text, questions[i].answer),
    )
    hits = [
        sum(begins_with(text, question.answer) for text in texts)
        for question, texts in zip(questions, drawn, strict=True)
    ]
    # Of k samples with h hits a random subset of j has none with probability C(k - h, j) / C(k, j).
    table = {j: per_fact(questions, [1 - comb(k - h, j) / comb(k, j) for h in hits]) for j in range(1, k + 1)}
    shown = curves(
        table,
        facts,
        "Sampled answers",
        x_label="samples",
        y_label="share with a right one",
        caption="How often any of so many sampled answers is right. Decoys show what guessing gives.",
    )
    settings = {
        "samples": f"{k} at temperature 1, top-p 1",
        "forms": ", ".join(forms),
        "seed": str(seed),
    }
    return Scores("leak_at_k", "T0", table[k], "share", shown, settings)


def samples(
    model: nn.Module,
    tokenizer: Any,
    questions: Sequence[Question],
    k: int,
    seed: int,
    batch_tokens: int = BATCH_TOKENS,
    progress: bool = True,
    going_on: Callable[[int, str], bool] | None = None,
) -> list[list[str]]:
    """Return k sampled continuations of every question, each one token longer than its longest answer or option.

    One of which ``going_on(index of the question, text so far)`` is False ends there. Samples of a question that agree so far share one run. One number between 0 and 1 is drawn for every question, sample
    and token beforehand, and picks the token by the cumulative distribution.
    """
    require_whole(model)
    longest = longest_text(model)
    prompts, lengths = list[Beginning](), list[int]()
    for q in questions:
        spoken = [continuation(tokenizer, q.prompt, text, longest) for text in (q.answer, *q.options)]
        prompts.append(tuple(tokenizer(q.prompt)["input_ids"]))
        lengths.append(1 + max(len(ids) - start for ids, start in spoken))
    ends = end_tokens(model, tokenizer)
    generator = torch.Generator().manual_seed(seed)
    picks = torch.rand(len(prompts), k, max(lengths), generator=generator, dtype=torch.float64)
    said = [[prompt] * k for prompt in prompts]

    @cache
    def ended(i: int, ids: Beginning) -> bool:
        new = ids[len(prompts[i]) :]
        return bool(new) and not going_on(i, tokenizer.decode(new, skip_special_tokens=True))  # type: ignore[misc]

    with tqdm(total=max(lengths), desc="samples", unit="token", disable=not progress, leave=False) as bar:
        for step in range(max(lengths)):
            growing = [
                (i, j)
                for i, texts in enumerate(said)
                for j, ids in enumerate(texts)
                if step < lengths[i]
                and len(ids) == len(prompts[i]) + step  # has not stopped before
                and (step == 0 or ids[-1] not in ends)
                and (longest is None or len(ids) < longest)
                and (going_on is None or not ended(i, ids))
            ]
            following = _next(model, {said[i][j]: picks[i, :, step] for i, j in growing}, batch_tokens)
            for i, j in growing:
                said[i][j] = (*said[i][j], following[said[i][j]][j])
            bar.update()
    return [
        [tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True) for ids in texts]
        for prompt, texts in zip(prompts, said, strict=True)
    ]


def _next(model: nn.Module, picks: dict[Beginning, Tensor], batch_tokens: int) -> dict[Beginning, list[int]]:
    """Return text -> the token that follows it for every pick (0 to 1)."""
    texts, found = list(picks), dict[Beginning, list[int]]()
    device = input_device(model)
    with torch.no_grad():
        for chunk in equally_long(texts, batch_tokens):
            ids = torch.tensor([texts[i] for i in chunk], device=device)
            options = {"use_cache": False, **only_last(model, 1)}
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **options).logits[:, -1]
            total = logits.double().softmax(-1).cumsum(-1).cpu()
            if not torch.isfinite(total).all():
                raise NonFiniteError("the model's logits hold NaN or infinity; load it in float32.")
            for row, i in enumerate(chunk):
                pick = picks[texts[i]] * total[row, -1]  # the sum of all may be a little below 1
                token = torch.searchsorted(total[row], pick, right=True)
                found[texts[i]] = token.clamp_max(total.shape[-1] - 1).tolist()
    return found


def begins_with(text: str, answer: str) -> bool:
    """Whether a text begins with an answer as whole words, letter case, accents and punctuation aside."""
    words, wanted = plain(text), plain(answer)
    return bool(wanted) and words[: len(wanted)] == wanted


def undecided(text: str, answer: str) -> bool:
    """Whether it depends on what follows if a text begins with an answer; its last word may not be complete."""
    words, wanted = plain(text), plain(answer)
    if not wanted or len(words) > len(wanted):
        return False
    whole, last = words[:-1], "".join(words[-1:])
    return whole == wanted[: len(whole)] and wanted[len(whole)].startswith(last)


def plain(text: str) -> list[str]:
    """Return the words of a text in lower case, without accents and punctuation."""
    bare = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    return re.findall(r"\w+", bare.casefold())
