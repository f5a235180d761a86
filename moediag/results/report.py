"""The report of a run: figures, report.md and report.html, made from what an analysis wrote."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from moediag.errors import RunError
from moediag.figures import draw_run_figures
from moediag.figures.floors import summary_floors
from moediag.figures.style import formats
from moediag.folder import PAGES, made_together, refuse_read_only
from moediag.report import html_page, markdown_page, run_page, token_texts
from moediag.report.blocks import Page
from moediag.report.token_view import choose_responses, read_responses, shown_positions, token_view
from moediag.results.load import analyze_again, load_summary, main_frames, shell_command
from moediag.run.derived import FIGURES
from moediag.run.files import write_atomic
from moediag.run.reader import Run
from moediag.run.store import known_as


def report_run(
    run: Run,
    training_window: int | None = None,
    tokenizer: Path | None = None,
    no_text: bool = False,
    pdf: bool = False,
    sequences: Sequence[int] = (),
) -> Path:
    """Draw the figures and write report.md and report.html; returns the path of report.md.

    Args:
        training_window: length the model was trained on [tokens], marked in the drift figure.
        tokenizer: ``tokenizer.json`` or its folder, to show tokens as text; None = the checkpoint's, if at hand.
        no_text: keep tokens and the text around them out of the pages.
        pdf: figures as PDF, too.
        sequences: responses to show token by token, by their seq_id, before the worst.

    Raises:
        RunError: the run is read-only.
    """
    refuse_read_only(run.path)
    summary = load_summary(run)
    is_withheld = bool(summary["provenance"].get("no_text"))
    if is_withheld and tokenizer is not None:
        raise RunError(f"{run.path} was analysed without text (--no-text): to show text, {analyze_again(run)}")
    frames = main_frames(run, summary)
    analysed = [*(["--no-text"] if is_withheld else []), *_force_option(summary)]
    options = [*window_option(training_window), *_text_options(tokenizer, no_text), *pdf_option(pdf)]
    options += [word for seq_id in sequences for word in ("--sequence", seq_id)]
    commands = shell_command("analyze", run.path, *analysed), shell_command("report", run.path, *options)
    read = read_responses(run, choose_responses(frames.get("sequences"), sequences))
    named = [frames["worst_tokens"][["seq_id", "position"]]] if "worst_tokens" in frames else []
    texts = token_texts(run, pd.concat([*named, shown_positions(read)]), tokenizer, no_text or is_withheld)
    tokens = token_view(read, run.pair(*run.main_arms).decoder_layer_L, texts)
    with made_together(run.path, FIGURES) as made:
        figures = draw_run_figures(
            frames,
            made / FIGURES,
            label_of(run),
            training_window=training_window,
            prompt_length=longest_prompt(run),
            floors=summary_floors(summary["floors"]),
            kinds=formats(pdf),
        )
        page = run_page(
            summary, frames, figures, regenerate=commands, texts=texts, run=known_as(run.path), tokens=tokens
        )
        write_pages(made, page)
    return run.path / PAGES[0]


def write_pages(folder: Path, page: Page) -> None:
    """report.md and report.html: the same page twice."""
    for name, render in zip(PAGES, (markdown_page, html_page), strict=True):
        write_atomic(folder / name, render(page).encode())


def window_option(training_window: int | None) -> list[object]:
    """The option of the training window as it was given."""
    return [] if training_window is None else ["--training-window", training_window]


def pdf_option(pdf: bool) -> list[object]:
    """The option of PDF figures as it was given."""
    return ["--pdf"] if pdf else []


def label_of(run: Run) -> str:
    """What a run is called on its pages: its folder's name."""
    return run.path.resolve().name


def longest_prompt(run: Run) -> int:
    """Length of the longest prompt [tokens]; 0 where no prompt is known."""
    if run.record.prompts is not None:
        return max(map(len, run.prompt_tokens()[0]))
    tables = map(run.tokens, run.shards)
    return max(int(np.max(rows.position_T[~rows.is_response_T], initial=-1)) + 1 for rows in tables)


def _text_options(tokenizer: Path | None, no_text: bool) -> list[object]:
    return [*(["--tokenizer", tokenizer] if tokenizer else []), *(["--no-text"] if no_text else [])]


def _force_option(summary: dict[str, Any]) -> list[object]:
    return ["--force"] if summary["provenance"]["validation_errors"] else []
