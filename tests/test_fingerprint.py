from __future__ import annotations

import copy

import pytest
import torch
from folders import tiny_llama
from torch import nn

from repe_unlearn.errors import UnsupportedModelError
from repe_unlearn.fingerprints import fingerprint, sample_positions


def test_print_is_16_hex_characters_and_repeatable() -> None:
    model = tiny_llama()
    print_ = fingerprint(model)
    assert len(print_) == 16
    assert set(print_) <= set("0123456789abcdef")
    assert print_ == fingerprint(copy.deepcopy(model))
    assert print_ != fingerprint(tiny_llama(seed=1))


def test_dtype_does_not_matter() -> None:
    model = tiny_llama()
    print_ = fingerprint(model)
    assert print_ == fingerprint(copy.deepcopy(model).bfloat16())
    assert print_ == fingerprint(copy.deepcopy(model).double())
    # a bfloat16 checkpoint opened in either width
    assert print_ == fingerprint(copy.deepcopy(model).bfloat16().float())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_device_does_not_matter() -> None:
    model = tiny_llama()
    assert fingerprint(model) == fingerprint(copy.deepcopy(model).cuda())


@pytest.mark.parametrize("seed", range(5))
def test_every_matrix_edit_changes_it(seed: int) -> None:
    model = tiny_llama(seed=seed)
    before = fingerprint(model)
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if weight.dim() < 2:
            continue
        original = weight.detach().clone()
        direction = nn.functional.normalize(torch.randn(weight.shape[0], generator=generator), dim=0)
        weight.data -= torch.outer(
            direction, direction @ original
        )  # a rank-one projection, the smallest real edit
        assert fingerprint(model) != before, name
        weight.data.copy_(original)
        assert fingerprint(model) == before, name


def test_vector_edit_and_new_bias_change_it() -> None:
    model = tiny_llama()
    before = fingerprint(model)
    model.model.norm.weight.data *= 1.05
    after = fingerprint(model)
    assert after != before
    projection = model.model.layers[0].self_attn.o_proj
    projection.bias = nn.Parameter(torch.zeros(32))
    assert fingerprint(model) != after


def test_hooks_mode_and_compile_leave_it_alone() -> None:
    model = tiny_llama()
    before = fingerprint(model)
    handle = model.model.layers[0].register_forward_hook(lambda *args: None)
    model.train()
    assert fingerprint(model) == before
    handle.remove()
    assert fingerprint(torch.compile(model)) == before  # wraps; nothing is compiled before the first call


def test_transposed_storage_has_the_same_print() -> None:
    net = nn.Linear(70, 50)
    before = fingerprint(net)
    net.weight = nn.Parameter(net.weight.detach().t().contiguous().t())
    assert not net.weight.is_contiguous()
    assert fingerprint(net) == before


def test_tied_weights_count_once_and_model_type_counts() -> None:
    tied = tiny_llama(tied=True)
    before = fingerprint(tied)
    untied = copy.deepcopy(tied)
    untied.lm_head.weight = nn.Parameter(untied.lm_head.weight.detach().clone())
    assert fingerprint(untied) != before
    tied.config.model_type = "mistral"
    assert fingerprint(tied) != before


def test_odd_parameters() -> None:
    net = nn.Module()
    net.scalar = nn.Parameter(torch.tensor(2.0))
    net.empty = nn.Parameter(torch.empty(0, 3))
    assert len(fingerprint(net)) == 16


def test_meta_parameters_are_refused() -> None:
    with torch.device("meta"):
        net = nn.Linear(3, 3)
    with pytest.raises(UnsupportedModelError, match="meta"):
        fingerprint(net)


@pytest.mark.parametrize("numel", [0, 1, 63, 64, 65, 1000, 331_776])
def test_positions_are_distinct_and_reach_both_ends(numel: int) -> None:
    positions = sample_positions(numel)
    assert len(set(positions)) == len(positions) == min(numel, 64)
    if numel:
        assert positions[0] == 0
        assert positions[-1] == numel - 1


def test_a_tied_tensor_counts_by_the_name_that_files_have() -> None:
    """XLM-RoBERTa registers its head before its embeddings; its files have the embeddings."""
    from tiny import tiny

    model = tiny("xlm-roberta", dtype=torch.float32)
    head = "lm_head.decoder.weight"
    assert head in dict(model.named_parameters())
    embedding = model.roberta.embeddings.word_embeddings
    assert embedding.weight is model.lm_head.decoder.weight
    print_ = fingerprint(model)
    reversed_ = dict(reversed(model._modules.items()))  # now the embeddings come first
    model._modules.clear()
    model._modules.update(reversed_)
    assert head not in dict(model.named_parameters())
    assert fingerprint(model) == print_
    embedding.weight = torch.nn.Parameter(embedding.weight.detach().clone())  # control: two tensors are two
    assert fingerprint(model) != print_
