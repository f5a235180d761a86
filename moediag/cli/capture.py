"""``moediag capture infer|train``: one arm at a time, for engines that live in different environments."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from moediag.cli import options as o
from moediag.cli.settings import Settings, with_settings
from moediag.notation import ARMS, INFER, INFER_PRODUCTION, engine_side

NAME = "capture"


Arm = StrEnum("Arm", [(name.replace("-", "_"), name) for name in ARMS])  # type: ignore[misc]


_BEGIN_ONLY = ("limit", "temperature", "top_p", "top_k", "min_p", "max_tokens", "n", "seed", "ignore_eos",
               "router_logits", "ids_only", "full_vocab", "stop_token_ids", "shard_size", "force")  # fmt: skip


@with_settings
def command(
    context: typer.Context,
    arm: Annotated[
        Arm,
        typer.Argument(
            metavar="ARM",
            help="; ".join(f"{name}: {words}" for name, words in ARMS.items()),
        ),
    ],
    ckpt: o.Ckpt,
    output: o.Output,
    settings: Settings,
    prompts: o.OptionalPrompts = None,
    replay_weights: o.ReplayWeights = False,
    replay_layers: o.ReplayLayers = None,
    shard_index: o.ShardIndex = None,
    num_shards: o.NumShards = None,
    force: o.Force = False,
) -> None:
    """Capture one arm. With --prompts the run is begun (or resumed); without, the arm joins the run at RUN.

    Several workers may fill one arm at the same time: each takes shards that no other holds. With --shard-index
    and --num-shards they also share the work across machines; merging is then a plain copy (cp -rn B/. A/).
    """
    from moediag.cli import jobs

    worker, layers = o.parse_slice(shard_index, num_shards), o.parse_layers(replay_layers)
    jobs.require((arm.value,))

    def request(given: bool, sampler: str, needed_length: int, seed: int) -> jobs.ArmRequest:
        if engine_side(arm.value) == INFER:
            observer = jobs.UNOBSERVED if arm.value == INFER_PRODUCTION else settings.observer.value
            engine = settings.infer_options(settings.vllm_options, observer, needed_length, seed)
        else:
            engine = settings.train_options()
        return jobs.arm_request(
            arm.value,
            engine,
            given,
            sampler=sampler,
            observer=settings.observer.value,
            scoring=settings.scoring.value,
            batching=settings.train_batching,
            replay={"source": INFER, "weights": replay_weights, **layers},
        )

    if prompts is not None:
        plan = settings.plan(ckpt, prompts, INFER_PRODUCTION if arm.value == INFER_PRODUCTION else INFER)
        # Before the run: what cannot be asked for must not begin one, nor replace the one that is there.
        asked = request(plan.completion_ids is not None, plan.sampled_by, plan.max_model_len, plan.sampling.seed)
        jobs.announce(plan, output, (arm.value,), settings.dtype.value, is_anew=force)
        run, checkpoint = plan.create(output, force), plan.checkpoint
    else:
        _refuse_without_effect(context)
        given = ckpt, settings.revision, settings.max_model_len, settings.trust_remote_code
        run, checkpoint, needed_length = jobs.join(output, *given)
        seed = int(run.manifest["sampling"]["seed"])
        asked = request(run.manifest["completions"], run.sampler, needed_length, seed)
    run.worker = worker
    jobs.capture(jobs.Arms(run, checkpoint, [asked]), is_shared=True)
    jobs.wrote(run.path / "arms" / arm.value)


def _refuse_without_effect(context: typer.Context) -> None:
    """Options that describe a run say nothing about an arm that joins one: better an error than no effect."""
    given = [
        name for name in _BEGIN_ONLY if (source := context.get_parameter_source(name)) and source.name == "COMMANDLINE"
    ]
    if given:
        option = "--" + given[0].replace("_", "-")
        raise typer.BadParameter(f"{option} begins a run and needs --prompts; without, the arm joins the run at RUN")
