"""The notebooks run, and their pages under reports/notebooks, which show on a code host what they showed here.

``python tests/executed_notebooks.py DEMO`` runs every notebook on the folder that ``make demo`` left and writes the
pages anew: what is printed as text, frames as tables, pictures as files beside the page.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import nbformat
from nbclient import NotebookClient

from moediag.figures import FIGURES, SIMULATION_FIGURES

REPOSITORY: Final = Path(__file__).parent.parent
NOTEBOOKS: Final = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))
PAGES: Final = REPOSITORY / "reports" / "notebooks"
DEMO: Final = "../moediag-demo"
"""The demo's folder, as the notebooks name it where no setting does."""


@dataclass(frozen=True)
class Cell:
    """A cell and what it left: printed text, and a picture or HTML."""

    kind: str
    source: str
    printed: str = ""
    value: bytes | str | None = None


def cells(path: Path, kind: str) -> list[str]:
    """Sources of the cells of a kind, ``markdown`` or ``code``."""
    return ["".join(cell["source"]) for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == kind]


def executed(path: Path) -> list[Cell]:
    """The cells of a notebook that a kernel ran from top to bottom, in the folder it is in."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": path.parent}})
    client.execute()
    return [Cell(cell.cell_type, cell.source, *_shown(cell.get("outputs", []))) for cell in notebook.cells]


def _shown(outputs: list[Any]) -> tuple[str, bytes | str | None]:
    printed = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    for data in (output.data for output in outputs if "data" in output):
        if "image/png" in data:
            return printed, base64.b64decode(data["image/png"])
        if "text/html" in data:
            return printed, str(data["text/html"])
    return printed, None


def write_page(name: str, ran: list[Cell], demo: Path, folder: Path) -> None:
    """Write NAME.md and its pictures into ``folder``.

    Args:
        name: of the notebook.
        ran: its cells.
        demo: the folder it ran on; on the page it is called as in the notebook.
        folder: of the pages.
    """
    source = f"../../notebooks/{name}.ipynb"
    parts = [f"*[notebooks/{name}.ipynb]({source}), run on the folder that `make demo` leaves.*"]
    for nth, cell in enumerate(ran):
        parts.append(cell.source if cell.kind == "markdown" else f"```python\n{cell.source}\n```")
        if cell.printed:
            parts.append(f"```text\n{cell.printed.rstrip()}\n```")
        if isinstance(cell.value, bytes):
            picture = folder / "figures" / f"{name}-{nth:02}.png"
            picture.parent.mkdir(parents=True, exist_ok=True)
            picture.write_bytes(cell.value)
            parts.append(f"![{_title(cell.source)}](figures/{picture.name})")
        elif cell.value:  # a code host shows the rules of a style as words
            parts.append(re.sub(r"<style.*?</style>|\n\s*(?=\n)", "", cell.value, flags=re.DOTALL).strip())
    page = "\n\n".join(parts).replace(str(demo), DEMO) + "\n"
    page = re.sub(r"[^\s\"<>(]*/(?=checkpoints/(?:moe|dense)\b)", f"{DEMO}/", page)  # where a run found its model
    (folder / f"{name}.md").write_text(page)


def _title(source: str) -> str:
    """What the picture of a cell shows."""
    found = re.search(r'plot\("(\w+)"\)', source)
    kind = (FIGURES | SIMULATION_FIGURES).get(found[1]) if found else None
    return kind.title.replace("[", "(").replace("]", ")") if kind else "figure"


def main(demo: Path) -> None:
    """Run every notebook on a demo and write all pages anew."""
    os.environ["MOEDIAG_DEMO"] = str(demo)
    os.environ.pop("MOEDIAG_RUN", None)
    ran = {path.stem: executed(path) for path in NOTEBOOKS}
    shutil.rmtree(PAGES, ignore_errors=True)
    PAGES.mkdir(parents=True)
    for name, of_name in ran.items():
        write_page(name, of_name, demo, PAGES)
        print(f"reports/notebooks/{name}.md")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
