"""Entry point ``moediag``: maps errors to one line and an exit code.

Exit codes: 0 done, 1 a moediag error (one line on stderr), 2 usage, 3 the answer is no (findings of error
grade in ``validate``, a failed ``gate`` or ``selftest``, ``--strict``, ``diff-env --fail-on-difference``), 130
interrupted, 143 ended by SIGTERM.
Nothing heavy is imported until a command runs.
"""

from __future__ import annotations

import sys

import typer

from moediag.cli import (
    analyze,
    capture,
    compare,
    demo,
    diagnose,
    diff_env,
    env,
    export,
    gate,
    import_,
    inspect,
    profile,
    report,
    schema,
    selftest,
    simulate,
    trend,
    validate,
)
from moediag.cli.signals import Interrupted, interruptible
from moediag.errors import MoediagError

app = typer.Typer(
    name="moediag",
    help="Routing-mismatch diagnostics for MoE models: what vLLM sampled against what transformers trains on.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for module in (
    demo,
    profile,
    diagnose,
    capture,
    import_,
    export,
    analyze,
    compare,
    gate,
    simulate,
    trend,
    report,
    validate,
    selftest,
    inspect,
    schema,
    env,
    diff_env,
):
    app.command(module.NAME)(module.command)


def _resumes(words: list[str]) -> bool:
    """Whether the same command goes on where it was ended: captures are kept shard by shard, all else starts over."""
    name = next((word for word in words if word[:1] != "-"), "")
    if name == selftest.NAME:  # kept only in a folder of the user's
        return any(word.startswith(("-o", "--output")) for word in words)
    return name in (demo.NAME, profile.NAME, capture.NAME, diagnose.NAME)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    words = sys.argv[1:] if arguments is None else arguments
    try:
        with interruptible(resumes=_resumes(words)):
            return _run(words)
    except Interrupted as signal:
        print(signal.line, file=sys.stderr)
        return signal.exit_code


def _run(words: list[str]) -> int:
    try:
        result = app(args=words, standalone_mode=False, obj=words)  # pages name the command that makes them again
        return int(result or 0)
    except MoediagError as error:
        print(f"moediag: {error}", file=sys.stderr)
        return 1
    except typer.Exit as leave:
        return leave.exit_code
    except BrokenPipeError:  # the reader of a pipe (head, less) has gone
        sys.stderr.close()
        return 0
    except Exception as error:
        return _usage_error(error)


def _usage_error(error: Exception) -> int:
    """Click's own usage errors know how to show themselves; anything else is a bug and keeps its traceback."""
    if not hasattr(error, "show") or not hasattr(error, "exit_code"):
        raise error
    error.show()
    return int(error.exit_code)
