"""Likelihoods: what a model gives every token of a completion, and what it writes by itself; one pass each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from repe_unlearn.encoding import Encoded, batches, completion_tokens, longest_text, pad_id_of
from repe_unlearn.errors import InputError, NonFiniteError, NotEnoughDataError, UnsupportedModelError
from repe_unlearn.placement import input_device, require_whole

BATCH_TOKENS = 512


@dataclass(frozen=True, slots=True, eq=False)
class Likelihood:
    """One completion of t tokens as a model sees it; float64 on the CPU, natural logarithms.

    Attributes:
        text: the completion.
        log_probs: ``[t]`` log-probability of each token, given the prompt and the tokens before it.
        expected: ``[t]`` mean of the log-probabilities of all tokens under the same distribution (minus its entropy).
        variance: ``[t]`` variance of those log-probabilities.
        top: ``[t]`` True where the token is the most probable one.
    """

    text: str
    log_probs: Tensor
    expected: Tensor
    variance: Tensor
    top: Tensor

    @property
    def nll(self) -> float:
        """Mean negative log-probability per token, in nats."""
        return -float(self.log_probs.mean())


def likelihoods(
    model: nn.Module,
    tokenizer: Any,
    pairs: Sequence[tuple[str, str]],
    *,
    batch_tokens: int = BATCH_TOKENS,
    progress: bool = True,
) -> list[Likelihood]:
    """Return the likelihood of every completion after its prompt, the same alone and in a batch; one pass.

    Prompt and completion are tokenised together, as the model saw such text in training; the tokens of the completion
    are those that end behind the prompt. Nothing is put between the two: completions usually begin with a space.

    Args:
        model: a causal language model; hooks that are applied to it count.
        tokenizer: its fast tokenizer (with character offsets).
        pairs: (prompt, completion). With an empty prompt the whole text counts, without its first token where the
            tokenizer puts no beginning-of-sequence token before it: nothing predicts that one.
        batch_tokens: positions per batch, padding included. The logits of one batch are held at once.
        progress: show a progress bar.

    Returns:
        One ``Likelihood`` per pair, in order.

    Raises:
        InputError: no pairs, a tokenizer without offsets, or a text longer than the model takes.
        NotEnoughDataError: a completion without a token that could be predicted.
        NonFiniteError: the model gives NaN or infinite logits.
        UnsupportedModelError: a wrapped or sharded model.

    Example:
        ``likelihoods(model, tokenizer, [("The capital of France is", " Paris")])[0].nll``
    """
    require_whole(model)
    work = batches(
        [_completion(tokenizer, model, i, *pair) for i, pair in enumerate(_some(pairs, "pairs"))],
        batch_tokens=batch_tokens,
        pad_id=pad_id_of(tokenizer),
        side="right",
        pooled=False,
        real=False,
    )
    device, found = input_device(model), dict[int, Likelihood]()
    with torch.inference_mode():
        for batch in _bar(work, "likelihoods", progress):
            logits = model(**batch.to(device).arguments(), use_cache=False).logits
            row, column = batch.row.to(logits.device), batch.column.to(logits.device)
            values = _per_token(logits[row, column], batch.z.to(logits.device))
            for owner in batch.owner.unique().tolist():
                mine = [value[batch.owner == owner] for value in values]
                if not bool(torch.isfinite(mine[0]).all()):
                    raise NonFiniteError(
                        f"the model gives NaN or infinite logits for the text {pairs[owner][1][:60]!r}; "
                        "load it in float32, or check the edit."
                    )
                found[owner] = Likelihood(pairs[owner][1], *mine)
    return [found[i] for i in range(len(pairs))]


def greedy(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 32,
    batch_tokens: int = BATCH_TOKENS,
    progress: bool = True,
) -> list[str]:
    """Return the most probable continuation of every prompt, token by token, without the prompt.

    Sampling, beams and penalties that the model's own generation settings ask for are switched off. Prompts of the same
    number of tokens run together, without padding.

    Args:
        model: a causal language model that can ``generate``; hooks that are applied to it count.
        tokenizer: its tokenizer.
        prompts: as the model is to see them; a chat turn has to be rendered before.
        max_new_tokens: longest continuation, >= 1; it ends earlier at an end-of-sequence token.
        batch_tokens: prompt positions per batch, >= 1.
        progress: show a progress bar.

    Returns:
        One text per prompt, in order, without special tokens.

    Raises:
        InputError: no prompts, an empty one, or one that leaves no room for ``max_new_tokens``.
        UnsupportedModelError: the model cannot generate, or is wrapped or sharded.

    Example:
        ``greedy(model, tokenizer, ["The capital of France is"], max_new_tokens=3)``
    """
    require_whole(model)
    generate = getattr(model, "generate", None)
    if generate is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no generate(); load a causal language model of transformers."
        )
    if max_new_tokens < 1:
        raise InputError(f"got max_new_tokens={max_new_tokens}; needed at least 1.")
    tokens: list[list[int]] = []
    for i, prompt in enumerate(_some(prompts, "prompts")):
        tokens.append(list(tokenizer(prompt)["input_ids"]))
        if not tokens[i]:
            raise InputError(f"prompt {i} has no token; give the model something to go on from.")
        _fits(model, len(tokens[i]) + max_new_tokens, prompt, f" with {max_new_tokens} new ones")
    device, ends, said = input_device(model), end_tokens(model, tokenizer), dict[int, str]()
    with torch.inference_mode():
        for chunk in _bar(equally_long(tokens, batch_tokens), "greedy", progress):
            ids = torch.tensor([tokens[i] for i in chunk], device=device)
            out = generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                num_beams=1,
                temperature=1.0,
                top_p=1.0,
                repetition_penalty=1.0,
                no_repeat_ngram_size=0,
                pad_token_id=pad_id_of(tokenizer),
            )
            for i, new in zip(chunk, out[:, ids.shape[1] :].tolist(), strict=True):
                stop = next((k for k, token in enumerate(new) if token in ends), len(new))
                said[i] = tokenizer.decode(new[:stop], skip_special_tokens=True)
    return [said[i] for i in range(len(prompts))]


def _completion(tokenizer: Any, model: nn.Module, i: int, prompt: str, completion: str) -> Encoded:
    ids, behind = completion_tokens(tokenizer, prompt, completion)
    _fits(model, len(ids), prompt + completion, "")
    targets = [k for k in behind if k > 0]  # a first token is predicted by nothing
    if not targets:
        raise NotEnoughDataError(
            f"pair {i} (prompt {prompt[:40]!r}, completion {completion[:40]!r}) has no completion token with one "
            "before it to predict it; give a longer completion or a prompt."
        )
    return Encoded(ids, [k - 1 for k in targets], [ids[k] for k in targets], i)


def _per_token(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return log-probability, mean, variance (over the vocabulary) and whether it leads, from logits ``[m, v]``."""
    log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    p = log_p.exp()
    finite = log_p.masked_fill(p == 0, 0.0)  # a token that is ruled out adds nothing, and 0 * inf is NaN
    expected = (p * finite).sum(-1)
    variance = (p * (finite - expected[:, None]).square()).sum(-1)
    chosen = log_p.gather(1, targets[:, None])[:, 0]
    return (
        chosen.double().cpu(),
        expected.double().cpu(),
        variance.double().cpu(),
        (log_p.argmax(-1) == targets).cpu(),
    )


def equally_long(tokens: Sequence[Sequence[int]], batch_tokens: int) -> list[list[int]]:
    """Return batches of indices of prompts with the same number of tokens, longest first.

    Padding would go to the left, where its positions see no token: eager attention gives NaN there in float64, and the
    number of a position, a sliding window or a bias by distance depends on the padding in some families.
    """
    groups: dict[int, list[int]] = {}
    for i, ids in enumerate(tokens):
        groups.setdefault(len(ids), []).append(i)
    chunks = []
    for length in sorted(groups, reverse=True):
        group, size = groups[length], max(1, batch_tokens // length)
        chunks += [group[start : start + size] for start in range(0, len(group), size)]
    return chunks


def _bar(work: Sequence[Any], label: str, progress: bool) -> Iterator[Any]:
    return iter(tqdm(work, desc=label, unit="batch", disable=not progress, leave=False))


def _some(items: Sequence[Any], what: str) -> Sequence[Any]:
    if not len(items):
        raise InputError(f"got no {what}; needed at least one.")
    return items


def _fits(model: nn.Module, tokens: int, text: str, extra: str) -> None:
    most = longest_text(model)
    if most is not None and tokens > most:
        raise InputError(f"{text[:60]!r}... has {tokens} tokens{extra}, the model takes {most}. Shorten it.")


def end_tokens(model: nn.Module, tokenizer: Any) -> set[int]:
    """Return the ids at which a continuation ends."""
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if ends is None:
        ends = tokenizer.eos_token_id
    return set() if ends is None else set(ends) if isinstance(ends, list | tuple) else {ends}
