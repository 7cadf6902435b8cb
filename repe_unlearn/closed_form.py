"""Closed form: unlearn facts or texts by one linear solve per layer, each on what the edited layers before it leave."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias
from weakref import WeakKeyDictionary

import greenlet
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .activations import BATCH_TOKENS, refuse_nonfinite
from .architectures import Architecture, Write
from .builtin.passages import PASSAGES
from .edit import Edit
from .encoding import Batch, Batches, Encoded, batches, longest_text, pad_id_of
from .errors import InputError, NotEnoughDataError, UnsupportedModelError
from .facts import Facts
from .facts_files import Corpus
from .fingerprints import fingerprint
from .linears import Linear, linear
from .moments import Moments
from .patch import Patch
from .placement import evaluating
from .sequential import Runs
from .sites import Site
from .solvers import targets
from .solvers.ridge_edit import ridge_edit
from .solvers.targets import Target
from .taps import tap

__all__ = ["TARGETS", "Place", "check_target", "closed_form", "default_layers", "places_of", "wanted"]

_GROUPS = ("forget", "retain", "neighbour", "text", "decoy")
_Group = Literal["forget", "retain", "neighbour", "text", "decoy"]

TARGETS: tuple[str, ...] = ("mean_retain", "mean_decoy", "zero", "rmu", "redirect")
"""Names of what the edited positions are to become; ``closed_form`` says what each means."""


def closed_form(
    model: nn.Module,
    tokenizer: Any,
    source: Facts | Corpus,
    retain: Corpus | None = None,
    *,
    layers: Iterable[int] | None = None,
    writers: Sequence[Literal["mlp_out", "attn_out"]] = ("attn_out", "mlp_out"),
    target: str | Target = "mean_retain",
    alpha: float = 4.0,
    beta: float = 30.0,
    ridge: float = 14.0,
    strength: float = 1.0,
    null_space: float | None = None,
    rank: int | None = None,
    texts: Sequence[str] = PASSAGES,
    seed: int = 0,
    batch_tokens: int = BATCH_TOKENS,
    progress: bool = True,
) -> Patch:
    """Return a patch whose every edit is the exact minimiser of ``ridge_edit``'s objective, given the edits before it.

    With facts, what is edited is what the model adds at the last token of each ``seen`` wording, from where the answer
    is read; with texts, at every token. The keys of a layer are those that the model computes once all earlier layers
    are edited, at the price of one forward pass of the prompts and the solves, whatever the number of layers.
    Where a block adds its MLP's output to the stream as it is, the target is about the output of the block, the passing
    stream included (as RMU); behind a post-norm and for attention it is about what the module writes.

    The first token of a prompt is never used: it is where attention sinks, and editing it destroys the model.
    Nothing that ``unseen`` wordings or the neutral passages of the report say is used.

    Args:
        model: a causal language model; not changed.
        tokenizer: its tokenizer.
        source: facts, or texts to forget. Of facts the ``seen`` wordings of forget, of neighbours, of what else is
            retained of a forgotten relation, and for ``mean_decoy`` of decoys; other relations are left out.
        retain: texts to keep beside ``texts``; needed with texts to forget.
        layers: blocks to edit; default ``default_layers``, from two thirds to nine tenths of the depth.
        writers: which of a block's writers: ``attn_out``, ``mlp_out`` or both. With both the neighbours keep more than with
            the MLP alone.
        target: ``mean_retain`` (what is written for retained facts in the same wording, on average), ``mean_decoy``
            (the same of decoys: subjects that the model does not know), ``zero`` (the weight writes nothing), ``rmu`` (a
            random vector of five times the usual length), ``redirect`` (by the mean of retain less that of forget, as
            LUNAR), or any ``solvers.targets.Target``. With texts to forget, retain is the mean of all texts to keep.
        alpha: weight of retained facts and texts (three parts facts, one part texts), 0 or more.
        beta: weight of neighbours, 0 or more.
        ridge: weight of the size of the edit, relative to the mean square of a retained key. Large values (1 to 30) make
            the edit carry over to wordings that it was not solved on.
        strength: factor on the solved edit, above 0; 1 is the minimiser.
        null_space: leave what the weight writes for the keys of retain, texts and neighbours as it was, see
            ``ridge_edit``.
        rank: at most so many directions per weight.
        texts: passages to keep; () for none.
        seed: of random directions.
        batch_tokens: positions per batch.
        progress: show a progress bar.

    Returns:
        One edit per layer and writer; biases and all other weights stay.

    Raises:
        NotEnoughDataError: nothing to forget or to keep, or no decoys for ``mean_decoy``.
        InputError: unknown layers, writers or target; a number out of range; a prompt that is too long, or of one token;
            a source or texts of another type; keys that do not determine the edit (``ridge=0``), or no null space.
        ShapeError: a ``Target`` of another width.
        UnsupportedArchitectureError: a family without a row.
        UnsupportedModelError: a writer that is no single matrix (experts), is quantised, replaced or offloaded.
        NonFiniteError: activations with NaN or infinity.

    Reference:
        The last-layer problem of RMU (Li et al., arXiv 2403.03218) is ridge regression; sequential over layers as MEMIT
        (Meng et al., arXiv 2210.07229); with other targets UCE (arXiv 2308.14761) and LUNAR (arXiv 2502.07218).

    Example:
        ``patch = closed_form(model, tokenizer, Facts.builtin("capitals", forget="Europe"))``
    """
    _check(source, retain, target, strength, texts)
    prompts = _prompts(source, retain, texts, target)
    places = places_of(model, Architecture.of(model), layers, writers)
    work = _encoded(model, tokenizer, prompts, batch_tokens)
    settings = {"alpha": alpha, "beta": beta, "ridge": ridge, "null_space": null_space, "rank": rank}
    solve = _Solver(prompts, target, strength, seed, settings)
    read = _Read()
    edits: dict[str, Edit] = {}
    runs = Runs(model, work, tuple(place.site for place in places), None, None)
    with (
        evaluating(model),
        tap(model, {place.keys: partial(read.keep, place.keys) for place in places}),
        runs,
        tqdm(total=len(places), desc="closed form", unit="layer", disable=not progress, leave=False) as bar,
    ):
        change: Callable[[Tensor], Tensor] | None = None
        by_site = {place.site: place for place in places}
        while True:
            rows: list[_Rows] = []
            place = None
            for batch, site, x in runs.advance(change):
                assert isinstance(batch, Batch)
                place, found = by_site[site], batch.pick(x)
                refuse_nonfinite(site, found)
                rows.append(_Rows(batch.pick(read.latest(place.keys)), found, batch.z, batch.owner))
            if place is None:
                break
            edit = solve(place.linear.each(lambda w: w), rows)
            edits[place.linear.name] = edit.mT if place.linear.turned else edit
            change = partial(read.edited, place.keys, edit)
            bar.update()
    facts = {
        "method": "closed form",
        "target": target if isinstance(target, str) else target.name,
        "layers": ", ".join(str(place.layer) for place in places),
        "settings": ", ".join(
            f"{k}={v:g}" for k, v in {**settings, "strength": strength}.items() if v is not None
        ),
        "source": source.name,
    }
    return Patch(edits, fingerprint(model), provenance=facts)


def default_layers(n_layers: int) -> range:
    """Return the blocks that are edited by default: from two thirds to nine tenths of the depth.

    There the answer is being written at the last token; earlier blocks serve everything that is said about a subject.

    Example:
        >>> default_layers(30)
        range(20, 27)
    """
    return range(n_layers * 2 // 3, max(n_layers * 2 // 3 + 1, n_layers * 9 // 10))


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """One weight to edit.

    Attributes:
        layer: number of the block.
        kind: ``attn_out`` or ``mlp_out``.
        linear: the weight.
        keys: where its inputs are seen.
        site: the output that targets are about: of the block, or of the module where the block's does not move by the
            same amount.
    """

    layer: int
    kind: Literal["mlp_out", "attn_out"]
    linear: Linear
    keys: Site
    site: Site


@dataclass(frozen=True, slots=True)
class _Prompt:
    """A text to run, its group, and the wording if it is a question: then only its last token counts."""

    text: str
    group: _Group
    wording: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class _Rows:
    """The selected rows of one batch: keys, outputs, group and prompt."""

    keys: Tensor
    outputs: Tensor
    group: Tensor
    owner: Tensor


class _Read:
    """What the weights read in every waiting run, so that an edit acts on it without running the block again."""

    def __init__(self) -> None:
        self._kept: WeakKeyDictionary[greenlet.greenlet, dict[Site, Tensor]] = WeakKeyDictionary()
        self._latest: dict[Site, Tensor] = {}

    def keep(self, site: Site, x: Tensor) -> None:
        self._latest = self._kept.setdefault(greenlet.getcurrent(), {})
        self._latest[site] = x

    def latest(self, site: Site) -> Tensor:
        """Return what the run that paused last had read."""
        return self._latest[site]

    def edited(self, site: Site, edit: Edit, x: Tensor) -> Tensor:
        """Return what the run that now goes on would compute with the edited weight."""
        read = self._kept[greenlet.getcurrent()].pop(site)
        left = edit.left.to(read)
        added = read @ left.T if edit.right is None else (read @ edit.right.to(read).T) @ left.T
        return x + added.reshape(x.shape)


def _check(source: object, retain: object, target: object, strength: float, texts: Sequence[str]) -> None:
    if not isinstance(source, Facts | Corpus):
        raise InputError(f"got {type(source).__name__} to forget; needed Facts or a Corpus.")
    if not isinstance(retain, Corpus | None):
        raise InputError(f"got {type(retain).__name__} to keep; needed a Corpus, or None.")
    if isinstance(texts, str):
        raise InputError("got one string as texts; needed a list of passages.")
    check_target(target)
    if not 0 < strength < float("inf"):
        raise InputError(f"got strength={strength}; needed a number above 0.")


def _prompts(
    source: Facts | Corpus, retain: Corpus | None, texts: Sequence[str], target: str | Target
) -> list[_Prompt]:
    """Return what is run."""
    kept = [_Prompt(text, "text") for text in (*texts, *(() if retain is None else retain.texts))]
    if isinstance(source, Corpus):
        if retain is None:
            raise NotEnoughDataError("got texts to forget and none to keep; give retain=Corpus(...) as well.")
        found = [*(_Prompt(text, "forget") for text in source.texts), *kept]
    else:
        found = [*_asked(source, decoys=target == "mean_decoy"), *kept]
    if target == "mean_decoy" and not any(prompt.group == "decoy" for prompt in found):
        raise NotEnoughDataError("target='mean_decoy' needs facts with the role 'decoy'; there are none.")
    return found


def _asked(facts: Facts, *, decoys: bool) -> list[_Prompt]:
    """Return the questions that an edit is solved on."""
    forgotten = {fact.relation for fact in facts if fact.role == "forget"}
    if not forgotten:
        raise NotEnoughDataError("got facts of which none is to be forgotten; give some the role 'forget'.")
    asked = []
    for question in facts.questions("seen"):
        fact = facts.facts[question.fact]
        same = fact.relation in forgotten and (fact.role == "retain" or decoys)
        if same or fact.role in ("forget", "neighbour"):
            asked.append(_Prompt(question.prompt, fact.role, question.template))
    if not any(prompt.group == "retain" for prompt in asked):
        raise NotEnoughDataError(
            "got facts of which none of the forgotten relations is to be kept; give some the role 'retain'."
        )
    return asked


def _encoded(model: nn.Module, tokenizer: Any, prompts: Sequence[_Prompt], batch_tokens: int) -> Batches:
    """Return the prompts as batches; z is the group, and the first token of a prompt never counts."""
    longest = longest_text(model)
    special = set(getattr(tokenizer, "all_special_ids", ()))
    found = []
    for owner, prompt in enumerate(prompts):
        ids = list(tokenizer(prompt.text)["input_ids"])
        while ids and ids[-1] in special:  # the model reads the answer from the last token of the text
            ids.pop()
        if len(ids) < 2 or (longest is not None and len(ids) > longest):
            needed = "2 or more" if longest is None else f"2 to {longest}"
            raise InputError(f"the prompt {prompt.text[:60]!r} has {len(ids)} tokens; needed {needed}.")
        positions = [len(ids) - 1] if prompt.wording else list(range(1, len(ids)))
        found.append(Encoded(ids, positions, [_GROUPS.index(prompt.group)] * len(positions), owner))
    return batches(
        found, batch_tokens=batch_tokens, pad_id=pad_id_of(tokenizer), side="right", pooled=False, real=False
    )


def places_of(
    model: nn.Module,
    arch: Architecture,
    layers: Iterable[int] | None,
    writers: Sequence[Literal["mlp_out", "attn_out"]],
) -> list[Place]:
    """Return the weights of some blocks and writers in the order in which the model runs them.

    Raises:
        InputError: unknown layers or writers.
        UnsupportedModelError: a writer that is no single matrix, is quantised, replaced or offloaded.
    """
    if not writers or set(writers) - {"mlp_out", "attn_out"}:
        raise InputError(f"got writers={list(writers)}; needed mlp_out, attn_out or both.")
    chosen = list(default_layers(arch.n_layers) if layers is None else layers)
    if not chosen or not set(chosen) <= set(range(arch.n_layers)):
        raise InputError(f"got layers {chosen}; needed some of 0 to {arch.n_layers - 1}.")
    found = []
    for layer in sorted(set(chosen)):
        for kind in sorted(set(writers)):  # attention before the MLP
            part = arch.part(kind, layer)
            if not isinstance(part, Write) or len(part.writers) != 1 or not isinstance(part.writers[0], str):
                raise UnsupportedModelError(
                    f"{kind} of block {layer} of this {arch.model_type} model is not written by one matrix (experts, or "
                    "no such sublayer); choose other layers or writers."
                )
            found.append(_place(model, arch, layer, kind, part))
    return found


def _place(
    model: nn.Module, arch: Architecture, layer: int, kind: Literal["mlp_out", "attn_out"], part: Write
) -> Place:
    (weight,) = part.writers
    assert isinstance(weight, str)
    base = f"{arch.block(layer)}."
    config: Any = model.config
    d: int = getattr(config, "hidden_size", None) or config.get_text_config().hidden_size
    # There the output of the block moves by what the module's output moves by.
    whole = kind == "mlp_out" and part.norm is None and not arch.family.post_layernorm
    whole = whole and arch.family.residual_scale is None
    site = arch.sites("resid_post", layers=[layer])[0] if whole else Site(f"{base}{weight}")
    matrix = linear(model, arch, base, weight, d, "out")
    return Place(layer, kind, matrix, Site(f"{base}{weight}", "input"), site)


@dataclass(frozen=True, slots=True, eq=False)
class _Solver:
    """Rows at one weight -> its edit."""

    prompts: Sequence[_Prompt]
    target: str | Target
    strength: float
    seed: int
    settings: Mapping[str, Any]

    def __call__(self, weight: Tensor, rows: Sequence[_Rows]) -> Edit:
        keys, outputs, wordings = self._of(rows, "forget")
        kept, text = self._of(rows, "retain"), self._of(rows, "text")
        near = self._of(rows, "neighbour")
        source = self._of(rows, "decoy") if self.target == "mean_decoy" else kept if len(kept[0]) else text
        target, z = wanted(self.target, (outputs, wordings), source[1:], self.seed)
        # Three parts facts and one part texts, whatever their numbers.
        shares = [
            (k.new_full((len(k),), share / len(k))) for k, share in ((kept[0], 3.0), (text[0], 1.0)) if len(k)
        ]
        retain = Moments.of(
            torch.cat([kept[0], text[0]]), torch.cat([kept[1], text[1]]), weight=torch.cat(shares)
        )
        edit = ridge_edit(
            weight,
            Moments.of(keys, z),
            retain,
            target=target,
            neighbour=Moments.of(*near[:2]) if len(near[0]) else None,
            **self.settings,
        )
        # The solution is linear in what is wanted.
        return Edit(self.strength * edit.left, edit.right, f"{edit.rule}, strength={self.strength:g}")

    def _of(self, rows: Sequence[_Rows], group: _Group) -> tuple[Tensor, Tensor, list[str]]:
        """Return keys, outputs and wordings of a group, float64 on the host."""
        keys, outputs, wordings = [], [], []
        for part in rows:
            mine = (part.group == _GROUPS.index(group)).cpu()
            keys.append(part.keys.to("cpu", torch.float64)[mine])
            outputs.append(part.outputs.to("cpu", torch.float64)[mine])
            wordings += [self.prompts[i].wording for i in part.owner.cpu()[mine].tolist()]
        return torch.cat(keys), torch.cat(outputs), wordings


def check_target(target: object) -> None:
    """Refuse what is neither one of ``TARGETS`` nor a target.

    Raises:
        InputError: it is neither.
    """
    if not isinstance(target, Target) and target not in TARGETS:
        raise InputError(
            f"got target={target!r}; needed one of {', '.join(TARGETS)}, or a solvers.targets.Target."
        )


Outputs: TypeAlias = tuple[Tensor, Sequence[str]]
"""What is written at some positions, ``[n, d]`` float64, and the wording of each."""


def wanted(target: str | Target, forget: Outputs, others: Outputs, seed: int = 0) -> tuple[Target, Tensor]:
    """Return a target, and what it is to see as z at the forget positions.

    Args:
        target: one of ``TARGETS``, or a target, which sees the outputs.
        forget: at the forget positions.
        others: at those whose mean is wanted: of decoys for ``mean_decoy``, else of retain.
        seed: of a random direction.
    """
    outputs, wordings = forget
    if isinstance(target, Target):
        return target, outputs
    if target == "zero":
        return targets.zero(), outputs
    if target == "rmu":
        return targets.rmu(targets.rmu_directions(outputs.shape[1], 1, seed)[0]), outputs
    if target == "redirect":
        return targets.redirect(others[0].mean(0) - outputs.mean(0)), outputs
    away = _per_wording(*others, wordings) - outputs
    return Target(target.replace("_", " of "), lambda weight, forget, retain: forget), away


def _per_wording(outputs: Tensor, wordings: Sequence[str], asked: Sequence[str]) -> Tensor:
    """Return for each wanted wording the mean output in it; where it has none, the mean of all."""
    index: dict[str, list[int]] = {}
    for i, wording in enumerate(wordings):
        index.setdefault(wording, []).append(i)
    overall = outputs.mean(0)
    means = {wording: outputs[rows].mean(0) for wording, rows in index.items()}
    return torch.stack([means.get(wording, overall) for wording in asked])
