"""The metrics of MUSE (Shi et al., arXiv 2407.06460): verbatim memory, knowledge memory, privacy leakage.

What differs from the code of muse_bench, on purpose:

- ``privleak`` takes the gold model's AUC as a number. There it is read from a table without naming the corpus, so that the
  metric ends in a KeyError.
- Every metric returns one number per item, for ``audit.statistics.mean_interval``; only ``privleak`` is in percent.
- Divergences between models (``audit.preservation.costs``) are between distributions. The KL baseline there is computed
  on raw logits, which is no divergence and can be negative.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from repe_unlearn.audit.likelihoods import BATCH_TOKENS, greedy
from repe_unlearn.audit.rouge import rouge_l
from repe_unlearn.errors import InputError

STOPS = ("\n\n", "\nQuestion", "Question:")
"""Where an answer to a question ends, as in muse_bench: there the model goes on to a question of its own."""


def verbmem(
    model: nn.Module,
    tokenizer: Any,
    passages: Sequence[tuple[str, str]],
    *,
    max_new_tokens: int = 128,
    batch_tokens: int = BATCH_TOKENS,
    progress: bool = True,
) -> NDArray[np.float64]:
    """Return how literally the model goes on with each passage: ROUGE-L F1 of its greedy continuation, 0 to 1.

    Args:
        model: a causal language model; hooks that are applied to it count.
        tokenizer: its tokenizer.
        passages: (beginning, true continuation); the continuation is cut to ``max_new_tokens`` tokens.
        max_new_tokens: tokens that are generated and compared.
        batch_tokens: positions per batch.
        progress: show a progress bar.

    Returns:
        ``[n]`` one number per passage; compare with a model that never saw the passages, which is not at 0 either.

    Raises:
        InputError: as ``greedy``, or a continuation without a token.

    Example:
        ``verbmem(model, tokenizer, [("It was the best of", " times, it was the worst of times")]).mean()``
    """
    wanted = []
    for i, (_, continuation) in enumerate(passages):
        ids = tokenizer(continuation, add_special_tokens=False)["input_ids"][:max_new_tokens]
        if not ids:
            raise InputError(f"passage {i} has an empty continuation; there is nothing to compare with.")
        wanted.append(tokenizer.decode(ids, skip_special_tokens=True))
    beginnings = [beginning for beginning, _ in passages]
    texts = greedy(
        model,
        tokenizer,
        beginnings,
        max_new_tokens=max_new_tokens,
        batch_tokens=batch_tokens,
        progress=progress,
    )
    return np.array([rouge_l(a, b).f1 for a, b in zip(wanted, texts, strict=True)])


def knowmem(
    model: nn.Module,
    tokenizer: Any,
    questions: Sequence[tuple[str, str | Sequence[str]]],
    *,
    examples: Sequence[tuple[str, str]],
    max_new_tokens: int = 32,
    batch_tokens: int = BATCH_TOKENS,
    progress: bool = True,
) -> NDArray[np.float64]:
    r"""Return how well the model answers each question after some examples: ROUGE-L F1 of its greedy answer, 0 to 1.

    The prompt is ``Question: ...\nAnswer: ...`` for every example, then the question; the answer ends where the model
    begins a question of its own.

    Args:
        model: a causal language model; hooks that are applied to it count.
        tokenizer: its tokenizer.
        questions: (question, answer), or several acceptable answers, of which the best counts.
        examples: (question, answer) shown before; they may not be among the questions.
        max_new_tokens: longest answer.
        batch_tokens: positions per batch.
        progress: show a progress bar.

    Returns:
        ``[n]`` one number per question.

    Raises:
        InputError: as ``greedy``; a question without an answer, or one that is among the examples.

    Example:
        ``knowmem(model, tokenizer, [("Who wrote Emma?", "Jane Austen")], examples=[("Who wrote Ulysses?", "Joyce")])``
    """
    shown = {question.strip() for question, _ in examples}
    answers = []
    for i, (question, answer) in enumerate(questions):
        if question.strip() in shown:
            raise InputError(
                f"question {i} ({question[:60]!r}) is among the examples, which give its answer away."
            )
        accepted = (answer,) if isinstance(answer, str) else tuple(answer)
        if not any(one.strip() for one in accepted):
            raise InputError(
                f"question {i} ({question[:60]!r}) has no answer; there is nothing to compare with."
            )
        answers.append(accepted)
    before = "".join(f"Question: {question}\nAnswer: {answer}\n\n" for question, answer in examples)
    texts = greedy(
        model,
        tokenizer,
        [f"{before}Question: {question}\nAnswer:" for question, _ in questions],
        max_new_tokens=max_new_tokens,
        batch_tokens=batch_tokens,
        progress=progress,
    )
    said = [until_stop(text) for text in texts]
    return np.array(
        [max(rouge_l(one, text).f1 for one in all_) for all_, text in zip(answers, said, strict=True)]
    )


def until_stop(text: str, stops: Sequence[str] = STOPS) -> str:
    r"""Return a text up to the first of some strings.

    Example:
        >>> until_stop(" Paris\n\nQuestion: and Rome?")
        ' Paris'
    """
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]


def privleak(auc: float, gold: float | None) -> float:
    """Return PrivLeak, the change in privacy leakage against a model that never saw the forget set, in percent.

    With A = 1 - AUC it is 100 (A - A_gold) / A_gold. Near 0 is wanted. Strongly negative (-100 at the least) says that
    the forget set still looks like training data, strongly positive that it looks unlike anything unseen, which gives it
    away as well.

    Args:
        auc: of Min-40 % of the edited model, members of the forget set against unseen text, as ``membership`` gives it:
            1 where every forgotten text looks more like training data.
        gold: the same of the gold model. Open-unlearning takes 0.5 where there is none, which sets the scale by a guess;
            it is refused here.

    Returns:
        Percent, from -100 up; with a gold AUC near 1 it has no upper bound.

    Raises:
        InputError: no gold AUC, one of 1 (nothing to divide by), or a number outside 0 to 1.

    Example:
        >>> privleak(0.5, 0.5), privleak(1.0, 0.5)
        (0.0, -100.0)
    """
    if gold is None:
        raise InputError(
            "PrivLeak is relative to a model that was trained without the forget set; pass the AUC of such a model. "
            "Without one, report the AUC of membership itself, which should be near 0.5."
        )
    for name, value in (("auc", auc), ("gold", gold)):
        if not 0 <= value <= 1:
            raise InputError(f"got {name}={value}; an AUC lies between 0 and 1.")
    if gold == 1:
        raise InputError(
            "the gold model's AUC is 1, so PrivLeak would divide by 0; the two sets differ by themselves."
        )
    return 100 * ((1 - auc) - (1 - gold)) / (1 - gold)
