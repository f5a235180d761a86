"""reports/rules.md says what the rules do, of a planted fault and without it."""

from __future__ import annotations

import re
from pathlib import Path

from conftest import REPOSITORY
from rule_tables import rule_examples, rules_text

from moediag.hygiene.rules import DIAGNOSIS, RULES

TEXT = (REPOSITORY / "reports" / "rules.md").read_text()
NO_EXAMPLE = {"D14-other-rule"}
"""What needs an engine whose router breaks its rule."""


def test_the_page_is_what_the_rules_say(tmp_path: Path) -> None:
    """Written anew by ``python tests/rule_tables.py``."""
    assert f"<!-- table: rules -->\n\n{rules_text(tmp_path)}\n\n<!-- end of table -->" in TEXT


def test_every_report_from_the_field_has_its_tests() -> None:
    rows = re.findall(r"^\|.*\| ((?:`test_\w+`(?:, )?)+) \|$", TEXT, re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"\w+", row)}
    there = {name for path in Path(__file__).parent.glob("test_*.py")
             for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)}  # fmt: skip
    assert len(rows) > 20
    assert named <= there


def test_every_rule_fires_on_its_fault_and_not_without_it(tmp_path: Path) -> None:
    examples = rule_examples(tmp_path)
    assert {rule.name for rule in RULES.values() if rule.needs != DIAGNOSIS} - {*examples} == NO_EXAMPLE
    for name, (of_fault, of_clean) in examples.items():
        assert name in {found.rule for found in of_fault}
        assert name not in {found.rule for found in of_clean}
        assert {found.level for found in of_clean} <= {"note"}
