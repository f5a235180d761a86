"""The report of a run: figures, report.md and report.html, made from what an analysis wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from moediag.errors import RunError
from moediag.figures import draw_run_figures
from moediag.figures.floors import summary_floors
from moediag.figures.style import formats
from moediag.folder import PAGES, made_together, refuse_read_only
from moediag.report import html_page, markdown_page, run_page, token_texts
from moediag.report.blocks import Page
from moediag.results.load import analyze_again, load_summary, main_frames, shell_command
from moediag.run.derived import FIGURES
from moediag.run.files import write_atomic
from moediag.run.reader import Run


def report_run(
    run: Run,
    training_window: int | None = None,
    tokenizer: Path | None = None,
    no_text: bool = False,
    pdf: bool = False,
) -> Path:
    """Draw the figures and write report.md and report.html; returns the path of report.md.

    Args:
        training_window: length the model was trained on [tokens], marked in the drift figure.
        tokenizer: ``tokenizer.json`` or its folder, to show tokens as text; None = the checkpoint's, if at hand.
        no_text: keep tokens and the text around them out of the pages.
        pdf: figures as PDF, too.

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
    commands = shell_command("analyze", run.path, *analysed), shell_command("report", run.path, *options)
    texts = token_texts(run, frames.get("worst_tokens"), tokenizer, no_text or is_withheld)
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
        write_pages(made, run_page(summary, frames, figures, regenerate=commands, texts=texts))
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
