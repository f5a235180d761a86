"""What a CI job shows of a gate: Markdown for its summary, JUnit XML for its list of tests."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from moediag.diagnosis.gate import Gate
from moediag.report.blocks import table
from moediag.report.text import Markdown, code, plain

_NOT_IN_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def gate_markdown(gate: Gate) -> str:
    """A table of the conditions, then the verdict."""
    rows = [
        [code(one.condition), Markdown("pass" if one.is_met else "**FAIL**"), one.value, one.n, one.limit, one.note]
        for one in gate.outcomes
    ]
    against = f" against {plain(gate.baseline)}" if gate.baseline else ""
    state = "passed" if gate.is_passed else f"{len(gate.failed)} of {len(gate.outcomes)} conditions not met"
    verdict = f"**Verdict: {plain(gate.verdict['word'])}**: {plain(gate.verdict['reason'])}"
    conditions = table(["condition", "result", "value", "n", "limit", "remark"], rows)
    return f"## moediag gate: {plain(gate.label)}{against}: {state}\n\n{conditions}\n\n{verdict}\n"


def gate_junit(gate: Gate) -> bytes:
    """A test suite with one test case per condition; CI systems name a case by ``classname`` and ``name``."""
    counts = {"tests": str(len(gate.outcomes)), "failures": str(len(gate.failed)), "errors": "0", "skipped": "0"}
    root = ElementTree.Element("testsuites", {"name": "moediag gate", **counts})
    suite = ElementTree.SubElement(root, "testsuite", {"name": _text(f"moediag gate {gate.label}"), **counts})
    for one in gate.outcomes:
        names = {"classname": _text(f"gate.{gate.label}"), "name": _text(one.condition)}
        case = ElementTree.SubElement(suite, "testcase", names)
        if one.is_met:
            ElementTree.SubElement(case, "system-out").text = _text(one.line)
        else:
            failure = ElementTree.SubElement(case, "failure", {"message": _text(one.line), "type": "condition not met"})
            failure.text = _text(one.line)
    ElementTree.indent(root)
    return bytes(ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)) + b"\n"


def _text(text: str) -> str:
    """Text without the characters that XML cannot hold."""
    return _NOT_IN_XML.sub("?", text)
