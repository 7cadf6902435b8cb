"""What does a capture cost next to the bare forward that stops at the same place, and next to other libraries?

All take the stream before every block. The peers take padded batches of prompts in the given order, as their users do
(and, in a second line, exactly our batches), and keep the activations as numpy arrays; a capture reduces them to moments.
nnsight and TransformerLens are compared where they are installed: run this in a virtual environment that has them.

    python tests/benchmarks/capture.py
    python tests/benchmarks/capture.py --shape 8b --device cuda --dtype bfloat16 --batch-tokens 16384
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _side_by_side import machine, side_by_side
from _subject import mixed, parser, subject, waited
from torch import Tensor, nn

from repe_unlearn import Architecture, Contrast, Site, capture
from repe_unlearn.activations import StopForward, body, prepare

WORKER = """
import json, resource, sys
from _subject import mixed, parser, subject
from repe_unlearn import Architecture, capture

args = parser("").parse_args(sys.argv[3:])
model, tokenizer = subject(args)
sites = Architecture.of(model).sites("resid_pre", layers=range(int(sys.argv[2])))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
run = lambda n: capture(model, tokenizer, mixed(n), sites, select="mean", batch_tokens=args.batch_tokens, progress=False)
run(100)
before = peak()
run(int(sys.argv[1]))
print(json.dumps(peak() - before))
"""

Batches = Sequence[tuple[Tensor, Tensor]]  # ids and mask, both [b, t]


def bare(
    model: nn.Module, tokenizer: Any, contrast: Contrast, last: Site, batch_tokens: int
) -> Callable[[], None]:
    """Return the forward of our batches that stops where the last site is, with one plain hook and nothing else."""
    work = list(prepare(model, tokenizer, contrast, "mean", batch_tokens))
    forward = body(model)

    def stop(*_: object) -> None:
        raise StopForward

    def run() -> None:
        handle = last.module(model).register_forward_pre_hook(stop)
        try:
            with torch.no_grad():
                for batch in work:
                    with suppress(StopForward):
                        forward(batch)
        finally:
            handle.remove()

    return run


def in_order(tokenizer: Any, contrast: Contrast, size: int, device: str) -> Batches:
    """Return padded batches of prompts in the given order."""
    texts = list(contrast.texts)
    found = []
    for start in range(0, len(texts), size):
        out = tokenizer(texts[start : start + size], return_tensors="pt", padding=True, padding_side="right")
        found.append((out["input_ids"].to(device), out["attention_mask"].to(device)))
    return found


def hidden_states(model: nn.Module, batches: Batches, layers: int) -> list[list[Any]]:
    """Keep what plain transformers returns."""
    kept = []
    with torch.no_grad():
        for ids, mask in batches:
            out = model(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
            kept.append([x.float().cpu().numpy() for x in out.hidden_states[:layers]])
    return kept


def nnsight_run(wrapped: Any, batches: Batches, layers: int) -> list[list[Any]]:
    """Keep what nnsight saves."""
    kept = []
    with torch.no_grad():
        for ids, mask in batches:
            with wrapped.trace({"input_ids": ids, "attention_mask": mask}) as tracer:
                saved = list().save()  # type: ignore[attr-defined]  # noqa: C408  # nnsight's own idiom
                for i in range(layers):
                    saved.append(wrapped.model.layers[i].input)
                tracer.stop()
            kept.append([x.float().cpu().numpy() for x in saved])
    return kept


def nnsight_model(model: nn.Module, tokenizer: Any) -> Any:
    """Wrap the same model."""
    from nnsight import LanguageModel  # type: ignore[import-not-found]

    return LanguageModel(model, tokenizer=tokenizer)


def lens_model(model: Any, tokenizer: Any) -> Any:
    """Wrap a copy of the model: the bridge puts modules of its own into what it wraps."""
    from transformer_lens.model_bridge import TransformerBridge  # type: ignore[import-not-found]

    return TransformerBridge.boot_transformers(
        model.name_or_path,
        hf_model=copy.deepcopy(model),
        tokenizer=tokenizer,
        device=str(model.device),
        dtype=model.dtype,
    ).eval()


def lens_run(lens: Any, batches: Batches, layers: int) -> list[list[Any]]:
    """Keep what TransformerLens caches; padding on the right changes nothing for a causal model, so no mask."""
    names = {f"blocks.{i}.hook_resid_pre" for i in range(layers)}
    kept = []
    with torch.no_grad():
        for ids, _ in batches:
            _, cache = lens.run_with_cache(ids, names_filter=lambda n: n in names, stop_at_layer=layers)
            kept.append([cache[f"blocks.{i}.hook_resid_pre"].float().cpu().numpy() for i in range(layers)])
    return kept


def peers(model: nn.Module, tokenizer: Any) -> dict[str, Callable[[Batches, int], list[list[Any]]] | None]:
    """Return the peers by name; None for one that is not installed."""
    found: dict[str, Callable[[Batches, int], list[list[Any]]] | None] = {
        "output_hidden_states": partial(hidden_states, model)
    }
    for name, module, make, run in (
        ("nnsight", "nnsight", nnsight_model, nnsight_run),
        ("TransformerLens", "transformer_lens", lens_model, lens_run),
    ):
        installed = importlib.util.find_spec(module) is not None
        found[name] = partial(run, make(model, tokenizer)) if installed else None
    return found


def speed(args: argparse.Namespace) -> None:
    """Print the table of times."""
    model, tokenizer = subject(args)
    contrast = mixed(args.prompts)
    sites = Architecture.of(model).sites("resid_pre")
    options: dict[str, Any] = {"select": "mean", "batch_tokens": args.batch_tokens, "progress": False}
    ours = waited(lambda: capture(model, tokenizer, contrast, sites, **options), args.device)
    work = prepare(model, tokenizer, contrast, "mean", args.batch_tokens)
    tokens = sum(int(batch.arguments()["attention_mask"].sum()) for batch in work)
    print(f"\n{len(contrast)} prompts, {tokens} tokens, {len(work)} batches, {len(sites)} sites\n")
    print("| against | its batches | theirs (s) | capture (s) | theirs / capture |")
    print("|---|---|---|---|---|")
    stopped = waited(bare(model, tokenizer, contrast, sites[-1], args.batch_tokens), args.device)

    def line(name: str, batches: str, theirs: Callable[[], None]) -> None:
        t = side_by_side(theirs, ours, args.rounds)
        print(f"| {name} | {batches} | {t.a:.3f} | {t.b:.3f} | {t.ratio:.2f} |", flush=True)

    line("bare forward, stopped", "ours", stopped)
    same = [(a["input_ids"], a["attention_mask"]) for a in (b.to(model.device).arguments() for b in work)]  # type: ignore[arg-type]
    given = in_order(tokenizer, contrast, args.peer_batch, args.device)
    reference = hidden_states(model, given[:1], len(sites))[0]
    for name, run in peers(model, tokenizer).items():
        if run is None:
            print(f"| {name} | – | not installed | – | – |")
            continue
        mask = given[0][1].bool().cpu().numpy()
        off = max(
            float(abs(a - b)[mask].max())
            for a, b in zip(run(given[:1], len(sites))[0], reference, strict=True)
        )
        note = "" if off < 1e-2 else f" (differs by {off:.1e})"
        line(
            name + note,
            f"{args.peer_batch} in order",
            waited(lambda r=run: r(given, len(sites)), args.device),
        )
        line(name + note, "ours", waited(lambda r=run: r(same, len(sites)), args.device))


def memory(args: argparse.Namespace) -> None:
    """Print by how much the resident memory of a process grows with the number of prompts."""
    shared = ["--shape", args.shape, "--device", args.device, "--dtype", args.dtype]
    shared += ["--batch-tokens", str(args.batch_tokens)]
    print(f"\npeak resident memory above that of a capture of 100 prompts, {args.memory_layers} sites\n")
    print("| prompts | MB |")
    print("|---|---|")
    for prompts in args.memory:
        command = [sys.executable, "-c", WORKER, str(prompts), str(args.memory_layers), *shared]
        out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent)
        print(f"| {prompts} | {json.loads(out.stdout.splitlines()[-1]):.0f} |", flush=True)


def main() -> None:
    """Print the tables."""
    options = parser(__doc__)
    options.add_argument("--peer-batch", type=int, default=16, help="prompts per batch of the peers")
    options.add_argument("--memory", type=int, nargs="*", default=[1000, 10000], help="numbers of prompts")
    options.add_argument("--memory-layers", type=int, default=2, help="sites for the memory table")
    args = options.parse_args()
    print(machine("transformers"), f"| {args.shape}, {args.device}, {args.dtype}")
    speed(args)
    if args.memory:
        memory(args)


if __name__ == "__main__":
    main()
