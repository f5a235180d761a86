"""``moediag capture RECIPE``: one arm at a time, for engines that live in different environments."""

from __future__ import annotations

import inspect
import textwrap
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moediag.cli import options as o
from moediag.cli.settings import Settings, with_settings
from moediag.notation import INFER, REFERENCE
from moediag.run.recipes import RECIPES, SERVER

if TYPE_CHECKING:
    from moediag.engines.arms import ArmRequest

NAME = "capture"

RecipeName = StrEnum("RecipeName", [(name.replace("-", "_"), name) for name in RECIPES])  # type: ignore[misc]

_BEGIN_ONLY = ("limit", "temperature", "top_p", "top_k", "min_p", "max_tokens", "n", "seed", "ignore_eos",
               "router_logits", "ids_only", "full_vocab", "stop_token_ids", "shard_size", "force")  # fmt: skip


def _recipe_lines() -> str:
    """The recipes as help shows them: what follows a backspace is not filled again."""
    widest = max(map(len, RECIPES)) + 2
    lines = [
        textwrap.fill(f"{name.ljust(widest)}{made.words}", 76, subsequent_indent=" " * widest, break_on_hyphens=False)
        for name, made in RECIPES.items()
    ]
    return "\n".join(["\b", "Recipes:", *lines])


@with_settings
def command(
    context: typer.Context,
    recipe: Annotated[
        RecipeName,
        typer.Argument(metavar="RECIPE", show_choices=False, help="What to capture: one of the recipes above."),
    ],
    ckpt: o.Ckpt,
    output: o.Output,
    settings: Settings,
    prompts: o.OptionalPrompts = None,
    name: o.ArmName = None,
    other_checkpoint: o.OtherCheckpoint = False,
    replay_weights: o.ReplayWeights = False,
    replay_layers: o.ReplayLayers = None,
    shard_index: o.ShardIndex = None,
    num_shards: o.NumShards = None,
    dry_run: o.DryRun = False,
    force: o.Force = False,
) -> None:
    """Capture one arm. With --prompts the run is begun (or resumed); without, the arm joins the run at RUN.

    Several workers may fill one arm at the same time: each takes shards that no other holds. With --shard-index
    and --num-shards they also share the work across machines; merging is then a plain copy (cp -rn B/. A/).
    """
    is_sliced = shard_index is not None or num_shards is not None
    # imports what a wrong path should not wait for
    worker = o.parse_slice(shard_index, num_shards) if is_sliced else None
    if prompts is None:
        o.there(output)
    from moediag.cli import jobs
    from moediag.cli.console import wrote
    from moediag.engines.plan import needed_length
    from moediag.run.recipes import recipe as recipe_of
    from moediag.run.writer import RunWriter

    made, arm = recipe_of(recipe.value), o.check_arm_name(name) or recipe.value
    worker, layers = worker or o.parse_slice(None, None), o.parse_layers(replay_layers)
    if (settings.server is None) == (made.engine == SERVER):
        raise typer.BadParameter(
            f"{recipe.value} needs --server URL"
            if made.engine == SERVER
            else f"--server is of no use to {recipe.value}"
        )
    jobs.require(recipe.value, is_slice=is_sliced)
    settings.check_server()
    cluster = settings.cluster()

    def request(given: bool, max_model_len: int, seed: int, routes: str = INFER, **more: Any) -> ArmRequest:
        replay = {"source": routes, "weights": replay_weights, **layers}
        return settings.request(recipe.value, given, max_model_len, seed, arm=arm, replay=replay, **more)

    if prompts is not None:
        plan = settings.plan(ckpt, prompts, sampled_by=arm if made.samples else INFER)
        longest, is_given = plan.max_model_len, plan.completion_ids is not None
        # Before the run: what cannot be captured must not begin one, nor replace the one that is there.
        planned = request(is_given, longest, settings.seed, sampler=plan.sampled_by)
        jobs.announce(plan, output, [planned], settings.dtype.value, is_anew=force, has_results=False)
        if dry_run:
            jobs.end_dry(f"would begin or resume {output} and capture arm {arm}")
        run, checkpoint = plan.create(output, force), plan.checkpoint
    else:
        _refuse_without_effect(context)
        given = ckpt, settings.revision, settings.trust_remote_code
        is_third = made.role == REFERENCE
        is_other = other_checkpoint or is_third
        run, checkpoint = jobs.join(output, *given, is_other_checkpoint=is_other, is_observed=not is_third)
        longest = settings.max_model_len or needed_length(run, checkpoint)
    reference, has_other_weights = jobs.reference_for(run, recipe.value, arm, checkpoint)
    made_as = request(
        run.record.tokens.origin != "sampled",
        longest,
        int((run.record.sampling and run.record.sampling.seed) or 0),
        run.reference(INFER),
        sampler=run.sampler,
        reference=reference,
        is_other_checkpoint=has_other_weights,
    )
    if dry_run:
        n_left = len(RunWriter(run, worker).own_missing_shards(arm))
        jobs.end_dry(f"would capture arm {arm}: {n_left} of {len(run.shards)} shards of {output} are missing")
    arms = jobs.Arms(RunWriter(run, worker), [made_as], {made.role: checkpoint})
    jobs.capture(arms, is_shared=True, cluster=cluster)
    wrote(run.arm_folder(arm))


command.__doc__ = f"{inspect.cleandoc(command.__doc__ or '')}\n\n{_recipe_lines()}"


def _refuse_without_effect(context: typer.Context) -> None:
    """Options that describe a run say nothing about an arm that joins one: better an error than no effect."""
    given = [
        name for name in _BEGIN_ONLY if (source := context.get_parameter_source(name)) and source.name == "COMMANDLINE"
    ]
    if given:
        option = "--" + given[0].replace("_", "-")
        raise typer.BadParameter(f"{option} begins a run and needs --prompts; without, the arm joins the run at RUN")
