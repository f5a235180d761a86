"""report.html: a page as one self-contained file, for a browser without a network and, if need be, without scripts.

Invariants:
    - nothing is loaded: style, script and pictures are inside, and a Content-Security-Policy forbids the rest. It names
      style and script by digest, so that nothing else that might get into the page would run;
    - every text goes through jinja2's autoescape or through :func:`moediag.report.text.to_html`, which escapes it;
    - the script sorts, filters, enlarges, opens what a link leads to and says a single token's numbers: without it
      every section opens by hand, and every number of every table is there.
"""

from __future__ import annotations

import base64
import hashlib
import struct
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from moediag.report.blocks import Block, Page, Picture
from moediag.report.text import to_html


def html_page(page: Page) -> str:
    """The page as HTML.

    Raises:
        OSError: a figure cannot be read.
    """
    style, script = _asset("page.css"), _asset("page.js")
    policy = "; ".join(
        (
            "default-src 'none'",
            "img-src data:",
            f"style-src '{_digest(style)}'",
            f"script-src '{_digest(script)}'",
            "base-uri 'none'",
            "form-action 'none'",
        )
    )
    context = {"page": page, "style": Markup(style), "script": Markup(script), "policy": policy}
    return _environment().get_template("page.html.j2").render(context)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("moediag", "report"),
        undefined=StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["inline"] = to_html
    environment.filters["kind"] = _kind
    environment.filters["png"] = _png
    return environment


def _kind(block: Block) -> str:
    return type(block).__name__.lower()


def _png(picture: Picture) -> dict[str, Any]:
    """A figure as a data URI with its size in pixels, so that the page does not jump while it is drawn."""
    data = picture.path.read_bytes()
    width, height = struct.unpack(">II", data[16:24])  # the IHDR chunk comes first
    return {"uri": f"data:image/png;base64,{base64.b64encode(data).decode()}", "width": width, "height": height}


@cache
def _asset(name: str) -> str:
    """Our own style or script; ``.j2`` only because that is what the package ships from this folder."""
    return files("moediag.report").joinpath(f"{name}.j2").read_text(encoding="utf-8").strip()


def _digest(text: str) -> str:
    """A source expression of a Content-Security-Policy."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
