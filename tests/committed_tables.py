"""Tables of the pages under reports/ that commands under benchmarks/ measure: each stands between two comments.

What takes too long for every run of the suite is measured by such a command, which checks its claims as well and ends
with exit code 1 where one does not hold; the tests read the table that was committed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd

REPORTS = Path(__file__).parent.parent / "reports"


def _between(name: str) -> re.Pattern[str]:
    return re.compile(rf"(?<=<!-- table: {re.escape(name)} -->\n)\n.*?(?=<!-- end of table -->)", re.DOTALL)


def markdown(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A markdown table."""
    lines = [header, [":--"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, cells)) + " |" for cells in lines)


def commit_table(page: str, name: str, table: str) -> None:
    """Put the table in the place of the one that the page has under this name."""
    path = REPORTS / page
    text, n_places = _between(name).subn(lambda _: f"\n{table}\n\n", path.read_text())
    assert n_places == 1, f"{path} has {n_places} places for the table {name}"
    path.write_text(text)


def committed_table(page: str, name: str) -> pd.DataFrame:
    """The cells of the table as they stand there."""
    found = _between(name).findall((REPORTS / page).read_text())
    assert len(found) == 1, f"{page} has {len(found)} places for the table {name}"
    header, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in found[0].strip().splitlines())
    return pd.DataFrame(rows, columns=header)
