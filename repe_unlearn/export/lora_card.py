"""The README.md of a LoRA adapter: what it does, how to load it, who cannot."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["card"]


def card(base: str, config: Mapping[str, Any], manifest: Mapping[str, Any]) -> str:
    """Return the model card in Markdown, with the front matter that the hub reads.

    Args:
        base: name or folder of the unedited model.
        config: the adapter's adapter_config.json.
        manifest: its repe_manifest.json.
    """
    on_hub = bool(base) and not Path(base).exists()
    front = ["library_name: peft", "tags: [lora, concept-erasure, repe-unlearn]"]
    if on_hub:
        front.insert(0, f"base_model: {base}")
    rank, where = manifest["rank"], base or "BASE"
    classes = sorted(set(manifest["exactness"].values())) or ["not stated"]
    limits = [f"- {line}" for line in _limits(config)]
    return "\n".join(
        [
            "---",
            *front,
            "---",
            "",
            "# A concept removed by weight edits, as a LoRA adapter",
            "",
            f"For `{where}` with fingerprint `{manifest['fingerprint']}`: {len(manifest['edited'])} weights edited, "
            f"rank {rank}, {manifest['dtype']}, exactness {', '.join(classes)}. Made by repe_unlearn "
            f"{manifest['version']}; `repe_manifest.json` lists every edit with its rule and rounding.",
            "",
            _checked(manifest["verified"]),
            "",
            "The edit holds only while the adapter is active: the unedited weights are all there in the base model.",
            "",
            "## Load it",
            "",
            "```python",
            "from peft import PeftModel",
            "from transformers import AutoModel"
            + ("ForCausalLM" if config["task_type"] == "CAUSAL_LM" else ""),
            "",
            f"model = AutoModel{'ForCausalLM' if config['task_type'] == 'CAUSAL_LM' else ''}.from_pretrained({where!r})",
            'model = PeftModel.from_pretrained(model, "ADAPTER")',
            "```",
            "",
            "```bash",
            f"vllm serve {where} --enable-lora --max-lora-rank {_vllm_rank(rank)} --lora-modules edited=ADAPTER",
            f"python convert_lora_to_gguf.py --base {where} ADAPTER --outfile adapter.gguf  # llama.cpp",
            "llama-cli -m BASE.gguf --lora adapter.gguf",
            "```",
            *(["", "## Limits", "", *limits] if limits else []),
            "",
        ]
    )


def _checked(verified: Mapping[str, Any] | None) -> str:
    if verified is None:
        return "It was not loaded with PEFT when it was written."
    text = f"PEFT {verified['version']} uses every tensor of it"
    if verified["difference"] is None:
        return f"{text}; outputs were not compared."
    return (
        f"{text}, and its largest logit differs from that of the patched weights by "
        f"{verified['difference']:.1e} (the edit moves it by {verified['effect']:.1e}), relative to the largest."
    )


def _vllm_rank(rank: int) -> int:
    """Return the smallest value of --max-lora-rank that vLLM accepts for a rank."""
    return next((size for size in (8, 16, 32, 64, 128, 256, 320, 512) if size >= rank), rank)


def _limits(config: Mapping[str, Any]) -> list[str]:
    """Say which of the three programs, by their documentation, cannot read what this adapter edits."""
    lines = []
    if config["fan_in_fan_out"]:
        lines.append("Conv1D weights (GPT-2): PEFT only; vLLM and llama.cpp have no LoRA for them.")
    if any(
        "embed" in target.rpartition(".")[2] or target.endswith(("wte", "wpe"))
        for target in config["target_modules"]
    ):
        lines.append("Embeddings: PEFT and llama.cpp; vLLM has no LoRA for them.")
    return lines
