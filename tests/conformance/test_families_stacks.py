"""Models of two stacks, models with more than text, and models without a head that knows about them."""

from __future__ import annotations

import pytest
import torch
from rowkit import gap
from tiny import LAYERS, random_plan, tiny, tiny_inputs
from torch import Tensor, nn

from repe_unlearn.architectures import Architecture
from repe_unlearn.errors import InputError, NotBakeableError
from repe_unlearn.folding import bake
from repe_unlearn.hooks import apply
from repe_unlearn.sites import Site


@torch.no_grad()
def logits(model: nn.Module) -> dict[str, Tensor]:
    return {"logits": model(**tiny_inputs("t5")).logits}


def test_the_encoder_is_the_default_stack() -> None:
    model = tiny("t5")
    assert Architecture.of(model) == Architecture.of(model, stack="encoder")
    encoder, decoder = Architecture.all_of(model)
    assert Architecture.of(model, stack="decoder") == decoder
    assert encoder.sites("attn_in")[0] == Site("encoder.block.0.layer.0.layer_norm")
    assert decoder.sites("cross_out")[1] == Site("decoder.block.1.layer.1.EncDecAttention.o")
    assert encoder.locate(decoder.sites("attn_in")[0]) is None
    assert (encoder.entry, decoder.entry) == ("encoder", "")
    with pytest.raises(InputError, match="one stack"):
        Architecture.of(tiny("llama"), stack="decoder")


def test_one_plan_over_both_stacks_is_baked() -> None:
    model = tiny("t5")
    encoder, decoder = Architecture.all_of(model)
    sites = (*encoder.sites("attn_in", "mlp_out"), *decoder.sites("cross_in", "mlp_in"))
    plan = random_plan(model, sites, affine=False)
    with apply(model, plan):
        hooked = logits(model)
    base = logits(model)
    patch = bake(model, plan).apply_(model)
    assert gap(hooked, logits(model)) <= 1e-10
    assert gap(base, hooked) > 1e-3
    assert set(patch.exactness) == set(map(str, sites))


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_the_ends_of_t5_are_hook_only(stack: str) -> None:
    model = tiny("t5")
    plan = random_plan(model, Architecture.of(model, stack=stack).sites("final"), affine=False)  # type: ignore[arg-type]
    with pytest.raises(NotBakeableError, match="cross-attention" if stack == "encoder" else "untied"):
        bake(model, plan)
    base = logits(model)
    with apply(model, plan):
        assert gap(base, logits(model)) > 1e-3


def test_an_encoder_alone_has_the_sites_of_the_encoder() -> None:
    alone = tiny("t5", head="T5EncoderModel")
    (only,) = Architecture.all_of(alone)
    assert only.sites(*only.kinds) == Architecture.of(tiny("t5")).sites(*only.kinds)
    assert not only.root


def test_the_text_model_inside_gemma3_has_the_sites_of_gemma3_text() -> None:
    arch, text = Architecture.of(tiny("gemma3")), Architecture.of(tiny("gemma3_text"))
    assert arch.kinds == text.kinds
    assert [str(s).replace("language_model.", "") for s in arch.sites(*arch.kinds)] == [
        str(s) for s in text.sites(*text.kinds)
    ]
    assert arch.entry == "model.language_model"
    headless = Architecture.of(tiny("gemma3", head="AutoModel"))
    assert headless.sites("attn_in")[0] == Site("language_model.layers.0.input_layernorm")
    assert headless.entry == "language_model"


@pytest.mark.parametrize("model_type", ["bert", "roberta", "distilbert"])
@pytest.mark.parametrize("head", ["AutoModelForSequenceClassification", "AutoModelForTokenClassification"])
def test_encoders_with_another_head(model_type: str, head: str) -> None:
    model = tiny(model_type, head=head)
    arch = Architecture.of(model)
    assert arch.n_layers == LAYERS
    plan = random_plan(model, arch.sites("attn_in", "mlp_in", "attn_out", "mlp_out"))

    @torch.no_grad()
    def run() -> dict[str, Tensor]:
        return {"logits": model(**tiny_inputs(model_type)).logits}

    with apply(model, plan):
        hooked = run()
    base = run()
    bake(model, plan).apply_(model)
    assert gap(hooked, run()) <= 1e-9
    assert gap(base, hooked) > 1e-3
