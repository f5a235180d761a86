"""reports/corrections.md says what the code does."""

from __future__ import annotations

import re

from conftest import REPOSITORY
from correction_tables import correction_tables

from moediag.corrections import METHODS, PRESETS, parse_correction

TEXT = (REPOSITORY / "reports" / "corrections.md").read_text()


def test_tables_are_those_of_the_code() -> None:
    """Written anew by ``python tests/correction_tables.py``."""
    for name, table in correction_tables().items():
        assert f"<!-- table: {name} -->\n\n{table}\n\n<!-- end of table -->" in TEXT
    assert all(f"| `{name}`" in TEXT for name in (*METHODS, *PRESETS))


def test_corrections_named_in_the_text_can_be_read() -> None:
    words = set(re.findall(r"`([a-z_0-9]+:[a-z_]+=[^`]+)`", TEXT))
    assert len(words) > 20
    for each in words:
        assert parse_correction(each)


def test_every_framework_of_the_presets_has_a_source() -> None:
    groups = {preset.group for preset in PRESETS.values()}
    assert {"verl", "trl", "openrlhf", "slime", "nemo-rl", "prime-rl", "areal", "skyrl"} <= groups
    assert {"ring-1t", "glm-5", "intellect-3", "tis", "mis", "dppo", "kpop", "trm"} <= groups
    assert all(preset.source for preset in PRESETS.values())
