"""Relearning: a little training on something else, and see whether what was to be forgotten comes back."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from repe_unlearn.answers import BATCH_TOKENS, Answers, answers
from repe_unlearn.audit.edits import replaced
from repe_unlearn.audit.neutral import NEUTRAL
from repe_unlearn.audit.scores import Scores
from repe_unlearn.audit.tries import asked, curves, strongest, values
from repe_unlearn.encoding import longest_text, pad_id_of
from repe_unlearn.errors import InputError, NonFiniteError, NotEnoughDataError
from repe_unlearn.facts import Facts, Form, Sample
from repe_unlearn.train.loop import descend, positive
from repe_unlearn.train.losses import nll
from repe_unlearn.train.samples import shuffled, tokenise
from repe_unlearn.train.trainee import Trainee, choose, trainee

Arm = Literal["facts", "decoy", "retain_only", "benign"]
ARMS: tuple[Arm, ...] = get_args(Arm)
STEPS = (5, 10, 20, 40)
SMALL = 20_000_000  # parameters
RATES_SMALL, RATES = (3e-4, 1e-3, 3e-3), (2e-5, 6e-5, 2e-4)


def relearning(
    model: nn.Module,
    tokenizer: Any,
    facts: Facts,
    *,
    arm: Arm = "retain_only",
    steps: Sequence[int] = STEPS,
    rates: Sequence[float] | None = None,
    batch: int = 16,
    lora_rank: int | None = None,
    texts: Sequence[str] = NEUTRAL,
    forms: Sequence[Form] = ("seen", "unseen"),
    seed: int = 0,
    batch_tokens: int = BATCH_TOKENS,
    progress: bool = True,
) -> Scores:
    """Return the scores of facts that were never trained on after the training that brought back most.

    Asked is what is to be forgotten and was not trained on, and decoys. What is trained on:

    - ``facts``: one half of the subjects to be forgotten (``split_relearn``), and as many retained facts; only the other
      half is asked. All other arms ask everything that is to be forgotten;
    - ``retain_only``: retained facts. Nothing is said of what is to be forgotten, so what comes back was there;
    - ``decoy``: half of the decoys, with made-up answers, in the same wordings; the other half is asked;
    - ``benign``: sentences of texts that have nothing to do with it.

    One run per learning rate, asked at every number of steps. Of all these, one is taken for all facts by a rule that
    treats decoys like facts to be forgotten, see ``strongest``; so a model that never knew gains nothing by the number of
    tries. AdamW, gradients clipped to norm 1, completions only count. Copies of the weights are trained: the model is
    restored bit for bit. A rate at which training diverges ends there.

    Args:
        model: a causal language model with its weights in memory.
        tokenizer: its fast tokenizer.
        facts: with the roles forget (two subjects or more), retain, and best also decoy.
        arm: what to train on.
        steps: of the optimiser, after which to ask.
        rates: learning rates; default 3e-4, 1e-3, 3e-3 below 20 million parameters, else 2e-5, 6e-5, 2e-4. With
            ``lora_rank`` ten times as much.
        batch: samples per step.
        lora_rank: train a change of this rank of every linear map: for large models; memory for two dense copies of
            them all the same while a step runs.
        texts: of the arm ``benign``.
        forms: wordings to ask in; trained on are the seen ones.
        seed: of the halves, the order of training and the made-up answers.
        batch_tokens: positions per batch when asking.
        progress: show a progress bar.

    Returns:
        Values for the tested facts only; curves over the steps at the rate taken.

    Raises:
        InputError: an unknown arm, steps or rates that are none.
        NotEnoughDataError: no facts of a role that the arm needs, or one subject to be forgotten.
        NonFiniteError: training diverges at every rate before the first question.
        UnsupportedModelError: weights that are quantised or not in memory, or no causal language model.

    Example:
        ``relearning(model, tokenizer, facts, arm="retain_only", steps=(10, 20), rates=(2e-5,))``
    """
    if arm not in ARMS:
        raise InputError(f"got arm={arm!r}; needed one of {', '.join(ARMS)}.")
    if not steps or (rates is not None and not rates):
        raise InputError(f"got steps={steps!r} and rates={rates!r}; needed at least one of each.")
    positive(batch=batch, **{f"steps[{i}]": step for i, step in enumerate(steps)})
    if rates is None:
        rates = RATES_SMALL if sum(p.numel() for p in model.parameters()) < SMALL else RATES
        rates = [10 * rate for rate in rates] if lora_rank else rates
    samples, taught = lesson(facts, arm, texts=texts, seed=seed)
    questions = asked(facts, forms, besides=taught)
    tokens = tokenise(samples, tokenizer, max_length=longest_text(model))
    pad_id = pad_id_of(tokenizer)
    names = choose(model, "all", matrices=lora_rank is not None)
    tries: dict[tuple[float, int], Answers] = {}
    diverged = []

    def ask(trained: Trainee, rate: float, step: int) -> None:
        if step in steps:
            with replaced(model, trained.values()):
                tries[rate, step] = answers(
                    model, tokenizer, facts, questions=questions, batch_tokens=batch_tokens, progress=False
                )

    for rate in rates:
        order = torch.Generator().manual_seed(seed)
        with trainee(model, names, rank=lora_rank, seed=seed) as trained:
            drawn = shuffled(tokens, batch, pad_id, order)

            def terms(trained: Trainee = trained, drawn: Iterator = drawn) -> Iterator[tuple[float, Tensor]]:
                yield 1.0, nll(*trained.logp(next(drawn).to(trained.device)))

            try:
                descend(
                    trained.leaves,
                    terms,
                    steps=max(steps),
                    lr=rate,
                    accumulate=1,
                    weight_decay=0.0,
                    clip=1.0,
                    progress=progress,
                    label=f"relearn {arm}, rate {rate:g}",
                    after=lambda step, t=trained, r=rate: ask(t, r, step),
                )
            except NonFiniteError:
                diverged.append(rate)
    if not tries:
        raise NonFiniteError(
            f"relearning diverged at all rates ({', '.join(f'{r:g}' for r in rates)}) before step {min(steps)}; give "
            "lower rates."
        )
    rate, step = strongest(tries)
    best = tries[rate, step]
    settings = {
        "arm": arm,
        "rate": f"{rate:g}",
        "steps": str(step),
        "rates tried": ", ".join(f"{r:g}" for r in rates),
        "steps tried": ", ".join(map(str, sorted(set(steps)))),
        "samples": f"{len(samples)}, {batch} per step",
        "trained": "all parameters" if lora_rank is None else f"rank {lora_rank} of every linear map",
        "choice": "highest mean over facts to be forgotten and decoys together",
        "seed": str(seed),
    }
    if diverged:
        settings["diverged at"] = ", ".join(f"{r:g}" for r in diverged)
    at_rate = {s: tries[rate, s] for s in sorted(set(steps)) if (rate, s) in tries}
    shown = curves(
        "Relearning",
        at_rate,
        x_label="training steps",
        panel=arm.replace("_", " "),
        caption="What comes back after a few steps of training, none of which names what is asked.",
    )
    return Scores(f"relearn.{arm}", "T2", values(best), "share", shown, settings)


def lesson(
    facts: Facts, arm: Arm, *, texts: Sequence[str] = NEUTRAL, seed: int = 0
) -> tuple[list[Sample], frozenset[int]]:
    """Return what an arm trains on, and the indices of the facts that may not be asked afterwards.

    These are the facts to be forgotten about the taught half of the subjects (arm ``facts``) and the taught decoys (arm
    ``decoy``); the other arms teach nothing that is asked.

    Raises:
        NotEnoughDataError: no facts of a role that the arm needs.
    """
    rng = random.Random(seed)
    if arm == "benign":
        # Sentences, because passages are longer than the questions, and than small models take.
        found = [s for text in texts for s in re.split(r"(?<=[.!?])\s+", text.strip()) if s]
        if not found:
            raise NotEnoughDataError("got no texts to train on; the arm 'benign' needs some.")
        return [Sample("", sentence) for sentence in found], frozenset()
    if arm == "decoy":
        subjects = sorted({f.subject for f in facts if f.role == "decoy"})
        chosen = set(rng.sample(subjects, len(subjects) // 2))
        made_up = {
            i: rng.choice(sorted((f.answer, *f.distractors)))
            for i, f in enumerate(facts)
            if f.role == "decoy" and f.subject in chosen
        }
        if not made_up:
            raise NotEnoughDataError(
                f"{facts.name!r} has {len(subjects)} decoy subjects; the arm 'decoy' needs two at least."
            )
        questions = (q for q in facts.questions("seen", roles=["decoy"]) if q.fact in made_up)
        return [Sample(q.prompt, f" {made_up[q.fact]}") for q in questions], frozenset(made_up)
    retained = [i for i, f in enumerate(facts) if f.role == "retain"]
    if not retained:
        raise NotEnoughDataError(
            f"{facts.name!r} has no facts with the role retain; the arm {arm!r} needs some."
        )
    taught, learned = set[int](), set(retained)
    if arm == "facts":
        half = {f.subject for f in facts.split_relearn(seed)[0]}
        taught = {i for i, f in enumerate(facts) if f.role == "forget" and f.subject in half}
        learned = {*taught, *rng.sample(retained, min(len(taught), len(retained)))}
    questions = (q for q in facts.questions("seen") if q.fact in learned)
    return [Sample(q.prompt, q.answer) for q in questions], frozenset(taught)
