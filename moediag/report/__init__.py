"""Reports: a summary and its frames in; report.md and report.html out, two renderings of the same blocks."""

from moediag.report.comparison_page import comparison_page
from moediag.report.decode import TokenTexts, token_texts
from moediag.report.html import html_page
from moediag.report.markdown import markdown_page
from moediag.report.run_page import run_page

__all__ = [
    "TokenTexts",
    "comparison_page",
    "html_page",
    "markdown_page",
    "run_page",
    "token_texts",
]
