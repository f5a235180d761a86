"""Reports: a summary and its frames in; report.md and report.html out, two renderings of the same blocks."""

from moediag.report.comparison_page import comparison_page
from moediag.report.decode import TokenTexts, token_texts
from moediag.report.html import html_page
from moediag.report.markdown import markdown_page
from moediag.report.pairs import main_pair_name, observed_pair_name, replay_pair_name
from moediag.report.run_page import run_page

__all__ = [
    "TokenTexts",
    "comparison_page",
    "html_page",
    "main_pair_name",
    "markdown_page",
    "observed_pair_name",
    "replay_pair_name",
    "run_page",
    "token_texts",
]
