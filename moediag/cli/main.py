"""Entry point ``moediag``: maps errors to one line and an exit code.

Exit codes: 0 done, 1 a moediag error (one line on stderr), 2 usage, 3 the answer is no (findings of error
grade in ``validate``, a failed ``gate`` or ``selftest``, ``--strict``, ``diff-env --fail-on-difference``), 130
interrupted, 143 ended by SIGTERM.
Nothing heavy is imported until a command runs.
"""

from __future__ import annotations

import io
import re
import sys
from typing import Annotated, Any, Final

import typer
from typer.core import TyperCommand, TyperGroup

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
from moediag.cli import options as o
from moediag.cli.console import URLS, attending, note
from moediag.cli.signals import Interrupted, interruptible
from moediag.errors import MoediagError

GROUPS: Final = {
    "Run the engines": (demo, profile, diagnose, capture, selftest),
    "Read what is there": (analyze, report, compare, gate, simulate, trend, validate),
    "Other tools' data": (import_, export),
    "Look up": (inspect, schema, env, diff_env),
}
"""Commands as --help groups them."""


EXTRAS: Final = {
    **dict.fromkeys(("torch", "transformers", "tokenizers", "accelerate", "huggingface_hub"), "hf"),
    "vllm": "vllm",
    "tensorboard": "tensorboard",
    "wandb": "wandb",
}
"""Packages that not every installation has, and the extra that brings each."""


_HYPHEN: Final = "\N{NON-BREAKING HYPHEN}"


def _whole_names(command: TyperCommand | TyperGroup, ctx: Any) -> str:
    """The help of a command, whose lines break between words and not at the hyphens of names."""

    def kept(text: str) -> str:
        return re.sub(r"(?<=[\w-])-(?=\w)", _HYPHEN, text)

    formatter: Any = ctx.make_formatter()
    write_text, write_list = formatter.write_text, formatter.write_dl
    formatter.write_text = lambda text: write_text(kept(text))
    formatter.write_dl = lambda rows, **more: write_list([(name, kept(words)) for name, words in rows], **more)
    command.format_help(ctx, formatter)
    return str(formatter.getvalue()).replace(_HYPHEN, "-").rstrip("\n")


class _Command(TyperCommand):
    """A command whose help keeps names whole."""

    def get_help(self, ctx: Any) -> str:
        """As click's, with names kept whole."""
        return _whole_names(self, ctx)


class _Grouped(TyperGroup):
    """Commands under the heading of their group."""

    def get_help(self, ctx: Any) -> str:
        """As click's, with names kept whole."""
        return _whole_names(self, ctx)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write a list of commands for every group."""
        widest = max(map(len, self.commands))
        for heading, modules in GROUPS.items():
            words = {module.NAME: self.commands[module.NAME].get_short_help_str(limit=200) for module in modules}
            with formatter.section(heading):
                formatter.write_dl(
                    [(name.ljust(widest), re.split(r"[:;.](?: |$)", line)[0]) for name, line in words.items()]
                )


app = typer.Typer(
    name="moediag",
    cls=_Grouped,
    help="Routing-mismatch diagnostics for MoE models: what vLLM sampled against what transformers trains on.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)
for modules in GROUPS.values():
    for module in modules:
        app.command(module.NAME, cls=_Command)(module.command)


def _show_version(is_given: bool) -> None:
    if is_given:
        from moediag import __version__

        typer.echo(f"moediag {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options of every command."""


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
        with interruptible(resumes=_resumes(words)), attending():
            return _run(words)
    except Interrupted as signal:
        note(signal.line)
        return signal.exit_code


def _run(words: list[str]) -> int:
    try:
        result = app(args=words, standalone_mode=False, obj=words)  # pages name the command that makes them again
        o.upload()
        return int(result or 0)
    except MoediagError as error:
        note(f"moediag: {error}")
        return 1
    except typer.Exit as leave:
        return leave.exit_code
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        note(f"moediag: this needs {package}, which is not installed here; pip install 'moediag[{EXTRAS[package]}]'")
        return 1
    except Exception as error:
        return _usage_error(error)
    finally:
        o.STORES.clear()
        URLS.clear()


def _usage_error(error: Exception) -> int:
    """Click's own usage errors know how to show themselves; anything else is a bug and keeps its traceback."""
    if not hasattr(error, "show") or not hasattr(error, "exit_code"):
        raise error
    shown = io.StringIO()
    error.show(file=shown)
    note(shown.getvalue().rstrip("\n"), hanging=4)
    return int(error.exit_code)
