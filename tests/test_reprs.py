"""What a notebook shows: every noun as a table, whose numbers are those of plain torch, and every text escaped."""

from __future__ import annotations

import numpy as np
import torch

from repe_unlearn import Answers, Eraser, Fact, Facts, Moments, Patch
from repe_unlearn.edit import Edit


def test_moments_show_classes_and_the_strongest_correlation() -> None:
    x = torch.randn(40, 5, generator=torch.Generator().manual_seed(0)).double()
    z = (x[:, 3] > 0.3).long()
    z[:2] = torch.tensor([0, 1])
    shown = Moments.of(x, z)._repr_html_()
    onehot = torch.stack([z == 0, z == 1], 1).double()
    strongest = np.abs(np.corrcoef(x.T.numpy(), onehot.T.numpy())[:5, 5:]).max(0)
    std = onehot.std(0, correction=0)
    for column in (0, 1):
        cells = (column, *(f"{float(v[column]):.3g}" for v in (onehot.mean(0), std, strongest)))
        assert "".join(f"<td>{cell}</td>" for cell in cells) in shown


def test_moments_without_rows_or_variance_are_shown() -> None:
    assert "<td>0</td>" in Moments.empty(3, 2)._repr_html_()
    flat = Moments.of(torch.ones(4, 2), torch.zeros(4, dtype=torch.long), classes=9)
    assert "nan" not in flat._repr_html_()
    assert "… and 1 more" in flat._repr_html_()


def test_an_eraser_shows_how_far_it_moves() -> None:
    noise = torch.Generator().manual_seed(1)
    left, right = (torch.randn(6, 2, generator=noise, dtype=torch.float64) for _ in range(2))
    oblique = Eraser(left, right.T, torch.zeros(6, dtype=torch.float64))
    for value in torch.linalg.svdvals(left @ right.T)[:2].tolist():
        assert f"<td>{value:.3g}</td>" in oblique._repr_html_()
    basis = torch.linalg.qr(left).Q
    assert Eraser(basis, basis.T, torch.zeros(6).double())._repr_html_().count("<td>1</td>") == 3
    nothing = Eraser(torch.zeros(6, 0), torch.zeros(0, 6), torch.zeros(6))
    assert "<td>" not in nothing._repr_html_()


def test_a_patch_shows_its_largest_edits_first() -> None:
    edits = {f"w{i}": Edit(torch.full((3, 1), float(i)), torch.ones(1, 2), "<rule>") for i in range(1, 11)}
    shown = Patch({**edits, "bias": Edit(torch.full((3,), 100.0), None, "b")}, "f")._repr_html_()
    assert "<td>bias</td><td>b</td><td>full</td><td>173</td>" in shown
    assert shown.index("bias") < shown.index("w10") < shown.index("w9")
    assert f"<td>w10</td><td>&lt;rule&gt;</td><td>1</td><td>{10 * 6**0.5:.3g}</td>" in shown
    assert "… and 3 more" in shown
    assert "<rule>" not in shown


def test_answers_show_every_role_and_form() -> None:
    facts = Facts(
        (Fact("Rome", "is", "red", ("blue",)), Fact("Oslo", "is", "green", ("blue",), "retain")),
        {"is": {"seen": ("{subject} is", "In {subject} it is"), "unseen": ("{subject}:",)}},
    )
    questions = facts.questions("seen", "unseen")
    right = np.array([q.form == "seen" and q.answer == " red" for q in questions])
    margin = np.arange(len(questions), dtype=float)
    shown = Answers(facts, questions, margin - 9, margin, right, right)._repr_html_()
    mine = [m for m, q in zip(margin, questions, strict=True) if q.form == "seen" and q.fact == 0]
    row = f"<td>forget</td><td>seen</td><td>1</td><td>1.00</td><td>1.00</td><td>{np.mean(mine):.2f}</td>"
    assert row in shown
    assert shown.count("<td>0.00</td>") >= 4  # the other role, and the other wording
    assert shown.count("<tr>") == 5
