"""``moediag inspect``: what a checkpoint says of its router, without running the model."""

from __future__ import annotations

from moediag.cli import options as o

NAME = "inspect"


def command(ckpt: o.Ckpt, revision: o.Revision = None, as_json: o.Json = False) -> None:
    """Show a checkpoint's routing rule, router tensors and sampling values."""
    from moediag.cli.console import doing, say, say_json
    from moediag.engines.versions import require_train_engine
    from moediag.numbers import NONE

    require_train_engine()
    from moediag.engines.inspection import inspect_checkpoint

    with doing(f"running a router of {ckpt} in transformers"):
        facts = inspect_checkpoint(ckpt, revision)
    if as_json:
        say_json(facts)
        return
    for section in ("model", "router_rule", "routing", "router_dtypes", "generation_config"):
        say(f"{section}:" if facts[section] else f"{section}: none")
        for name, value in (facts[section] or {}).items():
            is_absent = value is None or value == ""
            say(f"    {name:<22} {NONE if is_absent else value}")
    for tensor in facts["router_tensors"]:
        say("router tensor: " + ", ".join(f"{name} {value}" for name, value in tensor.items()))
    for warning in facts["warnings"]:
        say(f"warning: {warning}")
