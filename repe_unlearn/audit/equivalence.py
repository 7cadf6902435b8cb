"""Equivalence: hook, baked weights and the reloaded export are the same function."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from repe_unlearn.errors import FileFormatError
from repe_unlearn.folding import bake
from repe_unlearn.hooks import apply
from repe_unlearn.patch import Patch
from repe_unlearn.plan import ErasurePlan

# Runs in a fresh process that must not have this package loaded: what a user of the export has.
_RELOAD = """
import json, sys
import torch, safetensors.torch
from transformers import AutoModelForCausalLM, AutoTokenizer
job = json.load(open(sys.argv[1]))
torch.set_num_threads(job["threads"])
tokenizer = AutoTokenizer.from_pretrained(job["folder"])
model = AutoModelForCausalLM.from_pretrained(job["folder"]).eval()
out = {}
with torch.inference_mode():
    for i, ids in enumerate(job["prompts"]):
        out[f"logits.{i}"] = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].contiguous()
    ids = torch.tensor([job["prompts"][0]])
    out["tokens"] = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=job["new"], do_sample=False)[0, ids.shape[1]:]
assert "repe_unlearn" not in sys.modules
safetensors.torch.save_file(out, job["out"])
"""


@dataclass(frozen=True, slots=True)
class Outputs:
    """What a model says: logits of each prompt and the greedy continuation of the first."""

    logits: tuple[Tensor, ...]
    tokens: tuple[int, ...]

    def far_from(self, other: Outputs) -> float:
        """Return the largest absolute difference of any logit."""
        return max(
            float((a.double() - b.double()).abs().max())
            for a, b in zip(self.logits, other.logits, strict=True)
        )

    def same_bits(self, other: Outputs) -> bool:
        """True when every logit is equal bit for bit."""
        return all(torch.equal(a, b) for a, b in zip(self.logits, other.logits, strict=True))


def outputs(model: nn.Module, prompts: Sequence[Sequence[int]], new_tokens: int) -> Outputs:
    """Return the logits of every prompt and ``new_tokens`` greedy tokens after the first, with the key-value cache."""
    device = next(model.parameters()).device
    generator: Any = model
    with torch.inference_mode():
        logits = tuple(
            generator(input_ids=torch.tensor([list(ids)], device=device), use_cache=False).logits[0].cpu()
            for ids in prompts
        )
        ids = torch.tensor([list(prompts[0])], device=device)
        tokens = generator.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False
        )
    return Outputs(logits, tuple(tokens[0, ids.shape[1] :].tolist()))


def hooked_and_baked(
    model: nn.Module,
    plan: ErasurePlan,
    prompts: Sequence[Sequence[int]],
    *,
    patch: Patch | None = None,
    new_tokens: int = 64,
) -> tuple[Outputs, Outputs, Outputs]:
    """Return the outputs of the untouched, the hooked and the baked model; the model is restored bit for bit.

    Raises:
        NotBakeableError: the plan has no exact weight edit.
    """
    patch = bake(model, plan) if patch is None else patch
    base = outputs(model, prompts, new_tokens)
    with apply(model, plan):
        hooked = outputs(model, prompts, new_tokens)
    patch.apply_(model)
    try:
        baked = outputs(model, prompts, new_tokens)
    finally:
        patch.revert_(model)
    return base, hooked, baked


def reloaded(folder: str | Path, prompts: Sequence[Sequence[int]], *, new_tokens: int = 64) -> Outputs:
    """Return the outputs of an exported folder, loaded by plain transformers in a fresh process.

    Raises:
        FileFormatError: the folder does not load there; the message holds what that process said.
    """
    with tempfile.TemporaryDirectory() as scratch:
        job, out = Path(scratch, "job.json"), Path(scratch, "out.safetensors")
        job.write_text(
            json.dumps(
                {
                    "folder": str(Path(folder).resolve()),
                    "prompts": [list(map(int, ids)) for ids in prompts],
                    "new": new_tokens,
                    "out": str(out),
                    "threads": torch.get_num_threads(),
                }
            )
        )
        # -I: no user site, no current folder on the path, so nothing but installed packages can be imported.
        run = subprocess.run(
            [sys.executable, "-I", "-c", _RELOAD, str(job)], capture_output=True, text=True, check=False
        )
        if run.returncode != 0:
            raise FileFormatError(f"plain transformers could not load {folder}:\n{run.stderr[-2000:]}")
        found = safetensors.torch.load_file(out)
    return Outputs(tuple(found[f"logits.{i}"] for i in range(len(prompts))), tuple(found["tokens"].tolist()))
