"""``moediag import FORMAT PATH...``: what a trainer or an engine wrote becomes a run, or a series of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moediag.cli import options as o

if TYPE_CHECKING:
    from moediag.run.reader import Run

NAME = "import"

Words = Annotated[
    list[str] | None,
    typer.Argument(metavar="FORMAT PATH...", help="A format (--list-formats), then files, folders or patterns."),
]
OutputFolder = Annotated[
    Path | None,
    typer.Option("-o", "--output", metavar="RUN|SERIES", help="Folder to make: a run, or a series.", callback=o.local),
]
Detect = Annotated[bool, typer.Option("--detect", help="Only say what the files at PATH... are.")]
ListFormats = Annotated[bool, typer.Option("--list-formats", help="Print the formats and exit.")]
NumExperts = Annotated[
    int | None, typer.Option("--num-experts", min=1, help="Experts per layer; default: largest id + 1.")
]
ZeroExperts = Annotated[
    int, typer.Option("--zero-experts", min=0, help="Experts behind these that compute nothing (zero_expert_num).")
]
NumLayers = Annotated[
    int | None, typer.Option("--num-layers", min=1, help="Decoder layers; default: as the dump or its ids tell.")
]
PipelineLayers = Annotated[
    str | None,
    typer.Option("--pipeline-layers", metavar="N,N,...", help="megatron: decoder layers of every pipeline stage."),
]
FirstRow = Annotated[int, typer.Option("--first-row", min=0, help="Position of the first routing row in its sequence.")]
SampledAt = Annotated[
    float | None, typer.Option("--temperature", min=0.0, help="Temperature that the tokens were sampled at.")
]
Mask = Annotated[str | None, typer.Option("--mask", metavar="COLUMN", help="Plain tables: the loss mask.")]
TokenizerFolder = Annotated[
    Path | None,
    typer.Option("--tokenizer", metavar="CKPT", help="Dumps of text: a checkpoint's folder, or its tokenizer.json."),
]
AsSeries = Annotated[bool, typer.Option("--series", help="Make a series even of one step, for further ones to join.")]
Replace = Annotated[bool, typer.Option("--force", help="Replace the run or series that is there.")]


def command(
    words: Words = None,
    output: OutputFolder = None,
    detect: Detect = False,
    list_formats: ListFormats = False,
    num_experts: NumExperts = None,
    zero_experts: ZeroExperts = 0,
    num_layers: NumLayers = None,
    first_row: FirstRow = 0,
    temperature: SampledAt = None,
    mask: Mask = None,
    tokens: o.TokensTable = None,
    pipeline_layers: PipelineLayers = None,
    tokenizer: TokenizerFolder = None,
    series: AsSeries = False,
    trust_pickle: o.TrustPickle = False,
    force: Replace = False,
    as_json: o.Json = False,
) -> None:
    """Make a run of a dump that another tool wrote; of several training steps, a series with a run each.

    Further steps join the series that is there. What a dump lacks is absent in the run. analyze, report, compare,
    simulate, trend and validate take the result as far as its arrays go, and capture adds arms of our own engines
    beside the dump's.
    """
    from moediag.cli.console import bar, say, say_json, wrote
    from moediag.importers.registry import IMPORTERS, detect_all, files_of, importer_of
    from moediag.importers.rollouts import Options
    from moediag.importers.write import import_dump
    from moediag.numbers import count

    if list_formats:
        for one in IMPORTERS.values():
            needs = f" (needs {', '.join(one.needs)})" if one.needs else ""
            say(f"{one.name}: {one.words}{needs}")
        return
    if not words:
        raise typer.BadParameter("give a format and files, or --list-formats", param_hint="FORMAT PATH...")
    if detect:
        found = {name: [str(path) for path in paths] for name, paths in detect_all(words).items()}
        if as_json:
            say_json({name or "unknown": paths for name, paths in found.items()})
            return
        for name, paths in found.items():
            more = f" and {len(paths) - 1:,} more" if len(paths) > 1 else ""
            say(f"{name or 'no known format'}: {paths[0]}{more}")
        return
    importer = importer_of(words[0])
    if output is None:
        raise typer.BadParameter("give a folder for the run or series", param_hint="-o")
    files = files_of(importer, words[1:])
    with bar(f"importing {importer.name}") as progress:
        options = Options(
            n_experts=num_experts, n_zero_experts=zero_experts, n_layers=num_layers, first_row=first_row,
            temperature=temperature, mask=mask, tokens=tokens, trust_pickle=trust_pickle, on_progress=progress.show,
            pipeline_layers=_whole_numbers(pipeline_layers),
            tokenizer=tokenizer.parent if tokenizer and tokenizer.is_file() else tokenizer,
        )  # fmt: skip
        runs = import_dump(importer, files, output, options, force, series)
    facts = [_facts(run) for run in runs]
    if as_json:
        say_json({"path": str(output), "format": importer.name, "runs": facts})
        return
    for made in facts:
        step = "" if made["step"] is None else f"step {made['step']}: "
        arms = "; ".join(f"{name} has {', '.join(arrays)}" for name, arrays in made["arms"].items())
        arms = arms or "tokens and no arm yet: moediag capture infer CKPT -o RUN, then capture train"
        say(f"{step}{count(made['n_sequences'], 'sequence')} in {count(made['n_shards'], 'shard')}; {arms}")
    for text in dict.fromkeys(text for made in facts for text in made["notes"]):
        say(f"note: {text}")
    wrote(output)


def _whole_numbers(text: str | None) -> tuple[int, ...]:
    """``16,16`` as numbers.

    Example:
        >>> _whole_numbers("16, 14"), _whole_numbers(None)
        ((16, 14), ())
    """
    parts = [part.strip() for part in text.split(",")] if text else []
    if not all(part.isdecimal() for part in parts):
        raise typer.BadParameter(f"expected whole numbers with commas between, found {text}")
    return tuple(map(int, parts))


def _facts(run: Run) -> dict[str, Any]:
    """What a run has, in plain types."""
    return {
        "path": str(run.path),
        "step": run.record.step,
        "n_sequences": run.n_sequences,
        "n_shards": len(run.shards),
        "arms": {name: list(run.arm(name).arrays) for name in run.arms()},
        "notes": run.notes,
    }
