"""Load a LoRA adapter with PEFT and hold it against the patch that it was made from."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from repe_unlearn.errors import InputError, MissingDependencyError, UnsupportedModelError, VerificationError
from repe_unlearn.patch import Patch
from repe_unlearn.placement import input_device

__all__ = ["PeftCheck", "check_with_peft"]

_NAME = "check"


@dataclass(frozen=True, slots=True)
class PeftCheck:
    """What PEFT made of an adapter; both numbers are relative to the largest logit.

    Attributes:
        version: of PEFT.
        difference: largest difference between adapter and patched weights; None when only the keys were checked.
        effect: largest difference that the patch makes; says how much `difference` proves.
    """

    version: str
    difference: float | None
    effect: float | None


def check_with_peft(
    model: nn.Module,
    patch: Patch,
    adapter: Path,
    *,
    dtype: torch.dtype = torch.float32,
    inputs: Mapping[str, Tensor] | None = None,
) -> PeftCheck:
    """Assert that PEFT uses every tensor of an adapter and then computes what the patched weights compute.

    The model is left as it was, bit for bit, also on failure. Without weights (meta device) only the use of every
    tensor is checked.

    Args:
        model: that the patch was made for, not patched now.
        patch: the edits that the adapter holds.
        adapter: folder with adapter_config.json and adapter_model.safetensors.
        dtype: of the adapter.
        inputs: keyword arguments of one forward pass; default two rows of token ids.

    Raises:
        MissingDependencyError: PEFT is not installed.
        UnsupportedModelError: PEFT cannot load the adapter into this model, or leaves parts of it out.
        VerificationError: the outputs differ by more than 1e-5, or 16 roundings of the coarsest dtype in use.

    Example:
        `check_with_peft(model, patch, Path("adapter")).difference`
    """
    try:
        import peft
    except ImportError as error:
        raise MissingDependencyError("checking an adapter needs PEFT: pip install 'peft>=0.15'") from error

    has_weights = not any(p.is_meta for p in model.parameters())
    if not has_weights:
        with _loaded(model, adapter):
            return PeftCheck(peft.__version__, None, None)
    given = _token_ids(model) if inputs is None else inputs
    original = _outputs(model, given)
    patch.apply_(model)
    try:
        baked = _outputs(model, given)
    finally:
        patch.revert_(model)
    with _loaded(model, adapter):
        try:
            adapted = _outputs(model, given)
        except (RuntimeError, TypeError, ValueError) as error:
            raise UnsupportedModelError(
                f"{type(model).__name__} with the adapter in PEFT {peft.__version__} does not run: {error}. Use "
                "export.checkpoint, or pass verify=False if no PEFT will read the adapter."
            ) from error

    scale = float(baked.abs().max()) or 1.0
    difference = float((adapted - baked).abs().max()) / scale
    effect = float((original - baked).abs().max()) / scale
    dtypes = {dtype, *(p.dtype for p in model.parameters() if p.is_floating_point())}
    bound = max(1e-5, 16 * max(torch.finfo(used).eps for used in dtypes))
    if not difference <= bound:
        raise VerificationError(
            f"with the adapter in PEFT {peft.__version__} the largest logit differs by {difference:.2g} from the "
            f"patched model; needed at most {bound:.2g}. Use export.checkpoint, which carries the patch exactly."
        )
    return PeftCheck(peft.__version__, difference, effect)


@contextmanager
def _loaded(model: nn.Module, adapter: Path) -> Iterator[None]:
    """Run a block with the adapter inside the model."""
    import peft

    with _restored(model), warnings.catch_warnings():
        # PEFT warns of tied weights, of Conv1D and of values that a meta tensor cannot take: all known here.
        warnings.simplefilter("ignore")
        try:
            config = peft.PeftConfig.from_pretrained(str(adapter))
            tuned = peft.PeftModel(model, config, adapter_name=_NAME)
            device = str(next(model.parameters()).device)
            result = tuned.load_adapter(
                str(adapter), _NAME, torch_device=device if device != "meta" else "cpu"
            )
        except (ValueError, KeyError, TypeError, RuntimeError, NotImplementedError) as error:
            raise UnsupportedModelError(
                f"PEFT {peft.__version__} cannot load the adapter into {type(model).__name__}: {error}. Use "
                "export.checkpoint, or pass verify=False if no PEFT will read it."
            ) from error
        if unused := sorted(result.unexpected_keys):
            raise UnsupportedModelError(
                f"PEFT {peft.__version__} leaves out {len(unused)} tensors of the adapter, first {unused[0]}: in "
                f"{type(model).__name__} it takes their modules for routed experts. Bake the attention sites only, use "
                "export.checkpoint, or pass verify=False if no PEFT will read the adapter."
            )
        yield


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Put back all that loading an adapter changes; PEFT's own unload needs a load that went well."""
    modules = [(m, dict(m._modules), dict(m._parameters), m.training, type(m)) for m in model.modules()]
    gradients = [(p, p.requires_grad) for p in model.parameters()]
    attributes = dict(vars(model))
    config = getattr(model, "config", None)
    settings = {} if config is None else dict(vars(config))
    try:
        yield
    finally:
        for module, children, parameters, training, kind in modules:
            module.__class__ = kind
            module._modules.clear()
            module._modules.update(children)
            module._parameters.clear()
            module._parameters.update(parameters)
            module.training = training
        for parameter, wanted in gradients:
            parameter.requires_grad_(wanted)
        for name in set(vars(model)) - set(attributes):
            delattr(model, name)
        if config is not None:
            vars(config).clear()
            vars(config).update(settings)


def _token_ids(model: nn.Module) -> dict[str, Tensor]:
    named: Any = model
    if getattr(model, "main_input_name", "") != "input_ids":
        raise InputError(
            f"{type(model).__name__} reads {getattr(model, 'main_input_name', 'no token ids')}; pass inputs=, the "
            "keyword arguments of one forward pass, or verify=False."
        )
    vocabulary = named.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (2, 12), generator=generator).to(input_device(model))
    decoder = {"decoder_input_ids": ids.flip(1)} if getattr(named.config, "is_encoder_decoder", False) else {}
    return {"input_ids": ids, **decoder}


def _outputs(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    with _restored(model), torch.no_grad():
        return model.eval()(**inputs)[0].double().cpu()
