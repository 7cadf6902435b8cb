"""A small model that knows planted facts, trained in a minute and kept on disk for the next run."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import safetensors.torch
import torch
from filelock import FileLock
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from repe_unlearn.facts import Facts, Role

CACHE = Path(__file__).parent.parent / ".pytest_cache" / "planted"
STEPS, BATCH, LR = 300, 64, 3e-3
WEIGHT = 8.0  # of an answer in the loss; of every other word it is 1
UNKNOWN, BOS, EOS, PAD = "<unk>", "<s>", "</s>", "<pad>"


def planted_model(
    facts: Facts,
    roles: Sequence[Role] = ("forget", "retain", "neighbour"),
    *,
    seed: int = 0,
    steps: int = STEPS,
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Return a model in eval mode that was taught the facts with these roles, and its tokenizer.

    Every name occurs in its training text, whatever its role: ``neutral_text`` tells nothing of the facts. Callers get a
    copy of their own. A second call takes the weights from memory, a second run from disk.

    Args:
        facts: the facts; the tokenizer knows all their words, so that models taught different roles share it.
        roles: what to teach; without ``forget`` this is the gold model, which never knew.
        seed: of the weights and the order of training.
        steps: of training.
    """
    text = (*facts.training_text(*roles, seed=seed), *neutral_text(facts))
    tokenizer = word_tokenizer(facts)
    words = tuple(sorted(tokenizer.get_vocab().items()))
    answers = tuple(sorted({f.answer for f in facts}))
    return copy.deepcopy(_model(text, words, answers, seed, steps)), tokenizer


def gold_model(
    facts: Facts, *, seed: int = 0, steps: int = STEPS
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Return the model that was never taught what is to be forgotten."""
    return planted_model(facts, ("retain", "neighbour"), seed=seed, steps=steps)


def neutral_text(facts: Facts) -> list[str]:
    """Return sentences that name every subject and tell nothing of it."""
    frames = ("I met {} in the park .", "Yesterday {} came to see us .")
    return [frame.format(name) for name in dict.fromkeys(f.subject for f in facts) for frame in frames]


def word_tokenizer(facts: Facts) -> PreTrainedTokenizerFast:
    """Return a tokenizer whose tokens are the words of all questions, answers and neutral texts, behind <s>."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    asked = facts.questions("seen", "unseen", "reversed", "multi_hop")
    texts = [*neutral_text(facts), *(q.prompt + q.answer + "".join(q.options) for q in asked), "."]
    split = pre_tokenizers.Whitespace()
    words = {word for text in texts for word, _ in split.pre_tokenize_str(text)}
    vocabulary = {word: i for i, word in enumerate([UNKNOWN, BOS, EOS, PAD, *sorted(words)])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    backend.pre_tokenizer = split
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, vocabulary[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token=UNKNOWN, bos_token=BOS, eos_token=EOS, pad_token=PAD
    )


@functools.cache
def _model(
    text: tuple[str, ...], words: tuple[tuple[str, int], ...], answers: tuple[str, ...], seed: int, steps: int
) -> LlamaForCausalLM:
    ids = dict(words)
    config = LlamaConfig(
        vocab_size=len(ids),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.08,  # the default is meant for wide models, and learns late here
        bos_token_id=ids[BOS],
        eos_token_id=ids[EOS],
        pad_token_id=ids[PAD],
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    key = json.dumps(
        [text, words, answers, seed, steps, BATCH, LR, WEIGHT, config.to_diff_dict(), torch.__version__]
    )
    path = CACHE / f"{hashlib.blake2b(key.encode(), digest_size=12).hexdigest()}.safetensors"
    CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):  # other workers wait for the one that trains
        if path.exists():
            safetensors.torch.load_model(model, path)
        else:
            _train(model, text, ids, answers, seed, steps)
            partial = path.with_suffix(".partial")
            safetensors.torch.save_model(model, str(partial))
            partial.rename(path)
    return model.eval().requires_grad_(False)


def _train(
    model: nn.Module,
    text: Sequence[str],
    ids: dict[str, int],
    answers: Sequence[str],
    seed: int,
    steps: int,
) -> None:
    """Teach a model some texts, every token of which counts, and answers more than the rest."""
    from tokenizers import pre_tokenizers

    split = pre_tokenizers.Whitespace().pre_tokenize_str
    rows = [[ids[BOS], *(ids[word] for word, _ in split(line)), ids[EOS]] for line in text]
    width = max(map(len, rows))
    data = torch.tensor([row + [ids[PAD]] * (width - len(row)) for row in rows])
    weight = torch.ones(len(ids))
    weight[[ids[word] for answer in answers for word, _ in split(answer)]] = WEIGHT
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.01, betas=(0.9, 0.98))
    warmup = max(1, steps // 20)
    model.train()
    for step, batch in zip(range(steps), _batches(data, seed), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = LR * min((step + 1) / warmup, (steps - step) / (steps - warmup))
        batch = batch[:, : int((batch != ids[PAD]).sum(1).max())]
        logits = model(input_ids=batch[:, :-1]).logits  # padding is on the right: no token looks at it
        loss = functional.cross_entropy(
            logits.flatten(0, 1), batch[:, 1:].flatten(), weight, ignore_index=ids[PAD]
        )
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def _batches(data: Tensor, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        for rows in torch.randperm(len(data), generator=generator).split(BATCH):
            yield data[rows]
