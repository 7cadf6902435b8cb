"""What do hooks of rank 1 cost on all layers, in prefill and in greedy decoding? And a baked plan?

Two plans: all norm outputs (two per block) and all block outputs (one per block); the erasers are random, which costs the
same as fitted ones. Baked is the plan of the norm outputs in the weights. With --compile model and hooks are compiled
together after the hooks are applied (on a GPU with CUDA graphs, mode reduce-overhead), against the compiled bare model.

    python tests/benchmarks/hooks.py
    python tests/benchmarks/hooks.py --shape 8b --device cuda --dtype bfloat16 --compile
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from _side_by_side import machine, side_by_side
from _subject import mixed, parser, subject, waited
from torch import Tensor

from repe_unlearn import Architecture, ErasurePlan, Site, apply, bake, fingerprint
from repe_unlearn.eraser import Eraser


def rank_one(model: Any, sites: Iterable[Site]) -> ErasurePlan:
    """Return a plan with an orthogonal eraser of rank 1 at every site, without a constant so that it can be baked."""
    d = model.config.hidden_size
    generator = torch.Generator().manual_seed(0)
    erasers = {}
    for site in sites:
        u = torch.nn.functional.normalize(torch.randn(d, 1, generator=generator, dtype=torch.float64), dim=0)
        erasers[site] = Eraser(u, u.T.contiguous(), torch.zeros(d, dtype=torch.float64))
    return ErasurePlan(erasers, fingerprint(model))


def ids(tokenizer: Any, batch: int, tokens: int, device: str) -> Tensor:
    """Return token ids ``[batch, tokens]`` of real text, without padding."""
    flat = [i for text in mixed(40 * batch).texts for i in tokenizer(text)["input_ids"]]
    return torch.tensor(flat[: batch * tokens], device=device).reshape(batch, tokens)


def greedy(model: Any, prompt: Tensor, new: int) -> Callable[[], object]:
    """Return a greedy generation of exactly ``new`` tokens."""
    return lambda: model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        pad_token_id=0,
    )


def main() -> None:
    """Print the table."""
    options = parser(__doc__)
    options.add_argument("--new", type=int, default=32, help="tokens to decode")
    options.add_argument("--compile", action="store_true", help="also compare compiled models")
    args = options.parse_args()
    model, tokenizer = subject(args)
    arch = Architecture.of(model)
    norms = rank_one(model, arch.sites("attn_in", "mlp_in"))
    plans = {"norm outputs": norms, "block outputs": rank_one(model, arch.sites("resid_post"))}
    prefill = ids(tokenizer, 8, 64, args.device)
    prompts = {batch: ids(tokenizer, batch, 16, args.device) for batch in (1, 8)}
    twin, _ = subject(args)  # edited, while the other stays as it is

    def runs(m: Any) -> dict[str, Callable[[], object]]:
        decode = {
            f"decode {args.new}, batch {b}": greedy(m, prompt, args.new) for b, prompt in prompts.items()
        }
        return {"prefill 8 x 64": lambda: m(input_ids=prefill, use_cache=False), **decode}

    print(machine("transformers"), f"| {args.shape}, {args.device}, {args.dtype}\n")
    print("| run | plan | sites | with (s) | bare (s) | overhead |")
    print("|---|---|---|---|---|---|")

    def lines(
        label: str, sites: int, a: dict[str, Callable[[], object]], b: dict[str, Callable[[], object]]
    ) -> None:
        for name in a:
            with torch.no_grad():
                t = side_by_side(waited(a[name], args.device), waited(b[name], args.device), args.rounds)
            print(
                f"| {name} | {label} | {sites} | {t.a:.4f} | {t.b:.4f} | {100 * (t.ratio - 1):+.1f} % |",
                flush=True,
            )

    lines("none (noise)", 0, runs(twin), runs(model))
    for label, plan in plans.items():
        with apply(twin, plan):
            lines(label, len(plan), runs(twin), runs(model))
    patch = bake(twin, norms).apply_(twin)
    lines("baked", 0, runs(twin), runs(model))
    patch.revert_(twin)
    if args.compile:
        mode = None if args.device == "cpu" else "reduce-overhead"
        for label, plan in plans.items():
            with apply(twin, plan):
                hooked, bare = (torch.compile(m, mode=mode, fullgraph=True) for m in (twin, model))
                pair = [
                    {"prefill 8 x 64, compiled": lambda m=m: m(input_ids=prefill, use_cache=False)}
                    for m in (hooked, bare)
                ]
                lines(label, len(plan), *pair)
            torch.compiler.reset()


if __name__ == "__main__":
    main()
