"""Write edited models: streamed checkpoints, LoRA adapters, GGUF files and adapters, control vectors, modules for torch.export."""

from repe_unlearn.export.checkpoint import checkpoint
from repe_unlearn.export.control_vector import control_vector
from repe_unlearn.export.gguf import gguf
from repe_unlearn.export.gguf_lora import gguf_lora
from repe_unlearn.export.lora import lora
from repe_unlearn.export.torch_module import torch_module
from repe_unlearn.export.torch_program import torch_program

__all__ = ["checkpoint", "control_vector", "gguf", "gguf_lora", "lora", "torch_module", "torch_program"]
