"""``moediag diagnose``: where the mismatch comes from, rung by rung, and what to do next."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from moediag.cli import options as o
from moediag.cli.settings import Settings, with_settings
from moediag.notation import INFER, REFERENCE, TRAIN

if TYPE_CHECKING:
    from moediag.cli.jobs import Arms
    from moediag.engines.arms import ArmRequest
    from moediag.engines.checkpoint import Checkpoint
    from moediag.engines.plan import Plan
    from moediag.run.reader import Run

NAME = "diagnose"

FIRST, REST = (INFER, TRAIN, "train-perturbed"), ("infer-repeat", "infer-rescore", "train-repeat", "train-replay")
"""Recipes in the order in which they tell most: with float32, whether it is another function; then the other rungs."""

Turn = Annotated[
    list[str] | None,
    typer.Option(
        "--turn",
        metavar="OPTION=VALUE",
        help="Rung L6: prefill the tokens again with one option of vLLM changed (enforce_eager=false, "
        "tensor_parallel_size=2, kv_cache_dtype=fp8, ...); may be given several times, an arm each.",
    ),
]
ByLayer = Annotated[
    bool, typer.Option("--replay-by-layer", help="Rung L9 layer by layer: replay of MoE layers up to l, and from l on.")
]
Modules = Annotated[
    bool | None,
    typer.Option(
        "--modules/--no-modules",
        help="Give every module of both engines the same inputs and name the first that differs. Default: where the "
        "engines compute different functions, or one rounds worse.",
        show_default=False,
    ),
]
ReferenceFolder = Annotated[
    str | None,
    typer.Option(
        "--reference",
        metavar="FOLDER",
        callback=o.checkpoint_there,
        help="The same weights with modelling code of their own, as publishers ship it: run in float32 as a third "
        "implementation, which tells whose a difference of functions is. May be CKPT itself.",
    ),
]
TrustReference = Annotated[
    bool, typer.Option("--trust-reference-code", help="Run the modelling code that lies in the --reference folder.")
]
Float32Memory = Annotated[
    float | None,
    typer.Option(
        min=0,
        metavar="GIB",
        help="Memory that a model in float32 may take on each device; a larger model is cut to its first layers, a "
        "test of these alone. Default: what the device has.",
        show_default=False,
    ),
]
Whole = Annotated[
    bool, typer.Option("--whole", help="Climb every rung, though an earlier one has shown the cause already.")
]


@with_settings
def command(
    target: Annotated[
        str,
        typer.Argument(metavar="RUN|CKPT", help="A run, diagnosed with the arms that it has; or a checkpoint."),
    ],
    settings: Settings,
    output: o.OptionalOutput = None,
    prompts: o.OptionalPrompts = None,
    turn: Turn = None,
    replay_by_layer: ByLayer = False,
    modules: Modules = None,
    reference: ReferenceFolder = None,
    trust_reference_code: TrustReference = False,
    float32_memory: Float32Memory = None,
    whole: Whole = False,
    dry_run: o.DryRun = False,
    as_json: o.Json = False,
    force: o.Force = False,
) -> None:
    """Climb the ladder from static facts to forced experts: is something wrong, where, and what next.

    Of a RUN the arms that are there are used, and no engine is started. With a checkpoint and -o the missing arms are
    made, in the order in which they tell most; it ends where the cause is plain.
    """
    if output is None:
        target = str(o.there(target))
    else:
        o.checkpoint_there(target)
    from moediag.cli.console import bar, say, say_json, wrote
    from moediag.cli.table import show_ladder, show_verdict
    from moediag.diagnosis.ladder import engine_seconds
    from moediag.results import analyze_run, load_frames, report_run
    from moediag.run.reader import open_run

    if output is None:
        if prompts is not None or turn or replay_by_layer or modules or reference is not None:
            raise typer.BadParameter("engines run with a checkpoint: moediag diagnose CKPT -o RUN")
        run = open_run(Path(target))
        if dry_run:
            from moediag.cli import jobs

            jobs.end_dry(f"would analyse and report {target} with its arms {', '.join(run.arms())}, without an engine")
    else:
        third = None if reference is None else (reference, trust_reference_code)
        room = None if float32_memory is None else float32_memory * 2**30
        run = _climb(
            target, output, prompts, settings, turn or [], replay_by_layer, modules, third, room, whole, force, dry_run
        )
    with bar("analysis") as progress:
        summary = analyze_run(run, workers=o.n_workers(), on_event=progress.on_event)
        progress.on_event({"stage": "figures and report"})
        report = report_run(run)
    if as_json:
        say_json({key: summary[key] for key in ("verdict", "function", "whose", "distances", "floors")})
        return
    show_verdict(run.path.resolve().name, summary, run.path)
    say()
    show_ladder(load_frames(run)["ladder"], partial(engine_seconds, run))
    wrote(report.with_suffix(".html"))


def _climb(
    ckpt: str,
    output: Path,
    prompts: Path | None,
    settings: Settings,
    turned: Sequence[str],
    by_layer: bool,
    modules: bool | None,
    third: tuple[str, bool] | None,
    room: float | None,
    whole: bool,
    force: bool,
    is_dry: bool,
) -> Run:
    """Make the arms that are missing, a stage at a time, until the cause is plain.

    Raises:
        MoediagError: as ``capture``.
    """
    from moediag.audit.modules import check_modules
    from moediag.cli import jobs
    from moediag.cli.console import bar, note
    from moediag.diagnosis.function import FLOAT32, first_layers
    from moediag.diagnosis.modules import kept_checks
    from moediag.diagnosis.verdict import BIT_EXACT, NOT_REPEATING, OTHER_FUNCTION, ROUNDS_WORSE
    from moediag.engines.launch import Engines
    from moediag.engines.plan import needed_length, why_no_float32
    from moediag.results import analyze_run
    from moediag.run.writer import RunWriter

    jobs.require(INFER, TRAIN)
    if prompts is not None:
        plan = settings.plan(ckpt, prompts, INFER)
        if is_dry:
            _end_dry(plan, settings, output, turned, room, force)
        run, checkpoint = plan.create(output, force), plan.checkpoint
    else:
        given = settings.revision, settings.trust_remote_code
        run, checkpoint = jobs.join(output, ckpt, *given, is_other_checkpoint=False)
    longest = settings.max_model_len or needed_length(run, checkpoint)
    why = why_no_float32(checkpoint, settings.dtype.value, settings.tensor_parallel_size, room)
    if why:
        note(f"Float32  not run of the whole model: {why}")
    no_replay = jobs.why_no_replay(checkpoint, settings.dtype.value)
    if no_replay and checkpoint.routing is not None:
        note(f"Replay   not run: {no_replay}")
    rest = [name for name in REST if name != "train-replay" or not no_replay]
    stages: list[list[Callable[[], ArmRequest]]] = [
        [partial(_request, run, checkpoint, settings, longest, name) for name in names]
        for names in (FIRST if why else (*FIRST, *jobs.FLOAT32), rest)
    ]
    checkpoints = dict.fromkeys((INFER, TRAIN), checkpoint)
    if third is not None and why and _dtype(checkpoint, settings) != FLOAT32:
        note(f"Reference not run: it is held against float32 arms of the whole model; {why}")
    elif third is not None:
        checkpoints[REFERENCE] = _open_reference(output, third)
        trusting = replace(settings, trust_remote_code=third[1])
        of_third = checkpoints[REFERENCE]
        stages[0].append(partial(_request, run, of_third, trusting, longest, REFERENCE))
    opted: list[Callable[[], ArmRequest]] = [
        partial(_turned, run, checkpoint, settings, longest, option) for option in turned
    ]
    if by_layer and not no_replay:
        opted += _by_layer(run, checkpoint, settings, longest)
    for nth, stage in enumerate([*stages, opted]):
        requests = [make() for make in stage]
        missing = [one for one in requests if one.arm not in run.arms() or not run.is_complete(one.arm)]
        is_cut = bool(why) and nth == 0 and first_layers(run) is None
        if not missing and not is_cut:
            continue
        if missing:
            note(f"Stage {nth + 1}  {', '.join(one.arm for one in missing)}: {_cost(run, missing)}")
            if is_dry:
                continue
            _capture_stage(jobs.Arms(RunWriter(run), missing, checkpoints))
        if is_cut and not is_dry:
            _capture_first_layers(run, checkpoint, settings, room)
        if whole or is_dry or stage is opted:
            continue
        with bar("analysis") as progress:
            progress.on_event({"stage": "is the cause plain?"})
            word = analyze_run(run, workers=o.n_workers())["verdict"]["word"]
        if word in (BIT_EXACT, NOT_REPEATING, OTHER_FUNCTION):
            note(f"Ended    the cause is plain ({word}); --whole climbs on")
            break
    if is_dry:
        jobs.end_dry("would capture what is missing, a stage at a time, until the cause is plain")
    if modules is None:
        modules = analyze_run(run, workers=o.n_workers())["verdict"]["word"] in (OTHER_FUNCTION, ROUNDS_WORSE)
    if modules and kept_checks(run) is None:
        with Engines() as engines, bar("modules") as progress:
            check_modules(engines, run, checkpoint, checkpoint, progress.on_event).keep(run)
    return run


def _end_dry(
    plan: Plan, settings: Settings, output: Path, turned: Sequence[str], room: float | None, force: bool
) -> NoReturn:
    """What a diagnosis that begins a run would do."""
    from moediag.cli import jobs
    from moediag.engines.plan import why_no_float32

    why = why_no_float32(plan.checkpoint, settings.dtype.value, settings.tensor_parallel_size, room)
    no_replay = jobs.why_no_replay(plan.checkpoint, settings.dtype.value)
    names = [
        *FIRST,
        *(() if why else jobs.FLOAT32),
        *(name for name in REST if name != "train-replay" or not no_replay),
    ]
    request = partial(settings.request, max_model_len=plan.max_model_len, seed=settings.seed)
    jobs.announce(plan, output, jobs.requests_of(names, plan, request), settings.dtype.value, is_anew=force)
    options = f", then {', '.join(turned)}" if turned else ""
    jobs.end_dry(f"would capture these arms{options}, in this order, until the cause is plain")


def _capture_stage(arms: Arms) -> None:
    """The arms of a stage; float32 that an engine cannot run is left out, with a note."""
    from moediag.cli import jobs
    from moediag.cli.console import note
    from moediag.errors import EngineError

    run = arms.writer.run
    try:
        jobs.capture(arms)
    except EngineError as error:
        waiting = [one for one in arms.requests if not run.is_complete(one.arm)]
        in_use = [one for one in waiting if one.recipe not in jobs.FLOAT32]
        if len(in_use) == len(waiting):
            raise
        note(f"Float32  not run: {error}")  # an engine may have no kernel for it; if it was not that, it ends here
        jobs.capture(replace(arms, requests=in_use))


def _dtype(checkpoint: Checkpoint, settings: Settings) -> str:
    """The model's dtype in both engines."""
    requested = settings.dtype.value
    return checkpoint.stored_dtype if requested == "auto" else requested


def _capture_first_layers(run: Run, checkpoint: Checkpoint, settings: Settings, room: float | None) -> None:
    """Both engines in float32 on the first layers of a model that is too large for it, in a run of its own."""
    from moediag.cli import jobs
    from moediag.cli.console import note
    from moediag.diagnosis.function import FIRST_LAYERS, FLOAT32
    from moediag.engines.first_layers import cut_to_first, n_first_layers, n_parameters_of_first
    from moediag.engines.plan import SamplingOptions, make_plan, needed_length, why_too_large
    from moediag.run.writer import RunWriter

    if _dtype(checkpoint, settings) == FLOAT32 or checkpoint.record.quantization:
        return
    n_layers = n_first_layers(checkpoint)
    why = why_too_large(n_parameters_of_first(checkpoint, n_layers), settings.tensor_parallel_size, room)
    n_all = checkpoint.record.n_decoder_layers
    if why or n_layers == n_all:
        note(f"Float32  no first layers either: {why or 'every kind of layer takes all of them'}")
        return
    note(f"Float32  both engines on the first {n_layers} of {n_all} decoder layers: every kind of layer, and one more")
    with tempfile.TemporaryDirectory(dir=run.path, prefix="cut-") as work:
        cut = cut_to_first(checkpoint, n_layers, Path(work) / FIRST_LAYERS)
        prompts, tokens = Path(work) / "tokens.jsonl", run.tokens(run.shards[0])
        with prompts.open("w") as file:
            for start, end in tokens.sequence_bounds():
                ids, n = tokens.token_id_T[start:end].tolist(), int((~tokens.is_response_T[start:end]).sum())
                file.write(json.dumps({"prompt_token_ids": ids[:n], "completion_token_ids": ids[n:]}) + "\n")
        plan = make_plan(cut, prompts, SamplingOptions(), trust_remote_code=settings.trust_remote_code)
        own = plan.create(run.path / FIRST_LAYERS, force=False)
        in_float32 = replace(settings, dtype=o.ModelDtype.float32)
        longest = settings.max_model_len or needed_length(own, cut)
        requests = [_request(own, cut, in_float32, longest, name) for name in FIRST]
        jobs.capture(jobs.Arms(RunWriter(own), requests, dict.fromkeys((INFER, TRAIN), cut)))


def _open_reference(output: Path, third: tuple[str, bool]) -> Checkpoint:
    """The folder of a third implementation, whose routers are not looked at."""
    from moediag.cli import jobs

    folder, is_trusted = third
    return jobs.join(output, folder, None, is_trusted, is_other_checkpoint=True, is_observed=False)[1]


def _cost(run: Run, requests: Sequence[ArmRequest]) -> str:
    """Time and disk that arms will take, from what the run's reference arms took; what is not known is said."""
    from moediag.numbers import count
    from moediag.run.recipes import recipe

    seconds, n_bytes, unknown = 0.0, 0, []
    for request in requests:
        like = run.reference(recipe(request.recipe).role)
        if like not in run.arms() or not run.is_complete(like):
            unknown.append(request.arm)
            continue
        for shard in run.shards[: request.n_shards]:
            sidecar = run.capture_sidecar(like, shard)
            seconds, n_bytes = seconds + (sidecar.seconds or 0.0), n_bytes + sidecar.n_bytes
    n_loads = len({(one.engine, str(one.options)) for one in requests})
    loads = f"{count(n_loads, 'load')} of an engine (some 25 s each on two cores, more for large weights)"
    if unknown:
        return f"{loads}; each arm takes one pass over the tokens, how long is known once {unknown[0]} is there"
    return f"{loads}, about {seconds:,.0f} s of passes as the arms before took, {n_bytes / 1e6:,.1f} MB"


def _request(run: Run, checkpoint: Checkpoint, settings: Settings, longest: int, name: str, **more: Any) -> ArmRequest:
    """The request of a recipe's arm, to join a run."""
    from moediag.cli import jobs
    from moediag.run.recipes import recipe

    arm = more.pop("arm", name)
    reference, _ = jobs.reference_for(run, name, arm, checkpoint)
    return settings.request(
        name,
        run.record.tokens.origin != "sampled",
        longest,
        int((run.record.sampling and run.record.sampling.seed) or 0),
        arm=arm,
        sampler=run.sampler,
        reference=reference,
        routes=run.reference(INFER),
        n_shards=recipe(name).first_shards,
        **more,
    )


def _turned(run: Run, checkpoint: Checkpoint, settings: Settings, longest: int, option: str) -> ArmRequest:
    """An arm with one option of vLLM changed, prefilling the tokens."""
    from moediag.engines.arms import UNOBSERVED
    from moediag.engines.vllm.options import observable

    given = o.parse_vllm_options([option])
    arm = "infer-" + "-".join(f"{key}-{value}" for key, value in given.items()).lower().replace("_", "-")
    make = partial(_request, run, checkpoint, longest=longest, name="infer-rescore", arm=arm)
    if observable(given) != given:  # taps would not fire, or not rightly: log-probabilities only
        seen = observable(o.parse_vllm_options(settings.vllm_option))
        plain = make(settings=replace(settings, vllm_option=[f"{key}={json.dumps(seen[key])}" for key in seen]))
        request = replace(plain, observer=UNOBSERVED, options={**plain.options, **given})
    else:
        request = make(settings=replace(settings, vllm_option=[*(settings.vllm_option or []), option]))
    return replace(request, change="option", variant_of=run.reference(INFER))


def _by_layer(run: Run, checkpoint: Checkpoint, settings: Settings, longest: int) -> list[Callable[[], ArmRequest]]:
    """Replay of MoE layers up to l, and from l on, for every l."""
    assert checkpoint.routing is not None
    last = checkpoint.routing.n_layers - 1
    ranges = [(0, layer) for layer in range(last)] + [(layer, last) for layer in range(1, last + 1)]
    make = partial(_request, run, checkpoint, settings, longest, "train-replay")
    return [
        partial(make, arm=f"train-replay-{first}-{end}",
                replay={"source": run.reference(INFER), "first_layer": first, "last_layer": end})
        for first, end in ranges
    ]  # fmt: skip
