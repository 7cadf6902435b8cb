"""The command `localize` and its pairs of facts, on the small model that knows planted facts."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from plantedkit import planted_model
from torch import Tensor
from typer.testing import CliRunner
from unlearnkit import FACTS, original, saved

from repe_unlearn.audit import figures
from repe_unlearn.cli import app
from repe_unlearn.cli_localize import _ranges
from repe_unlearn.errors import InputError
from repe_unlearn.localize import fact_pairs


def run(*args: object) -> Any:
    return CliRunner().invoke(app, ["localize", *map(str, args), "-q"], env={"COLUMNS": "200"})


def said(result: Any) -> str:
    return " ".join(re.sub(r"[│┃]", " ", result.output).split())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, and the facts beside it."""
    return saved(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def found(folder: Path) -> tuple[Path, Any]:
    """What one run wrote."""
    out = folder / "out"
    result = run(folder / "knows", "--facts", folder / "facts.jsonl", "--out", out, "--pairs", 4)
    assert result.exit_code == 0, result.output
    return out, result


def ids(text: str) -> Tensor:
    return torch.tensor([original()[1](text)["input_ids"]])


@torch.no_grad()
def prefers(text: str, pair: dict[str, Any]) -> float:
    """Logit of the answer less that of the other pair's, behind a prompt."""
    logits = original()[0](ids(text)).logits[0, -1]
    right, wrong = (int(ids(pair["clean"] + pair[name])[0, -1]) for name in ("answer", "wrong"))
    return float(logits[right] - logits[wrong])


def test_the_numbers_are_those_of_plain_hooks(found: tuple[Path, Any]) -> None:
    out, result = found
    assert {path.name for path in out.iterdir()} == {"map.svg", "map.json"}
    content = json.loads((out / "map.json").read_text())
    assert content["kind"] == "resid_pre"
    assert content["layers"] == [0, 1, 2, 3]
    assert len(content["pairs"]) == 4
    model, layer = original()[0], 2
    block = model.get_submodule(f"model.layers.{layer}")
    last = content["columns"].index("last")
    for pair in content["pairs"]:
        low = prefers(pair["corrupt"], pair)
        assert pair["gap"] == pytest.approx(prefers(pair["clean"], pair) - low, abs=1e-3)
        with torch.no_grad():
            clean = model(ids(pair["clean"]), output_hidden_states=True).hidden_states[layer]

        def put(_module: Any, args: tuple[Tensor, ...], clean: Tensor = clean) -> tuple[Tensor, ...]:
            return (torch.cat([args[0][:, :-1], clean[:, -1:]], 1), *args[1:])

        handle = block.register_forward_pre_hook(put)
        share = (prefers(pair["corrupt"], pair) - low) / pair["gap"]
        handle.remove()
        assert pair["recovery"][layer][last] == pytest.approx(share, abs=1e-3)
        assert pair["recovery"][0][last] == pytest.approx(0.0, abs=1e-4)  # the same token in both prompts
    rows = torch.tensor(content["recovery"], dtype=torch.float64)  # no null: empty columns are left out
    assert rows.isfinite().all()
    assert rows.abs().max() > 0.5
    assert "<svg" in (out / "map.svg").read_text()
    assert "4 pairs" in said(result)
    assert f"--facts {out.parent / 'facts.jsonl'}" in content["command"]


def test_gradients_and_other_places(folder: Path, tmp_path: Path, found: tuple[Path, Any]) -> None:
    out = tmp_path / "out"
    where = ["--facts", folder / "facts.jsonl", "--out", out, "--pairs", 4]
    result = run(folder / "knows", *where, "--method", "attribution", "--layers", "3,1-2", "--form", "unseen")
    assert result.exit_code == 0, result.output
    content = json.loads((out / "map.json").read_text())
    assert content["layers"] == [1, 2, 3]
    assert content["method"].startswith("attribution")
    seen = json.loads((found[0] / "map.json").read_text())
    assert not {p["clean"] for p in content["pairs"]} & {p["clean"] for p in seen["pairs"]}
    again = run(folder / "knows", *where, "--kind", "mlp_out")
    assert again.exit_code == 1
    assert "already there" in said(again)
    again = run(folder / "knows", *where, "--kind", "mlp_out", "--force")
    assert again.exit_code == 0, again.output
    assert json.loads((out / "map.json").read_text())["kind"] == "mlp_out"


def test_a_taken_folder_is_refused_before_any_work(found: tuple[Path, Any]) -> None:
    result = run("no/such/model", "--facts", "no-such-facts.jsonl", "--out", found[0])
    assert result.exit_code == 1
    assert "already there" in said(result)


def test_nothing_is_left_of_a_run_that_fails(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise InputError("no ink")

    monkeypatch.setattr(figures, "to_svg", fail)
    result = run(folder / "knows", "--facts", folder / "facts.jsonl", "--out", tmp_path / "out", "--pairs", 1)
    assert result.exit_code == 1
    assert "error: no ink" in said(result)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--facts", "capitols"], "got 'capitols'; needed one of capitals, planted"),
        (["--facts", "missing.jsonl"], "no file"),
        (
            ["--facts", "{folder}/facts.jsonl", "--kind", "heads"],
            "got --kind 'heads'; needed one of resid_pre",
        ),
        (
            ["--facts", "{folder}/facts.jsonl", "--method", "guess"],
            "got --method 'guess'; needed one of patch",
        ),
        (
            ["--facts", "{folder}/facts.jsonl", "--form", "reversed"],
            "got --form 'reversed'; needed one of seen",
        ),
        (["--facts", "{folder}/facts.jsonl", "--layers", "b"], "needed numbers and ranges"),
        (["--facts", "{folder}/facts.jsonl", "--layers", "9"], "got layer 9; this model"),
        (["--facts", "capitals"], "the model answers 0 'seen' questions rightly"),
    ],
)
def test_mistakes_are_answered_in_words(
    folder: Path, tmp_path: Path, arguments: list[str], complaint: str
) -> None:
    given = [argument.format(folder=folder) for argument in arguments]
    result = run(folder / "knows", *given, "--out", tmp_path / "out")
    assert result.exit_code == 1, result.output
    assert complaint in said(result)
    assert not (tmp_path / "out").exists()


def test_pairs_are_known_and_line_up() -> None:
    model, tokenizer = original()
    pairs = fact_pairs(model, tokenizer, FACTS, most=6, progress=False)
    forget = {fact.subject for fact in FACTS if fact.role == "forget"}
    assert len(pairs) == 6
    assert {pair.subject for pair in pairs} <= forget
    for pair in pairs:
        assert len(tokenizer(pair.clean)["input_ids"]) == len(tokenizer(pair.corrupt)["input_ids"])
        assert pair.answer != pair.wrong
        for prompt, answer in ((pair.clean, pair.answer), (pair.corrupt, pair.wrong)):
            with torch.no_grad():
                greedy = int(model(ids(prompt)).logits[0, -1].argmax())
            assert tokenizer.decode([greedy]) == answer.strip()


def test_relations_share_the_pairs() -> None:
    both = replace(
        FACTS, facts=tuple(replace(f, role="forget") if f.role == "neighbour" else f for f in FACTS)
    )
    wanted = [fact for fact in both if fact.role == "forget"]
    assert len({fact.relation for fact in wanted}) == 2
    pairs = fact_pairs(*original(), both, most=6, progress=False)
    made = [
        next(f.relation for f in wanted if (f.subject, f" {f.answer}") == (pair.subject, pair.answer))
        for pair in pairs
    ]
    assert sorted(map(made.count, both.relations)) == [3, 3]


def test_pairs_that_cannot_be_made() -> None:
    model, tokenizer = planted_model(FACTS, steps=0)  # taught nothing
    with pytest.raises(InputError, match="rightly, and no two"):
        fact_pairs(model, tokenizer, FACTS, progress=False)
    model, tokenizer = original()
    with pytest.raises(InputError, match="nothing to forget"):
        fact_pairs(model, tokenizer, FACTS.only("retain"), progress=False)
    with pytest.raises(InputError, match="needed seen or unseen"):
        fact_pairs(model, tokenizer, FACTS, form="reversed", progress=False)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="at least 1"):
        fact_pairs(model, tokenizer, FACTS, most=0, progress=False)
    untold = {relation: {"seen": forms["seen"]} for relation, forms in FACTS.templates.items()}
    with pytest.raises(InputError, match="no 'unseen' wordings"):
        fact_pairs(model, tokenizer, replace(FACTS, templates=untold), form="unseen", progress=False)
    one = next(fact for fact in FACTS if fact.role == "forget")
    with pytest.raises(InputError, match="no two of one wording line up"):
        fact_pairs(model, tokenizer, FACTS.where(lambda fact: fact is one), progress=False)


def test_ranges_read_as_layers_are_given() -> None:
    assert _ranges([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8"
    assert _ranges([]) == ""
