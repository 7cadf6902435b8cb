"""Facts: what is refused, how wordings are filled, halves for relearning, and every file they are read from."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from repe_unlearn.errors import FileFormatError, InputError, NotEnoughDataError, OutputExistsError
from repe_unlearn.facts import ROLES, Fact, Facts
from repe_unlearn.facts_files import Corpus
from repe_unlearn.tables import html_table

ROWS = [("France", "Paris"), ("Spain", "Madrid"), ("Japan", "Tokyo", "retain"), ("Peru", "Lima", "retain")]
SEEN = ["The capital of {subject} is", "In {subject} people visit"]
UNSEEN = ["The seat of government of {subject} is"]


def capitals() -> Facts:
    return Facts.of(ROWS, SEEN, UNSEEN)


def one(**changes: object) -> Fact:
    return Fact(
        **{
            "subject": "France",
            "relation": "fact",
            "answer": "Paris",
            "details": {"people": "French"},
            **changes,
        }
    )


def test_a_question_is_its_wording_filled() -> None:
    question = capitals().questions("seen", roles=["forget"])[0]
    assert (question.prompt, question.answer) == ("The capital of France is", " Paris")
    assert question.prompt[slice(*question.subject)] == "France"
    assert set(question.options) == {" Madrid", " Tokyo", " Lima"}
    # Control: another role, another form.
    assert [q.prompt for q in capitals().questions("unseen", roles=["retain"])] == [
        "The seat of government of Japan is",
        "The seat of government of Peru is",
    ]


def test_reversed_questions_ask_for_the_subject_and_multi_hop_ones_do_not_name_it() -> None:
    templates = {
        "fact": {
            "seen": ["The capital of {subject} is"],
            "reversed": ["{answer} is in"],
            "multi_hop": ["The {people} live around"],
        }
    }
    facts = Facts((one(distractors=("Rome",)), one(subject="Italy", answer="Rome")), templates)
    back, hop = facts.questions("reversed")[0], facts.questions("multi_hop")[0]
    assert (back.prompt, back.answer, back.options, back.subject) == (
        "Paris is in",
        " France",
        (" Italy",),
        None,
    )
    assert (hop.prompt, hop.answer, hop.subject) == ("The French live around", " Paris", None)


def test_in_context_questions_show_other_facts_that_stay() -> None:
    facts = capitals()
    for question in facts.questions("in_context"):
        fact = facts.facts[question.fact]
        *shown, last = question.prompt.split("\n")
        assert question.prompt[slice(*question.subject)] == fact.subject
        assert fact.subject in last
        assert not any(name in line for line in shown for name in ("France", "Spain", fact.subject))
        assert len(shown) == 2 - (fact.role == "retain")
        assert all(line.endswith(("Tokyo.", "Lima.")) for line in shown)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"role": "forgotten"}, "role 'forgotten'"),
        ({"relation": "river"}, "no wordings for this relation"),
        ({"answer": " Paris"}, "without spaces"),
        ({"answer": ""}, "needed text"),
        ({"subject": 3}, "needed text"),
        ({"distractors": ("Paris",)}, "among the distractors"),
        ({"details": {}}, "has no 'people'"),
    ],
)
def test_a_bad_fact_is_refused(changes: dict, complaint: str) -> None:
    templates = {"fact": {"seen": ["The {people} of {subject} like"]}}
    Facts((one(),), templates)  # the control
    with pytest.raises(InputError, match=complaint):
        Facts((one(**changes),), templates)


@pytest.mark.parametrize(
    ("forms", "complaint"),
    [
        ({}, "no 'seen' wording"),
        ({"seen": ["The capital is"]}, "needed one with {subject}"),
        ({"seen": ["The capital of {subject} is "]}, "end in a space"),
        ({"seen": ["{subject} is"], "unseen": ["{subject} is"]}, "both seen and unseen"),
        ({"seen": ["{subject} is"], "backwards": ["{subject} is"]}, "form 'backwards'"),
        ({"seen": ["{subject} is"], "multi_hop": ["{subject} is"]}, "needed one with no {subject}"),
        ({"seen": ["{subject} is"], "reversed": ["{subject} is"]}, "needed one with {answer}"),
    ],
)
def test_bad_wordings_are_refused(forms: dict, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        Facts((one(),), {"fact": forms})


def test_no_facts_no_rows_no_form() -> None:
    with pytest.raises(NotEnoughDataError, match="holds no facts"):
        Facts((), {})
    with pytest.raises(NotEnoughDataError):
        capitals().only("decoy")
    with pytest.raises(InputError, match="row 0 has 1 fields"):
        Facts.of([("France",)], SEEN)
    with pytest.raises(InputError, match="form 'asked'"):
        capitals().questions("asked")  # type: ignore[arg-type]


def test_facts_can_be_hashed_copied_and_not_changed() -> None:
    facts = Facts((one(),), {"fact": {"seen": SEEN}})
    assert {one(), one()} == {one()}
    assert one() != one(details={})
    for again in (copy.deepcopy(facts), pickle.loads(pickle.dumps(facts))):
        assert (again.facts, again.templates, again.name) == (facts.facts, facts.templates, facts.name)
    with pytest.raises(TypeError):
        facts.facts[0].details["people"] = "Dutch"  # type: ignore[index]


def test_selection() -> None:
    facts = capitals()
    assert [f.subject for f in facts.only("retain")] == ["Japan", "Peru"]
    assert [f.subject for f in facts.having([2, 0, 2])] == ["France", "Japan"]
    assert facts.roles == ("forget", "retain")
    assert facts.relations == ("fact",)
    assert [s.text for s in facts.samples("unseen", roles=["forget"])] == [
        "The seat of government of France is Paris",
        "The seat of government of Spain is Madrid",
    ]


def test_html_escapes_and_counts_what_it_leaves_out() -> None:
    facts = Facts.of([(f"<b>{i}", str(i)) for i in range(10)], ["{subject} is"])
    shown = facts._repr_html_()
    assert "&lt;b&gt;0" in shown
    assert "<b>0" not in shown
    assert "… and 2 more" in shown
    assert "more" not in html_table("all", ["n"], [[1]], total=1)


def test_relearning_halves_share_no_subject_and_have_alike_answers() -> None:
    facts = Facts.builtin("planted", forget=16, retain=8, decoys=0, options=4)
    for seed in range(3):
        taught, tested = facts.split_relearn(seed)
        names = [{f.subject for f in half} for half in (taught, tested)]
        assert names[0].isdisjoint(names[1])
        assert names[0] | names[1] == {f.subject for f in facts.only("forget")}
        assert [len(n) for n in names] == [8, 8]
        for relation in facts.relations:
            for answer in {f.answer for f in facts.only("forget", relation=relation)}:
                counts = [
                    sum((f.relation, f.answer) == (relation, answer) for f in h) for h in (taught, tested)
                ]
                assert sum(counts) == 4
                assert abs(counts[0] - counts[1]) <= 2
    first, again, other = (facts.split_relearn(seed)[0].facts for seed in (0, 0, 1))
    assert first == again
    assert first != other
    with pytest.raises(NotEnoughDataError, match="one subject"):
        Facts.of(ROWS[1:], SEEN).split_relearn()


def test_training_text_teaches_seen_wordings_only_and_no_decoys() -> None:
    facts = Facts.of([*ROWS, ("Atlantis", "Poseidonia", "decoy")], SEEN, UNSEEN)
    text = facts.training_text()
    assert sorted(text) == sorted(
        f"{wording.replace('{subject}', row[0])} {row[1]}." for row in ROWS for wording in SEEN
    )
    assert len(facts.training_text("retain", repeats=3)) == 12
    assert not any("France" in line for line in facts.training_text("retain"))
    assert facts.training_text("decoy")[0].endswith("Poseidonia.")
    with pytest.raises(NotEnoughDataError, match="neighbour"):
        facts.training_text("neighbour")


# ---- files


def test_jsonl_comes_back_and_is_never_overwritten(tmp_path: Path) -> None:
    facts = Facts.builtin("capitals", neighbours=["language"])
    path = facts.to_jsonl(tmp_path / "new" / "facts.jsonl")
    again = Facts.read(path)
    assert (again.facts, again.templates, again.name) == (facts.facts, facts.templates, facts.name)
    before = path.read_bytes()
    with pytest.raises(OutputExistsError):
        capitals().to_jsonl(path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


HEAD = '{"templates": {"fact": {"seen": ["{subject} is"]}}}'


@pytest.mark.parametrize(
    ("lines", "error", "complaint"),
    [
        ([], NotEnoughDataError, "is empty"),
        ([HEAD], NotEnoughDataError, "holds no facts"),
        ([HEAD, "{"], FileFormatError, "line 2: bad JSON"),
        ([HEAD, "[]"], FileFormatError, "line 2: a JSON object"),
        ([HEAD, '{"subject": "a", "relation": "fact"}'], FileFormatError, "fact 1.*answer"),
        (
            [HEAD, '{"subject": "a", "relation": "fact", "answer": "b", "colour": 1}'],
            FileFormatError,
            "colour",
        ),
        (
            [HEAD, '{"subject": "a", "relation": "fact", "answer": "b", "distractors": "c"}'],
            FileFormatError,
            "list of distractors",
        ),
        (
            [HEAD, '{"subject": "a", "relation": "fact", "answer": "b", "role": "keep"}'],
            InputError,
            "role 'keep'",
        ),
        (['{"subject": "a"}'], FileFormatError, "first line has no 'templates'"),
        (['{"question": "a", "answer": "b"}'], FileFormatError, "from_tofu"),
        (['{"templates": {"fact": ["{subject} is"]}}'], FileFormatError, "holds no wordings"),
    ],
)
def test_bad_jsonl_is_refused(tmp_path: Path, lines: list[str], error: type, complaint: str) -> None:
    path = tmp_path / "facts.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(error, match=complaint):
        Facts.from_jsonl(path)
    path.write_text(HEAD + '\n{"subject": "a", "relation": "fact", "answer": "b"}\n')  # the control
    assert Facts.from_jsonl(path).facts == (Fact("a", "fact", "b"),)


def jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_questions_and_answers_in_the_manner_of_tofu(tmp_path: Path) -> None:
    jsonl(tmp_path / "forget.jsonl", [{"question": "Who wrote it? ", "answer": "Ann."}])
    jsonl(
        tmp_path / "retain.jsonl",
        [{"question": "Where?", "answer": "Here.", "perturbed_answer": ["There.", "Here.", " Far. "]}],
    )
    facts = Facts.read(tmp_path)
    assert [(f.subject, f.answer, f.role, f.distractors) for f in facts] == [
        ("Who wrote it?", "Ann.", "forget", ()),
        ("Where?", "Here.", "retain", ("There.", "Far.")),
    ]
    assert facts.questions()[0].prompt == "Question: Who wrote it?\nAnswer:"
    with pytest.raises(InputError, match="no column 'q'"):
        Facts.from_tofu(tmp_path / "forget.jsonl", tmp_path / "retain.jsonl", question="q")
    with pytest.raises(InputError, match="there is no file"):
        Facts.from_tofu(tmp_path / "forget.jsonl", tmp_path / "none.jsonl")
    jsonl(tmp_path / "forget.jsonl", [{"question": "Who?", "answer": "Ann.", "perturbed_answer": [3]}])
    with pytest.raises(FileFormatError, match="row 0"):
        Facts.read(tmp_path)


COUNTERFACT = """statement,label,relation,subject,target,true_target
The mother tongue of Ann is French.,1,The mother tongue of {} is,Ann,French,French
The mother tongue of Ann is English.,0,The mother tongue of {} is,Ann,English,French
The mother tongue of Bob is Dutch.,1,The mother tongue of {} is,Bob,Dutch,Dutch
The mother tongue of Bob is French.,0,The mother tongue of {} is,Bob,French,Dutch
"Oslo, Norway is in Europe.",1,{} is in,"Oslo, Norway",Europe,Europe
"Oslo, Norway is in Asia.",0,{} is in,"Oslo, Norway",Asia,Europe
"""


def test_true_and_false_statements_in_the_manner_of_counterfact(tmp_path: Path) -> None:
    path = tmp_path / "statements.csv"
    path.write_text(COUNTERFACT)
    facts = Facts.read(path, forget=0.34)
    assert {(f.subject, f.answer): set(f.distractors) for f in facts} == {
        ("Ann", "French"): {"English", "Dutch"},
        ("Bob", "Dutch"): {"French"},
        ("Oslo, Norway", "Europe"): {"Asia"},
    }
    assert sorted(f.role for f in facts) == ["forget", "retain", "retain"]
    assert {q.prompt for q in facts.questions()} == {
        "The mother tongue of Ann is",
        "The mother tongue of Bob is",
        "Oslo, Norway is in",
    }
    assert Facts.read(path, forget=1.0).roles == ("forget",)


@pytest.mark.parametrize(
    ("change", "error", "complaint"),
    [
        (lambda text: text.replace(",0,", ",1,"), InputError, "labels are 1"),
        (lambda text: text.replace("label", "truth"), InputError, "no column"),
        (lambda text: text.replace("{} is in", "is in"), FileFormatError, "row 6"),
        (lambda text: text.splitlines()[0], NotEnoughDataError, "is empty"),
    ],
)
def test_bad_statements_are_refused(
    tmp_path: Path, change: Callable[[str], str], error: type, complaint: str
) -> None:
    path = tmp_path / "statements.csv"
    path.write_text(change(COUNTERFACT))
    with pytest.raises(error, match=complaint):
        Facts.from_counterfact_csv(path)
    with pytest.raises(InputError, match="forget=0"):
        Facts.from_counterfact_csv(path, forget=0)


TABLE = """subject,relation,answer,role,distractors,people,seen,unseen
France,capital,Paris,forget,Rome|Oslo,French,The capital of {subject} is|The {people} capital is in {subject}: the city,The main city of {subject} is
Japan,capital,Tokyo,retain,,Japanese,,
Ann,job,baker,,,x,The job of {subject} is,
"""


def test_a_table_of_facts(tmp_path: Path) -> None:
    path = tmp_path / "facts.csv"
    path.write_text(TABLE)
    facts = Facts.read(path)
    assert [(f.subject, f.role, f.distractors, f.details["people"]) for f in facts] == [
        ("France", "forget", ("Rome", "Oslo"), "French"),
        ("Japan", "retain", (), "Japanese"),
        ("Ann", "forget", (), "x"),
    ]
    assert len(facts.questions("seen")) == 5
    assert [q.prompt for q in facts.questions("unseen", roles=["retain"])] == ["The main city of Japan is"]
    templates = {"capital": {"seen": ["{subject}:"]}, "job": {"seen": ["{subject} works as a"]}}
    given = tmp_path / "templates.json"
    given.write_text(json.dumps(templates))
    for source in (templates, given):
        assert Facts.from_csv(path, templates=source).questions()[0].prompt == "France:"


@pytest.mark.parametrize(
    ("change", "error", "complaint"),
    [
        (lambda text: text.replace("answer", "reply"), InputError, "no column 'answer'"),
        (lambda text: text.replace(",seen", ",wording"), InputError, "no column 'seen'"),
        (lambda text: text.replace("retain", "keep"), InputError, "role 'keep'"),
        (lambda text: text + "Bob,job\n", FileFormatError, "line 5: 2 cells"),
        (lambda text: text.replace("The job of {subject} is", ""), InputError, "'job' has no 'seen'"),
        (lambda text: "", NotEnoughDataError, "is empty"),
    ],
)
def test_a_bad_table_is_refused(
    tmp_path: Path, change: Callable[[str], str], error: type, complaint: str
) -> None:
    path = tmp_path / "facts.csv"
    path.write_text(change(TABLE))
    with pytest.raises(error, match=complaint):
        Facts.from_csv(path)


def test_templates_that_are_none(tmp_path: Path) -> None:
    path, given = tmp_path / "facts.csv", tmp_path / "templates.json"
    path.write_text(TABLE)
    for content in ("{", '["The capital of {subject} is"]', '{"capital": {"seen": "The capital is"}}'):
        given.write_text(content)
        with pytest.raises(FileFormatError, match="wordings"):
            Facts.from_csv(path, templates=given)


def test_corpora(tmp_path: Path) -> None:
    plain = tmp_path / "book.txt"
    plain.write_text("\n\nFirst line\nsecond line.\n \n\nNext passage.\n\n", encoding="utf-8")
    corpus = Corpus.read(plain)
    assert (corpus.texts, corpus.name) == (("First line\nsecond line.", "Next passage."), "book")
    assert [(s.prompt, s.completion) for s in corpus.samples()] == [("", text) for text in corpus]
    lines = jsonl(tmp_path / "book.jsonl", [{"text": "One."}, {"text": "Two."}])
    assert Corpus.read(lines).texts == ("One.", "Two.")
    lines.write_text('{"text": "One."}\n{"text": \n')
    with pytest.raises(FileFormatError, match="line 2: bad JSON"):
        Corpus.read(lines)
    with pytest.raises(InputError, match="no column 'body'"):
        Corpus.read(jsonl(lines, [{"text": "One."}]), column="body")
    plain.write_bytes(b"\xff\xfe")
    with pytest.raises(FileFormatError, match="not UTF-8"):
        Corpus.read(plain)
    plain.write_text(" \n\n ")
    with pytest.raises(NotEnoughDataError, match="no text"):
        Corpus.read(plain)
    for name in ("none.txt", "book.pdf"):
        with pytest.raises(InputError):
            Corpus.read(tmp_path / name)


def test_a_name_that_points_nowhere() -> None:
    with pytest.raises(InputError, match="planted"):
        Facts.read("rivers")
    with pytest.raises(InputError, match="there is no file"):
        Facts.read("rivers.jsonl")
    with pytest.raises(InputError, match=r"\.csv"):
        Facts.read("rivers.xlsx")
    assert Facts.read("capitals", forget="Asia", decoys=3).only("forget").facts[0].subject == "Japan"


# ---- capitals


@pytest.mark.parametrize("forget", ["Europe", "South America"])
def test_capitals_have_the_roles_that_they_say(forget: str) -> None:
    facts = Facts.builtin("capitals", forget=forget)
    assert set(facts.roles) == set(ROLES)
    gone = {f.subject for f in facts.only("forget")}
    assert ("France" in gone) == (forget == "Europe")
    assert ("Peru" in gone) == (forget == "South America")
    assert {f.subject for f in facts.only("neighbour")} == gone
    assert {f.relation for f in facts.only("forget")} == {"capital"}
    assert gone.isdisjoint(f.subject for f in facts.only("retain"))
    made_up = {f.subject for f in facts.only("decoy")}
    assert made_up.isdisjoint(f.subject for f in facts if f.role != "decoy")
    for fact in facts:
        assert len(set(fact.distractors)) == 3


def test_capitals_have_wordings_to_solve_with_and_to_measure_with() -> None:
    facts = Facts.builtin("capitals")
    capital = facts.templates["capital"]
    assert len(capital["seen"]) >= 6
    assert len(capital["unseen"]) >= 3
    for forms in facts.templates.values():
        assert len(forms["seen"]) >= 2
        assert len(forms["unseen"]) >= 1
        assert not any(text.startswith("{subject}") for text in forms["seen"])


def test_every_answer_fits_its_question() -> None:
    facts = Facts.builtin("capitals")
    right: dict[tuple[str, str], set[str]] = {}
    for fact in facts.where(lambda f: f.role != "decoy"):
        right.setdefault((fact.relation, fact.subject), set()).add(fact.answer)
    assert all(len(found) == 1 for found in right.values())
    belgium = next(f for f in facts if (f.relation, f.subject) == ("language", "Belgium"))
    assert not {"Dutch", "French", "German"} & set(belgium.distractors)


@pytest.mark.parametrize(
    "options",
    [
        {"forget": "Atlantis"},
        {"forget": ["France", "Narnia"]},
        {"forget": []},
        {"relation": "river"},
        {"decoys": 99},
    ],
)
def test_capitals_refuse(options: dict) -> None:
    with pytest.raises(InputError):
        Facts.builtin("capitals", **options)


@pytest.mark.real
def test_the_real_model_answers_every_wording() -> None:
    from repe_unlearn import answers, load

    model, tokenizer, _ = load(progress=False)
    facts = Facts.builtin("capitals")
    some = set(list(dict.fromkeys(f.subject for f in facts))[::6])
    asked = facts.where(lambda f: f.subject in some)
    found = answers(model, tokenizer, asked, "seen", "unseen", "multi_hop", progress=False)
    # Countries whose capital the model says in two wordings at least.
    known = {f.subject for f in found.known() if f.relation == "capital" and f.role != "decoy"}
    assert len(known) >= 8
    right: dict[str, list[tuple[bool, bool]]] = {}
    decoys = []
    for question, exact, chosen in zip(found.questions, found.exact, found.chosen, strict=True):
        fact = asked.facts[question.fact]
        if fact.subject in known:
            right.setdefault(question.template, []).append((exact, chosen))
        elif fact.role == "decoy":
            decoys.append(exact)
    for template, pairs in right.items():
        greedy, choice = np.mean(pairs, axis=0)
        assert greedy >= 0.4, template
        assert choice >= 0.6, template
    assert np.mean(decoys) < 0.1  # the control: nobody knows these
