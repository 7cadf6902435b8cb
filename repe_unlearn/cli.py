"""Command line: thin over the Python API."""

from __future__ import annotations

import shlex
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer
from rich.console import Console
from rich.table import Table

from .errors import InputError, NumericalWarning, OutputExistsError, RepeUnlearnError
from .sites import Site

if TYPE_CHECKING:
    from torch import nn

    from .patch import Patch
    from .plan import ErasurePlan

app = typer.Typer(
    name="repe-unlearn",
    help="Make a model stop representing something: capture, solve in closed form, hook or bake, verify, export.\n\n"
    "[bold]One job, step by step[/]\n\n"
    "repe-unlearn fit smollm2-135m plan.safetensors --contrast gender\n\n"
    "repe-unlearn bake smollm2-135m plan.safetensors --out patch.safetensors\n\n"
    "repe-unlearn export smollm2-135m patch.safetensors --checkpoint edited-model\n\n"
    "repe-unlearn verify smollm2-135m plan.safetensors --exported edited-model --out report\n\n"
    "Exit codes: 0 done, 1 an error (one line says what to do), 2 wrong usage, 3 a check of the report failed.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
)
# A pipe has no width of its own; 80 columns would fold every name.
console = Console(width=None if sys.stdout.isatty() else 120)
complaints = Console(stderr=True)

T = TypeVar("T")
_FEW = 100  # held-out prompts: from here on 95 % of the draws of a fair coin lie within 0.1 of a half
_SOLVERS = ("leace", "mean_difference", "pca", "random")

Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="smollm2-135m (built in), a folder, a .gguf file, or a hub name."),
]
ConceptOption = Annotated[
    str,
    typer.Option(
        "--contrast",
        "-c",
        help="Labelled prompts: 'gender' or 'tense' (built in), or a .jsonl/.csv file with the columns text and label (and "
        "optionally group, template, pair), or positive and negative.",
    ),
]
PairsOption = Annotated[
    int, typer.Option(help="Pairs to fit on (built-in sets are generated to that size).", min=2)
]
SeedOption = Annotated[int, typer.Option(help="Seed of prompts, splits and controls.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace what exists at the output path.")]
AllowOption = Annotated[
    str,
    typer.Option(
        help="Weakest exactness accepted when a plan is baked: exact, erasure-exact (post-norm families) or approximate."
    ),
]
TiedOption = Annotated[
    str,
    typer.Option(
        help="Tied embedding and head, when a plan edits one of them: untie, adapter (for --lora) or skip (neither is edited)."
    ),
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")]


@contextmanager
def _errors() -> Iterator[None]:
    """One clear line for an error that the package raises on purpose; Ctrl-C is not a traceback either."""
    try:
        yield
    except (RepeUnlearnError, OSError) as error:
        complaints.print(
            f"[bold red]error:[/] {_escape(' '.join([str(error), *getattr(error, '__notes__', [])]))}",
            soft_wrap=True,
        )
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        complaints.print("interrupted; nothing half-written was left behind")
        raise typer.Exit(130) from None


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _show_warning(message: Warning | str, category: type[Warning], *_: object) -> None:
    complaints.print(f"[yellow]warning:[/] {_escape(str(message))}", soft_wrap=True)


def _show_version(wanted: bool) -> None:
    if wanted:
        from . import __version__

        console.print(f"repe-unlearn {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[  # its callback does the work
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    """Set up messages for every command."""
    import logging
    import os

    # Progress and warnings come from this package; transformers' own bars and advice only get in between.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.simplefilter("default", NumericalWarning)
    warnings.showwarning = _show_warning  # type: ignore[assignment]  # same call, fewer words


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for plan, patch, patched model and report.")] = Path(
        "demo-out"
    ),
    concept: Annotated[str, typer.Option(help="gender or tense.")] = "gender",
    model: Annotated[str, typer.Option(help="Model, see 'info'.")] = "smollm2-135m",
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer prompts, every fifth layer; numbers are rougher.")
    ] = False,
    seed: SeedOption = 0,
    force: ForceOption = False,
    quiet: QuietOption = False,
) -> None:
    """Run the main job on a real model: fit, hook, bake, export, verify, report.

    Erases a concept at every norm output (60 sites of SmolLM2-135M).

    Writes a patched checkpoint that plain transformers loads, and an HTML report on what was removed and what it cost.

    Takes about five minutes on two cores, --quick about 90 seconds.
    """
    from .demo import FULL, QUICK
    from .demo import demo as run

    with _errors():
        outcome = run(
            out,
            concept=concept,
            model=model,
            size=QUICK if quick else FULL,
            force=force,
            seed=seed,
            progress=not quiet,
            say=lambda line: console.print(_escape(line), highlight=False),
        )
    console.print(outcome.report.table())
    for when, text in outcome.continuations.items():
        console.print(f"[dim]{when}:[/] {_escape(text)}")
    total = sum(outcome.seconds.values())
    console.print(f"\n[bold]{_escape(outcome.report.verdict)}[/]")
    console.print(f"{total:.0f} s, peak memory {outcome.peak_bytes / 2**30:.1f} GiB")
    _written("report", outcome.folder / "report.html")
    _written("patched model", outcome.folder / "model")
    _exit(outcome.report.passed)


@app.command()
def info(model: Model = "smollm2-135m", quiet: QuietOption = False) -> None:
    """Show what can be done with a model, and what it takes.

    Sites, and how exactly an eraser at each kind of site can be baked; weights that a closed-form edit can reach; tied
    embeddings and experts; time and memory, from a short forward pass and the sizes of the weights.
    """
    from .architectures import Architecture
    from .folding import exactness
    from .models import load
    from .survey import costs, experts, speed, weight_bytes, width, writers

    with _errors():
        loaded = load(model, progress=not quiet)
        network = loaded.model
        arch = Architecture.of(network)
        parameters = sum(p.numel() for p in network.parameters())
        stacks = experts(network)
        facts = Table(show_header=False, box=None)
        for name, value in {
            "model": f"{type(network).__name__} ({arch.model_type})",
            "source": str(loaded.source),
            "fingerprint": loaded.fingerprint,
            "layers": str(arch.n_layers),
            "width": str(width(network)),
            "parameters": f"{parameters / 1e6:.1f} M, {str(network.dtype).removeprefix('torch.')}",
            "weights": _bytes(weight_bytes(network)),
            "tied embeddings": str(bool(network.config.tie_word_embeddings)),
            "experts": f"{max(stacks.values())} in each of {len(stacks)} blocks" if stacks else "none",
        }.items():
            facts.add_row(f"[bold]{name}[/]", _escape(value))
        table = Table(title="sites")
        for column in ("kind", "number", "first", "affine eraser", "linear eraser"):
            table.add_column(column, overflow="fold")
        for kind, rows in exactness(network).items():
            # The stream is no kind of site: its plan starts after the embeddings and goes through all writers.
            sites = arch.sites("resid_pre", layers=[0]) if kind == "stream" else arch.sites(kind)  # type: ignore[arg-type]  # of this model
            count = "all" if kind == "stream" else str(len(sites))
            table.add_row(kind, count, str(sites[0]), rows["affine"], rows["linear"])
        edits = Table(title="weights that closed_form can edit")
        for column in ("writers", "blocks", "inputs", "why not the others"):
            edits.add_column(column, overflow="fold")
        for kind, found in writers(network).items():
            why = next(iter(found.refused.values()), "")
            edits.add_row(
                kind, f"{len(found.layers)} of {arch.n_layers}", str(found.width or "–"), _escape(why)
            )
        took = Table(title="estimates for 1,000 tokens on this machine")
        for column in ("step", "time", "memory beyond the weights"):
            took.add_column(column, overflow="fold")
        for cost in costs(network, speed(network)):
            seconds = "not measured" if cost.seconds != cost.seconds else f"{cost.seconds:.2g} s"
            took.add_row(cost.step, seconds, _bytes(cost.bytes))
    for part in (facts, table, edits, took):
        console.print(part)


def _bytes(number: float) -> str:
    return f"{number / 2**30:.1f} GiB" if number >= 2**30 else f"{number / 2**20:.1f} MiB"


@app.command()
def discover(model: Model, quiet: QuietOption = False) -> None:
    """Find by experiment how a model without a row is built, and print the row to add to families.py."""
    from . import discovery
    from .models import load

    with _errors():
        found = discovery.discover(load(model, dtype="float32", progress=not quiet).model)
    for line in (*(f"# {note}" for note in found.notes), *found.text.rstrip().splitlines()):
        console.print(_escape(line), soft_wrap=True, highlight=False)


@app.command()
def fit(
    model: Model,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Plan file to write (.safetensors).")],
    contrast: ConceptOption = "gender",
    pairs: PairsOption = 900,
    sites: Annotated[
        str,
        typer.Option(
            help="Site kinds, comma-separated: attn_in, mlp_in, attn_out, mlp_out, resid_pre, resid_post, final; "
            "reads: all that the layers of this family read."
        ),
    ] = "reads",
    layers: Annotated[str, typer.Option(help="Layers, e.g. '0-9,20' (default all).")] = "",
    solver: Annotated[str, typer.Option(help=f"One of {', '.join(_SOLVERS)}.")] = "leace",
    linear: Annotated[
        bool,
        typer.Option("--linear", help="Erasers without a constant, for families that have no bias slot."),
    ] = False,
    select: Annotated[
        str,
        typer.Option(
            help="Tokens: last, mean, all, word, words, after_prompt; options ',sinks=N' ',specials'."
        ),
    ] = "mean",
    test: Annotated[
        float, typer.Option(help="Share of the data that is held out, content and wording.")
    ] = 0.25,
    independent: Annotated[
        bool,
        typer.Option("--independent", help="Fit every site on the untouched model instead of in sequence."),
    ] = False,
    memory: Annotated[
        str,
        typer.Option(
            help="Most activations that wait in memory during a fit in sequence; more waits in files."
        ),
    ] = "4GiB",
    scratch: Annotated[Path | None, typer.Option(help="Folder for those files.")] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            help="File in which --independent keeps its state, and from which it goes on after an interruption."
        ),
    ] = None,
    seed: SeedOption = 0,
    force: ForceOption = False,
    quiet: QuietOption = False,
) -> None:
    """Fit erasers on labelled prompts and write a plan.

    The prompts are split first; the held-out part is for 'verify', which finds the same split from the plan.

    Started with 'torchrun -m repe_unlearn fit ...' the processes share the prompts; the first one writes.
    """
    from .ranks import process_group

    with _errors(), process_group() as rank:
        _refuse_taken(out, force)
        from . import solvers
        from .activations import capture
        from .architectures import Architecture
        from .models import load
        from .plan import solve
        from .recipe import Recipe
        from .sequential import fit_sequential

        if solver not in _SOLVERS:
            raise InputError(f"got solver {solver!r}; needed one of {', '.join(_SOLVERS)}.")
        if resume is not None and not independent:
            raise InputError("--resume needs --independent: a fit in sequence keeps all prompts in flight.")
        quiet = quiet or rank > 0
        method = getattr(solvers, solver)
        chosen = partial(method, affine=False) if linear else method
        chosen_layers = _layers(layers)
        recipe = Recipe(contrast, pairs, test, seed)
        fitting, heldout = recipe.split()
        loaded = load(model, progress=not quiet)
        arch = Architecture.of(loaded.model)
        kinds = arch.reads if sites == "reads" else sites.replace(" ", "").split(",")
        where = arch.sites(*kinds, layers=chosen_layers)  # type: ignore[arg-type]  # sites() checks the kinds
        options = {"select": select, "progress": not quiet}
        if independent:
            moments = capture(loaded.model, loaded.tokenizer, fitting, where, resume=resume, **options)
            facts = {
                "concept": fitting.name,
                "prompts": str(len(fitting)),
                "select": select,
                "fit": "independent",
                **recipe.record(fitting),
            }
            plan = solve(moments, chosen, fingerprint=loaded.fingerprint, provenance=facts)
        else:
            plan = fit_sequential(
                loaded.model,
                loaded.tokenizer,
                fitting,
                where,
                chosen,
                provenance=recipe.record(fitting),
                memory=memory,
                scratch=scratch,
                **options,
            )
        if rank == 0:
            plan.save(out, force=force)
            console.print(_escape(repr(plan)))
            console.print(
                f"{len(fitting)} prompts to fit on, {len(heldout)} held out for verify", highlight=False
            )
            _written("written", out)


@app.command()
def bake(
    model: Model,
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="Plan file from 'fit'.")],
    out: Annotated[
        Path | None, typer.Argument(metavar="[OUT]", help="Patch file to write (.safetensors).")
    ] = None,
    out_option: Annotated[Path | None, typer.Option("--out", help="The same, as an option.")] = None,
    allow: AllowOption = "exact",
    tied: TiedOption = "untie",
    force: ForceOption = False,
    quiet: QuietOption = False,
) -> None:
    """Turn a plan into weight edits and write them as a patch; the model is not changed.

    Prints how exactly each class of sites was baked, how many of which weights are edited, and the largest edits.
    """
    (target,) = _given({"OUT": out, "--out": out_option}, most=1)
    with _errors():
        _refuse_taken(target, force)
        from .models import load
        from .plan import ErasurePlan

        erasers = ErasurePlan.load(plan)
        loaded = load(model, progress=not quiet)
        patch = _baked(loaded.model, erasers, allow, tied)
        patch.save(target, force=force)
        _print_baked(loaded.model, patch)
        table = Table(title="largest edits")
        for column in ("tensor", "rank", "norm", "relative"):
            table.add_column(column)
        rows = sorted(patch.report(loaded.model), key=lambda row: -row.norm)[:8]
        for row in rows:
            table.add_row(
                row.name,
                str(row.rank or "dense"),
                f"{row.norm:.3g}",
                "new" if row.relative != row.relative else f"{row.relative:.2%}",
            )
    console.print(table)
    console.print(_escape(repr(patch)))
    _written("written", target)


@app.command()
def export(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="As elsewhere; for a checkpoint from a patch also a URL (s3://, memory:// ...).",
        ),
    ],
    edits: Annotated[
        Path,
        typer.Argument(
            metavar="PATCH|PLAN", help="Patch file from 'bake', or plan file, which is baked first."
        ),
    ],
    out: Annotated[str | None, typer.Argument(metavar="[OUT]", help="Short for --checkpoint OUT.")] = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(
            help="Folder or URL to write a patched copy of the weights to; plain transformers, vLLM "
            "and convert_hf_to_gguf.py load it."
        ),
    ] = None,
    lora: Annotated[
        Path | None, typer.Option(help="Folder to write a LoRA adapter to, for PEFT, vLLM and llama.cpp.")
    ] = None,
    gguf: Annotated[
        Path | None, typer.Option(help="GGUF file to write, for llama.cpp: a copy of that of MODEL, edited.")
    ] = None,
    gguf_source: Annotated[
        Path | None, typer.Option(help="GGUF file to copy for --gguf where MODEL is none itself.")
    ] = None,
    torch_file: Annotated[
        Path | None,
        typer.Option(
            "--torch", help="File to write for torch.export.load; from a plan, with erasers inside."
        ),
    ] = None,
    requantise: Annotated[
        str,
        typer.Option(
            help="Type for the edited tensors of a GGUF file that are packed, e.g. F16; default refuses them."
        ),
    ] = "",
    workers: Annotated[
        int | None,
        typer.Option(
            help="Files of a checkpoint that are written at a time; default one per processor, at most 4.",
            min=1,
        ),
    ] = None,
    allow: AllowOption = "exact",
    tied: TiedOption = "untie",
    force: ForceOption = False,
    quiet: QuietOption = False,
) -> None:
    """Write the edited model in one or several forms, each whole or not at all.

    A patch on a folder is written to a checkpoint tensor by tensor, without loading the model.
    """
    folders = [folder for folder in (out, checkpoint) if folder is not None]
    files = {"--lora": lora, "--gguf": gguf, "--torch": torch_file}
    targets = _given({"OUT": out, "--checkpoint": checkpoint, **files})
    with _errors():
        for target in targets:
            _refuse_taken(target, force)
        from .export.checkpoint import checkpoint as write_checkpoint
        from .export.gguf import gguf as write_gguf
        from .export.lora import lora as write_lora
        from .export.places import RemotePath, place
        from .export.torch_program import torch_program
        from .models import load, locate
        from .patch import Patch
        from .plan import ErasurePlan
        from .tensorfile import kind_of

        is_plan = kind_of(edits, among=("patch", "erasure plan")) == "erasure plan"
        if torch_file and not is_plan:
            raise InputError(
                f"got the patch {edits} for --torch, which holds erasers; give the plan instead."
            )
        source = place(model) if "://" in model else None
        # Adapters and GGUF files are held against the model; a checkpoint is held against its own files.
        needed = ["a plan"] if is_plan else [option for option, path in files.items() if path]
        if isinstance(source, RemotePath) and needed:
            raise InputError(
                f"got {model}, but {needed[0]} needs the model in memory; copy the folder to a disk."
            )
        model = model if source is None else str(source)
        if gguf:
            gguf_source = gguf_source or _own_gguf(model)
        given = ErasurePlan.load(edits) if is_plan else Patch.load(edits)
        loaded = load(model, progress=not quiet) if needed else None
        if isinstance(given, Patch):
            patch = given
        elif folders or lora or gguf:
            assert loaded is not None
            patch = _baked(loaded.model, given, allow, tied)
            _print_baked(loaded.model, patch)
        else:
            patch = None
        if patch is not None and folders:
            start = loaded.source if loaded else model if source else locate(model, progress=not quiet)
            for folder in folders:
                done = write_checkpoint(
                    start, patch, folder, force=force, workers=workers, progress=not quiet
                )
                _written("written", done)
        if loaded and patch and lora:
            _written("written", write_lora(loaded.model, patch, lora, base=model, force=force))
        if loaded and patch and gguf and gguf_source:
            packed = requantise or False
            _written(
                "written",
                write_gguf(gguf_source, patch, gguf, requantise=packed, model=loaded.model, force=force),
            )
        if loaded and isinstance(given, ErasurePlan) and torch_file:
            _written("written", torch_program(loaded.model, given, torch_file, force=force))


@app.command()
def diff(
    base: Annotated[str, typer.Argument(metavar="BASE", help="Folder or URL of the original model.")],
    edited: Annotated[
        str,
        typer.Argument(
            metavar="EDITED", help="Folder or URL of the same model after any edit of its weights."
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(help="Patch file to write: 'export BASE PATCH' makes EDITED again.")
    ] = None,
    keep_originals: Annotated[
        Path | None,
        typer.Option(help="File to write the replaced tensors to, from which 'revert' restores every bit."),
    ] = None,
    bitwise: Annotated[
        bool, typer.Option("--bitwise", help="Store dense what low rank would miss by a rounding step.")
    ] = False,
    max_rank: Annotated[int, typer.Option(help="Larger ranks are stored dense.", min=1)] = 64,
    force: ForceOption = False,
    quiet: QuietOption = False,
) -> None:
    """Show which tensors of two checkpoints differ, by which rank and how much; neither model is loaded."""
    with _errors():
        for target in filter(None, (out, keep_originals)):
            _refuse_taken(target, force)
        from . import difference, undo

        patch = difference.diff(base, edited, max_rank=max_rank, bitwise=bitwise, progress=not quiet)
        table = Table(title="differences")
        for column in ("tensor", "edit", "norm", "relative"):
            table.add_column(column, overflow="fold")
        for name, size in difference.norms(base, patch).items():
            edit = patch.edits[name]
            relative = f"{edit.norm() / size:.2%}" if size else "new"
            table.add_row(
                _escape(name), edit.rule.removeprefix("difference: "), f"{edit.norm():.3g}", relative
            )
        if out is not None:
            patch.save(out, force=force)
        if keep_originals is not None:
            undo.keep_originals(base, edited, keep_originals, force=force)
    console.print(table)
    console.print(f"{_escape(repr(patch))}; reproduces {patch.provenance['reproduces']}")
    if patch.tied:
        console.print(f"{patch.tied[1]} is untied from {patch.tied[0]}")
    for key, value in patch.config_updates.items():
        console.print(_escape(f"config: {key} = {value}"))
    for target in filter(None, (out, keep_originals)):
        _written("written", target)


@app.command()
def revert(
    edited: Annotated[Path, typer.Argument(metavar="EDITED", help="Patched folder.")],
    originals: Annotated[
        Path, typer.Argument(metavar="ORIGINALS", help="File from 'diff --keep-originals'.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")],
    force: ForceOption = False,
) -> None:
    """Bring a patched checkpoint back to its original bits, every tensor checked by its hash.

    A patch alone cannot do this: subtracting it leaves the rounding of both casts. So the replaced tensors must
    have been kept, with 'diff BASE EDITED --keep-originals FILE'.
    """
    with _errors():
        _refuse_taken(out, force)
        from . import undo

        undo.revert(edited, originals, out, force=force)
    _written("written", out)


@app.command()
def verify(
    model: Model,
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="Plan file from 'fit'.")],
    out: Annotated[Path, typer.Option(help="Folder for report.html, report.md, report.json.")] = Path(
        "report"
    ),
    contrast: Annotated[
        str, typer.Option("--contrast", "-c", help="Labelled prompts; default those recorded in the plan.")
    ] = "",
    exported: Annotated[
        Path | None, typer.Option(help="Exported folder to check against the baked weights.")
    ] = None,
    prompts: Annotated[
        int, typer.Option(help="Most fitting and most held-out prompts for the probes.", min=48)
    ] = 560,
    seed: SeedOption = 0,
    force: ForceOption = False,
    quiet: QuietOption = False,
) -> None:
    """Measure on held-out prompts what a plan removes, what it costs, and that hook, bake and export agree.

    Exit code 3 if a check fails.
    """
    with _errors():
        from .audit.report import FILES
        from .audit.writing import refuse_taken

        refuse_taken(out, FILES, force=force)
        from .audit import verify as run
        from .models import load
        from .plan import ErasurePlan
        from .recipe import Recipe

        erasers = ErasurePlan.load(plan)
        fitting, heldout = Recipe.prompts_of(erasers.provenance, contrast or None)
        _warn_of_few(len(heldout))
        loaded = load(model, progress=not quiet)
        report = run(
            loaded.model,
            loaded.tokenizer,
            erasers,
            fit=fitting,
            heldout=heldout,
            exported=exported,
            probe_prompts=prompts,
            seed=seed,
            progress=not quiet,
        )
        command = shlex.join(
            ["repe-unlearn", "verify", model, str(plan), "--prompts", str(prompts), "--seed", str(seed)]
            + (["--contrast", contrast] if contrast else [])
            + (["--exported", str(exported)] if exported else [])
        )
        report = replace(report, facts={**report.facts, "command": command})
        page = report.save(out, force=force)
    console.print(report.table())
    console.print(f"\n[bold]{_escape(report.verdict)}[/]")
    _written("report", page)
    _exit(report.passed)


def _given(outputs: Mapping[str, T | None], most: int | None = None) -> list[T]:
    """Return the outputs that were named on the command line; wrong usage if there are none or too many."""
    given = [path for path in outputs.values() if path is not None]
    if not given or (most is not None and len(given) > most):
        needed = "at least 1" if most is None else str(most)
        raise typer.BadParameter(f"got {len(given)} outputs; needed {needed} of {', '.join(outputs)}.")
    return given


def _own_gguf(model: str) -> Path:
    """Return the GGUF file that a model on the command line comes from."""
    from .gguf_cache import builtin_gguf
    from .models import DEFAULT

    if model == DEFAULT:
        return builtin_gguf()[0]
    if Path(model).suffix.lower() != ".gguf":
        raise InputError(
            f"got --gguf for {model}, which is no GGUF file; add --gguf-source FILE, of the same model."
        )
    return Path(model)


def _baked(model: nn.Module, plan: ErasurePlan, allow: str, tied: str) -> Patch:
    from . import folding

    return folding.bake(model, plan, allow=allow, tied=tied)  # type: ignore[arg-type]  # bake() checks the values


def _print_baked(model: nn.Module, patch: Patch) -> None:
    """Print how exactly each class of sites was baked, and how many of which weights are edited."""
    from .architectures import Architecture

    table = Table(title="baked")
    for column in ("sites", "number", "class"):
        table.add_column(column)
    stacks = Architecture.all_of(model)
    classes: Counter[tuple[str, str]] = Counter()
    for site, exactness in patch.exactness.items():
        located = next(filter(None, (arch.locate(Site.parse(site)) for arch in stacks)), None)
        classes[located[0] if located else site, exactness] += 1
    for (kind, exactness), number in classes.items():
        table.add_row(_escape(kind), str(number), exactness)
    console.print(table)
    for fact in ("coverage", "skipped"):
        if fact in patch.provenance:
            console.print(f"{fact}: {_escape(patch.provenance[fact])}", soft_wrap=True)


def _refuse_taken(out: str | Path, force: bool) -> None:
    """Refuse an output that exists, before any work is done for it."""
    from .export.places import place

    if not force and place(out).exists():
        raise OutputExistsError(f"{out} exists; choose another path or pass --force.")


def _warn_of_few(heldout: int) -> None:
    """Warn where chance alone moves an accuracy by more than the bound of a probe allows."""
    if heldout < _FEW:
        complaints.print(
            f"[yellow]warning:[/] {heldout} held-out prompts: chance alone moves an accuracy by about ± "
            f"{heldout**-0.5:.2f}, so read the intervals of the report, not pass or fail. Use more prompts.",
            soft_wrap=True,
            highlight=False,
        )


def _written(what: str, path: str | Path) -> None:
    # On one line however long it is, so that it can be copied or cut out by a script.
    console.print(f"{what}: {_escape(str(path))}", soft_wrap=True, highlight=False)


def _exit(passed: bool) -> None:
    if not passed:
        raise typer.Exit(3)


def _layers(text: str) -> list[int] | None:
    if not text:
        return None
    chosen: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not first.isdecimal() or (dash and (not last.isdecimal() or int(last) < int(first))):
            raise InputError(f"got layers {text!r}; needed numbers and ranges such as '0-9,20'.")
        chosen += range(int(first), int(last if dash else first) + 1)
    return chosen


# Commands with files of their own; at the end, because they use what is above.
from . import cli_audit as _cli_audit  # noqa: E402, F401
from . import cli_compare as _cli_compare  # noqa: E402, F401
from . import cli_localize as _cli_localize  # noqa: E402, F401
from . import cli_unlearn as _cli_unlearn  # noqa: E402, F401

if __name__ == "__main__":
    sys.exit(app())
