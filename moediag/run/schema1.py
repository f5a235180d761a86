"""Runs of schema 1 as the records of today: read and analysed, never continued.

There an arm was what its name's first word said, a run had one checkpoint and one routing for all arms, and arms of the
first versions did not say what their gate weights are: vLLM's lacked a factor that it applies after the experts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moediag.errors import CorruptRunError
from moediag.run.capture import arrays_of
from moediag.run.files import read_sealed
from moediag.run.recipes import PATH_WORDS, RECIPES, Recipe, change_of
from moediag.run.records import ArmRecord, CheckpointRecord, RunRecord, as_record, short

if TYPE_CHECKING:
    from moediag.run.reader import Run

_RULE = ("family", "score_function", "has_correction_bias", "n_group", "topk_group", "gate", "renormalize",
         "scaling_factor", "n_shared_experts")  # fmt: skip
_ARM_KEYS = ("kind", "sha256", "arm", "engine", "path", "dtype", "configuration", "versions", "environment",
             "gate_weights", "correction_bias_sha256", "disagreements", "is_routed")  # fmt: skip


def run(content: dict[str, Any], where: str) -> RunRecord:
    """run.json.

    Raises:
        CorruptRunError: it lacks a value, or holds one of another kind than expected.
    """
    try:
        configuration, sampled_by = content["configuration"], content.get("sampled_by", "infer")
        given = content["completions"]
        checkpoint(content, where)
        record = {
            "schema_version": 1,
            "moediag_version": content["moediag_version"],
            "configuration": configuration,
            "checkpoint": _digest(content),
            "tokenizer": {"files_sha256": configuration["tokenizer_sha256"]}
            if "tokenizer_sha256" in configuration
            else None,
            "tokens": {"origin": "given"} if given else {"origin": "sampled", "arm": sampled_by},
            "prompts": content["prompts"],
            "sampling": content["sampling"],
            "level": "ids"
            if configuration.get("ids_only")
            else "full"
            if configuration.get("router_logits") == "full"
            else "margins",
            "full_vocab": configuration.get("full_vocab", 0),
            "shards": content["shards"],
            "main_pair": ["train", sampled_by],
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise _broken(where, error) from None
    return as_record(record, RunRecord, where)


def checkpoint(manifest: dict[str, Any], where: str = "run.json") -> CheckpointRecord:
    """The one checkpoint of a run of schema 1."""
    try:
        model, configuration = manifest["model"], manifest["configuration"]
        keys = ("revision", "architecture", "model_type", "n_decoder_layers", "stored_dtype")
        record = {
            "schema_version": 1,
            "source": model["name"],
            **{key: model.get(key) for key in keys},
            **{key: configuration.get(key) for key in ("config_sha256", "weights_sha256", "tokenizer_sha256")},
            "routers": _routers(model["routing"]),
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise _broken(where, error) from None
    return as_record(record, CheckpointRecord, where)


def arm(of: Run, name: str, content: dict[str, Any]) -> ArmRecord:
    """arm.json.

    Raises:
        CorruptRunError: it lacks a value, or holds one of another kind than expected.
    """
    where = str(of.arm_folder(name) / "arm.json")
    try:
        manifest, configuration = of.manifest, dict(content["configuration"])
        recipe = _recipe(content["arm"], where)
        routers = _routers(manifest["model"]["routing"])
        is_routed = bool(routers) and content.get("is_routed", True)
        path = next((key for key, words in PATH_WORDS.items() if words == content.get("path")), None)
        if path is None:
            path = "teacher-forced" if recipe.role == "train" else "unknown"
        change = change_of(content["arm"], path, _path_of_infer(of)) if content["arm"] in RECIPES else None
        level, chosen = of.record.level, of.record.full_vocab and content["arm"] in ("infer", "train")
        facts = {key: value for key, value in content.items() if key not in _ARM_KEYS}
        _, is_batched, batching = str(content.get("path")).partition("teacher-forced, ")
        facts |= {"batching": batching} if is_batched else {}
        record = {
            "schema_version": 1,
            "name": content["arm"],
            "role": recipe.role,
            "engine": content.get("engine") or "unknown",
            "path": path,
            "variant_of": recipe.role if change else None,
            "change": change,
            "checkpoint": _digest(manifest),
            "origin": {
                "kind": "captured",
                "recipe": content["arm"],
                "configuration": configuration,
                "versions": content.get("versions") or {},
                "environment": content.get("environment") or {},
                "facts": facts,
            },
            "dtype": content.get("dtype"),
            "arrays": arrays_of(level, is_routed, has_distributions=bool(chosen)),
            "routers": routers,
            "gate_weights": content.get("gate_weights"),
            "correction_bias_sha256": content.get("correction_bias_sha256"),
            "disagreements": content.get("disagreements") or [],
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise _broken(where, error) from None
    return as_record(record, ArmRecord, where)


def _path_of_infer(of: Run) -> str | None:
    """How the infer arm got its scores; None where it is not there."""
    path = of.arm_folder("infer") / "arm.json"
    if not path.exists():
        return None
    words = read_sealed(path).get("path")
    return next((key for key, one in PATH_WORDS.items() if one == words), None)


def _recipe(name: str, where: str) -> Recipe:
    """What an arm was, which schema 1 says by its name's first word."""
    found = RECIPES.get(name) or RECIPES.get(name.partition("-")[0])
    if found is None:
        raise CorruptRunError(f"{where} is of arm {name!r}: expected a name that begins with infer or train")
    return found


def _routers(routing: dict[str, Any] | None) -> list[dict[str, Any]]:
    if not routing:
        return []
    spec = {key: routing[key] for key in _RULE} if "score_function" in routing else None
    return [
        {"decoder_layer": layer, "n_experts": routing["n_experts"], "top_k": routing["top_k"], "spec": spec}
        for layer in routing["decoder_layers"]
    ]


def _digest(manifest: dict[str, Any]) -> str:
    return checkpoint(manifest).digest


def _broken(where: str, error: Exception) -> CorruptRunError:
    what = (
        f"lacks {error}"
        if isinstance(error, KeyError)
        else f"holds a value of another kind than expected ({short(str(error))})"
    )
    return CorruptRunError(f"{where} {what}; restore the file or capture again")
