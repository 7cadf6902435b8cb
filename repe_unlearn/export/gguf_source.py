"""Hold a GGUF file against the model that a patch was made for."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from repe_unlearn.errors import ModelMismatchError, UnsupportedModelError
from repe_unlearn.export.gguf_file import GGUFFile, decode
from repe_unlearn.export.gguf_names import Dialect, Slot
from repe_unlearn.fingerprints import digest, fingerprint, sample_positions
from repe_unlearn.patch import Patch

__all__ = ["check_model", "check_values", "values_of"]


def check_model(dialect: Dialect, patch: Patch, model: nn.Module | None, check: bool) -> None:
    """Refuse a model, or without one a file, that is not what the patch was made for.

    Raises:
        ModelMismatchError: other values.
        UnsupportedModelError: transformers cannot read the file's settings.
    """
    if model is None and not check:
        return
    found = _file_prints(dialect) if model is None else (fingerprint(model),)
    if patch.fingerprint not in found:
        what = "file" if model is None else "model"
        raise ModelMismatchError(
            f"the patch was made for fingerprint {patch.fingerprint}; this {what} has {found[0]}. Use the file that the "
            "model was loaded or converted from. If its values were rounded on the way (F16, Q4_1 ...), pass the "
            "unedited model as model=, or check_fingerprint=False."
        )


def _file_prints(dialect: Dialect) -> tuple[str, ...]:
    """Return the fingerprints that a model may have whose values are those in the file, by its model_type."""
    import transformers

    file = dialect.file
    try:
        config = transformers.AutoConfig.from_pretrained(file.path.parent, gguf_file=file.path.name)
        with torch.device("meta"):
            skeleton = transformers.AutoModelForCausalLM.from_config(config)
    except (ValueError, KeyError, NotImplementedError) as error:
        raise UnsupportedModelError(
            f"transformers cannot read the settings in {file.path} ({error}), so it cannot be held against the patch's "
            "fingerprint; pass the unedited model as model=, or check_fingerprint=False."
        ) from error
    samples = []
    for name, parameter in skeleton.named_parameters():
        values = values_of(file, dialect.slot(name), tuple(parameter.shape)).reshape(-1)
        picked = values[torch.tensor(sample_positions(values.numel()), dtype=torch.int64)]
        samples.append((name, tuple(parameter.shape), picked))
    types = dict.fromkeys((config.model_type, *dialect.row.twins))
    return tuple(digest(model_type, samples) for model_type in types)


def values_of(file: GGUFFile, slot: Slot, shape: tuple[int, ...]) -> Tensor:
    """Return a parameter as the model has it.

    Raises:
        ModelMismatchError: the file lacks it, or it has another size.
    """
    lacking = [name for name in slot.names if name not in file.entries]
    if lacking:
        raise ModelMismatchError(
            f"{file.path} has no {lacking[0]}, so it is of another model, or transformers takes it for one; in that case "
            "pass the unedited model as model=."
        )
    entries = [file.entries[name] for name in slot.names]
    whole = slot.from_file([decode(file.data(entry), entry) for entry in entries])
    if [n for n in whole.shape if n > 1] != [n for n in shape if n > 1]:
        raise ModelMismatchError(
            f"{slot.names[0]} in {file.path} has shape {list(whole.shape)}; needed {list(shape)}. It is of another model."
        )
    return whole.reshape(shape)  # a single row may come as a vector


def check_values(model: nn.Module | None, patch: Patch, parameter: str, held: Tensor) -> None:
    """Hold what the file has against the model: a wrong row order or tensor is off by more than the whole norm.

    Raises:
        ModelMismatchError: it is off by more than half of the norm.
    """
    if model is None or parameter in patch.new_biases:
        return
    wanted = model.get_parameter(parameter).detach().to("cpu", torch.float64)
    off = float((held.double() - wanted).norm())
    size = float(wanted.norm())
    if off > 0.5 * size:
        raise ModelMismatchError(
            f"{parameter} of the file is off by {off / size if size else off:.2g} of its norm from the model's; the file "
            "is of another model."
        )
