"""Write edited models: a patched safetensors checkpoint, streamed tensor by tensor."""

from repe_unlearn.export.checkpoint import checkpoint

__all__ = ["checkpoint"]
