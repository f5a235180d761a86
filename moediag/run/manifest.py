"""What the sealed JSON files of a run must hold: a seal says that a file is whole, not that it makes sense.

Everything the store and the analysis rely on is held against a shape here, once, when a file is read; code
behind it may then index without asking.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from moediag.errors import CorruptRunError, RunConflictError, RunError, SchemaVersionError
from moediag.notation import SCHEMA_VERSION
from moediag.run.files import digest_of, read_sealed
from moediag.run.shards import Shard

MANIFEST = "run.json"
PROMPTS = "prompts.parquet"
KIND = "moediag run"
_LARGEST = 2**53  # JSON integers above it are not the same number to every reader
_MOST_EXPERTS = 32_767  # expert ids are int16 in memory


@dataclass(frozen=True)
class Kind:
    """A kind of value: what to call it and how to tell it."""

    wanted: str
    accepts: Callable[[Any], bool]


def _is_integer(value: Any, lowest: int, highest: int = _LARGEST) -> bool:
    return type(value) is int and lowest <= value <= highest


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and abs(value) <= _LARGEST


def _is_rising(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(_is_integer(item, 0, 2**31) for item in value)
        and all(a < b for a, b in pairwise(value))
    )


TEXT = Kind("text", lambda value: isinstance(value, str))
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
COUNT = Kind("an integer >= 0", lambda value: _is_integer(value, 0))
NUMBER = Kind("a finite number", _is_number)
OBJECT = Kind("an object", lambda value: isinstance(value, dict))
COUNTS = Kind(
    "a list of integers >= 0", lambda value: isinstance(value, list) and all(_is_integer(item, 0) for item in value)
)
TEXTS = Kind("a list of texts", lambda value: isinstance(value, list) and all(isinstance(item, str) for item in value))
TEXT_BY_NAME = Kind(
    "an object of texts",
    lambda value: isinstance(value, dict) and all(item is None or isinstance(item, str) for item in value.values()),
)
LAYERS = Kind("a rising list of decoder layers", _is_rising)
SHARDS = Kind("a list of shards", lambda value: isinstance(value, list) and bool(value))


def maybe(shape: Any) -> tuple[Any, None]:
    """The shape, or null."""
    return (shape, None)


# A key ending in "?" may be absent.
_ROUTING = {"n_experts": COUNT, "top_k": COUNT, "decoder_layers": LAYERS}
_RUN = {
    "configuration": {"full_vocab?": COUNT},
    "model": {
        "name": TEXT,
        "revision": maybe(TEXT),
        "architecture": maybe(TEXT),
        "model_type": maybe(TEXT),
        "n_decoder_layers": maybe(COUNT),
        "stored_dtype?": TEXT,
        "routing": maybe(_ROUTING),
    },
    "sampling": {
        **dict.fromkeys(("temperature?", "top_p?", "min_p?"), NUMBER),
        "top_k?": Kind("an integer >= -1", lambda value: _is_integer(value, -1)),
        **dict.fromkeys(("max_tokens?", "n?"), Kind("an integer >= 1", lambda value: _is_integer(value, 1))),
        "seed?": Kind("an integer in [0, 2^63)", lambda value: _is_integer(value, 0, 2**63 - 1)),
        "ignore_eos?": FLAG,
        "stop_token_ids?": COUNTS,
    },
    "prompts": {"n": COUNT, "data_sha256": TEXT, "source": TEXT, "source_sha256": TEXT},
    "completions": FLAG,
    "moediag_version": TEXT,
    "shards": SHARDS,
}
_SHARD = {"index": COUNT, "first_sequence": COUNT, "n_sequences": COUNT}
_ARM = {
    "arm": TEXT,
    "configuration": OBJECT,
    **dict.fromkeys(("engine?", "path?", "dtype?", "seeding?", "observer?"), maybe(TEXT)),
    **dict.fromkeys(("versions?", "environment?"), maybe(TEXT_BY_NAME)),
    **dict.fromkeys(("loaded?", "replay?"), maybe(OBJECT)),
    "router_dtypes?": maybe(TEXT_BY_NAME),
    "disagreements?": maybe(TEXTS),
    "gate_weights?": maybe(TEXT),
    "correction_bias_sha256?": maybe(TEXT),
}
_SIDECAR = {
    "data_sha256": TEXT,
    "tokens_sha256": TEXT,
    "n_rows": COUNT,
    "n_bytes": COUNT,
    "seconds?": NUMBER,
    "router_dtypes?": maybe(TEXT_BY_NAME),
}


def check_shape(value: Any, shape: Any, where: str, name: str = "") -> None:
    """Hold a value against a shape: a :class:`Kind`, an object of shapes by key, or one of several.

    Raises:
        CorruptRunError: names the file and the value that is of another kind than wanted.
    """
    if isinstance(shape, tuple):
        if value is not None:
            check_shape(value, shape[0], where, name)
        return
    kind = shape if isinstance(shape, Kind) else OBJECT
    if not kind.accepts(value):
        raise CorruptRunError(
            f"{where}: {name or 'the content'} should be {kind.wanted}, found {_short(value)}; "
            "restore the file or capture again"
        )
    for key, inner in shape.items() if isinstance(shape, dict) else ():
        bare, is_needed = key.removesuffix("?"), not key.endswith("?")
        if bare in value:
            check_shape(value[bare], inner, where, f"{name}.{bare}" if name else bare)
        elif is_needed:
            raise CorruptRunError(f"{where} lacks {bare!r}{f' in {name}' if name else ''}; restore it or capture again")


def read_manifest(folder: Path) -> dict[str, Any]:
    """run.json, whole, of this schema version and of values that make sense.

    Raises:
        RunError: not a run directory.
        CorruptRunError: changed since it was written, or impossible values.
        SchemaVersionError: written by another schema version.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise RunError(f"{folder} is not a moediag run directory (no {MANIFEST}); make one with: moediag profile")
    manifest = read_sealed(path)
    if manifest.get("kind") != KIND:
        raise RunError(f"{path} is of kind {_short(manifest.get('kind'))}, wanted {KIND!r}; point to a run directory")
    check_schema_version(manifest, path)
    check_shape(manifest, _RUN, str(path))
    routing = manifest["model"]["routing"]
    if routing and not 1 <= routing["top_k"] <= routing["n_experts"] <= _MOST_EXPERTS:
        raise CorruptRunError(
            f"{path}: top_k = {routing['top_k']} of n_experts = {routing['n_experts']} is no routing; "
            "restore the file or capture again"
        )
    shard_table(manifest, path)
    return manifest


def shard_table(manifest: dict[str, Any], path: Path) -> tuple[Shard, ...]:
    """The shards of a manifest, numbered and joined without gaps.

    Raises:
        CorruptRunError: they are not.
    """
    shards: list[Shard] = []
    for i, entry in enumerate(manifest["shards"]):
        check_shape(entry, _SHARD, str(path), f"shards[{i}]")
        shard = Shard(**{key: entry[key] for key in _SHARD})
        first = shards[-1].seq_ids.stop if shards else 0
        if (shard.index, shard.first_sequence) != (i, first) or shard.n_sequences < 1:
            raise CorruptRunError(f"{path}: unusable shard table at entry {i}; restore the file or capture again")
        shards.append(shard)
    return tuple(shards)


def read_arm(path: Path, name: str) -> dict[str, Any]:
    """An arm's arm.json.

    Raises:
        CorruptRunError: changed since it was written, of another arm, or impossible values.
    """
    record = read_sealed(path)
    check_shape(record, _ARM, str(path))
    if record["arm"] != name:
        raise CorruptRunError(f"{path} is of arm {record['arm']!r}, wanted {name!r}; restore it or capture again")
    return record


def read_sidecar(path: Path) -> dict[str, Any]:
    """A shard's sidecar.

    Raises:
        CorruptRunError: changed since it was written, or impossible values.
    """
    facts = read_sealed(path)
    check_shape(facts, _SIDECAR, str(path))
    return facts


def refuse_other_configuration(there: dict[str, Any], asked: dict[str, Any], where: str) -> None:
    """Raise unless the two configurations are the same.

    Raises:
        RunConflictError: names what differs.
    """
    if digest_of(there) == digest_of(asked):
        return
    keys = sorted(key for key in {*there, *asked} if digest_of(there.get(key)) != digest_of(asked.get(key)))
    differences = "; ".join(f"{key}: {there.get(key)!r} there, {asked.get(key)!r} asked" for key in keys)
    raise RunConflictError(f"{where} was made with another configuration ({differences}); use another -o or --force")


def check_schema_version(content: dict[str, Any], path: Path) -> None:
    """Refuse a file of another schema version.

    Raises:
        SchemaVersionError: newer, older or absent.
    """
    found = content.get("schema_version")
    if found != SCHEMA_VERSION or type(found) is not int:
        advice = "upgrade moediag" if isinstance(found, int) and found > SCHEMA_VERSION else "capture the run again"
        raise SchemaVersionError(
            f"{path} has schema_version {_short(found)}, this moediag reads {SCHEMA_VERSION}; {advice}"
        )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
