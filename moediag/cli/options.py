"""Options that several commands share, with vLLM's and transformers' own names."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from glob import has_magic
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from moediag.errors import CheckpointError, EngineError, PromptsError, RunError

if TYPE_CHECKING:
    from moediag.engines.cluster import ClusterOptions, Tasks
    from moediag.hygiene import Finding
    from moediag.run.capture import Slice
    from moediag.run.pieces import Pool
    from moediag.run.store import Store

_ALL_SEQUENCES = 2**31


class RouterLogits(StrEnum):
    """How much of the router logits is kept."""

    none = "none"
    full = "full"


class Observer(StrEnum):
    """How vLLM's routing is seen."""

    hooks = "hooks"
    native = "native"
    both = "both"
    auto = "auto"


class Layout(StrEnum):
    """How the sequences of one transformers forward lie in it."""

    padded = "padded"
    packed = "packed"


class Scoring(StrEnum):
    """How vLLM scores given completions."""

    prefill = "prefill"
    decode = "decode"


class Accept(StrEnum):
    """Findings before anything is sampled that end a capture unless they are accepted."""

    router_rules = "router-rules"


class ModelDtype(StrEnum):
    """Dtypes that both engines take by the same name."""

    auto = "auto"
    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


def there(given: Any) -> Any:
    """Paths that exist, or patterns; refused while nothing has been imported yet. A URL becomes its local mirror.

    Raises:
        RunError: a path is missing, or a URL cannot be read.
    """
    if isinstance(given, list | tuple):
        return [there(path) for path in given]
    path = given if given is None else mirrored(given)
    if path is not None and not Path(path).exists() and not has_magic(str(path)):
        raise RunError(f"{path} does not exist; give a path that does (moediag profile or import makes runs)")
    return path


STORES: Final[list[Store]] = []
"""Object stores that the command was given URLs of."""


def mirrored(given: Path, is_read: bool = True) -> Path:
    """The local mirror of a run on an object store, brought up to date; a path is returned as it is.

    Args:
        is_read: a run has to be there; else the command makes one, or goes on with it.

    Raises:
        RunError: the store cannot be read.
    """
    if ":/" not in str(given):
        return given
    from moediag.cli.console import URLS, doing, note
    from moediag.run import store

    url = store.url_of(given)
    if url is None:
        return given
    found = store.mirror_of(url)
    with doing(f"reading {url}"):
        found.pull(is_read)
    note(f"Store    {url}, kept in {found.folder} too")
    URLS[str(found.folder)] = url
    STORES.append(found)
    return found.folder


def _run_to_fill(given: Path | None) -> Path | None:
    return None if given is None else mirrored(given, is_read=False)


def local(given: Path | None) -> Path | None:
    """A path of this machine.

    Raises:
        RunError: it is a URL.
    """
    if given is not None and ":/" in str(given):
        from moediag.run import store

        if (url := store.url_of(given)) is not None:
            raise RunError(f"-o {url}: of profile, capture and diagnose alone it may be a URL; give a local path")
    return given


def upload() -> None:
    """Put on the object stores what the command wrote.

    Raises:
        RunError: a store cannot be written.
    """
    from moediag.cli.console import doing, note

    for found in STORES:
        with doing(f"uploading to {found.url}"):
            n_files, n_bytes = found.push()
        if n_files:
            note(f"Store    {n_files} files ({n_bytes / 1e6:,.1f} MB) uploaded to {found.url}")


def checkpoint_there(name: str | None) -> str | None:
    """A folder that exists, or what may be a hub id.

    Raises:
        CheckpointError: it is neither.
    """
    is_id = name is None or (name.count("/") == 1 and not name.startswith((".", "/", "~")))
    if not is_id and not Path(str(name)).exists():
        raise CheckpointError(f"checkpoint {name} does not exist; give a checkpoint folder or a hub id (owner/name)")
    return name


def _prompts_there(path: Path | None) -> Path | None:
    if path is not None and not path.exists():
        raise PromptsError(f"prompts file {path} does not exist; give --prompts an existing file")
    return path


Ckpt = Annotated[
    str, typer.Argument(metavar="CKPT", help="Checkpoint folder, or a hub id (owner/name).", callback=checkpoint_there)
]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="Run directory, or its URL on a store.", callback=there)]
Output = Annotated[
    Path,
    typer.Option(
        "-o",
        "--output",
        metavar="RUN",
        help="Run directory to make or resume; or its URL on an object store (s3://..., moediag[store]).",
        callback=_run_to_fill,
    ),
]
OptionalOutput = Annotated[
    Path | None,
    typer.Option(
        "-o",
        "--output",
        metavar="RUN",
        help="With a checkpoint: the run to make, or to add arms to.",
        callback=_run_to_fill,
    ),
]
Prompts = Annotated[
    Path,
    typer.Option(
        "--prompts",
        metavar="FILE",
        callback=_prompts_there,
        help="JSON lines, a JSON array, CSV, parquet or a folder of datasets with prompt (text or messages), messages "
        "(and tools) or prompt_token_ids, optionally completion_token_ids; or text, one a line. Also as .gz.",
    ),
]
OptionalPrompts = Annotated[
    Path | None,
    typer.Option("--prompts", metavar="FILE", help="Prompts file; needed to begin a run.", callback=_prompts_there),
]
Limit = Annotated[int | None, typer.Option(min=1, help="Use the first so many prompts.")]
Revision = Annotated[str | None, typer.Option(help="Hub revision (branch, tag or commit).")]
TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run the checkpoint's own code; needs a pinned --revision or a folder."),
]
AcceptOption = Annotated[
    Accept | None,
    typer.Option("--accept", help="Capture although the engines' routers follow different rules; it stays a finding."),
]
Dtype = Annotated[ModelDtype, typer.Option(help="Model dtype in both engines; auto = as the checkpoint is stored.")]
Temperature = Annotated[float, typer.Option(min=0.0, help="Sampling temperature; KL estimators need 1.")]
TopP = Annotated[float, typer.Option(min=0.0, max=1.0, help="Nucleus sampling; KL estimators need 1.")]
TopK = Annotated[int, typer.Option(help="Top-k sampling; 0 = off.")]
MinP = Annotated[float, typer.Option(min=0.0, max=1.0, help="Min-p sampling; 0 = off.")]
MaxTokens = Annotated[int, typer.Option(min=1, help="Longest response [tokens].")]
Samples = Annotated[int, typer.Option("--n", "-n", min=1, help="Responses per prompt.")]
Seed = Annotated[int, typer.Option(help="Sampling seed; each shard or request derives its own from it.")]
IgnoreEos = Annotated[bool, typer.Option("--ignore-eos", help="Do not stop at the end-of-text token.")]
Logits = Annotated[RouterLogits, typer.Option(help="Keep full router logits as well.")]
IdsOnly = Annotated[
    bool, typer.Option("--ids-only", help="Keep expert ids only: no gate weights, no margins (the smallest capture).")
]
FullVocab = Annotated[
    str | None,
    typer.Option(
        "--full-vocab",
        metavar="N|all",
        help="Keep whole next-token distributions of N sequences in infer and train, for an exact KL (4 bytes x "
        "vocabulary per response token); 0 = none; default: all where they take at most 64 MB per arm, else none.",
    ),
]
StopTokenIds = Annotated[
    list[int] | None, typer.Option("--stop-token-ids", metavar="ID", help="vLLM's stop_token_ids; may be repeated.")
]
ObserverOption = Annotated[
    Observer,
    typer.Option(
        "--observer",
        help="How vLLM's routing is seen: hooks; native: vLLM's own record, ids only (needs the V2 runner, hence "
        "Triton); both: each row of one held against the other; auto: the strongest that works here.",
    ),
]
BatchSize = Annotated[
    int, typer.Option("--batch-size", min=1, help="transformers: sequences per forward; 1, unpadded, is the reference.")
]
LayoutOption = Annotated[Layout, typer.Option("--batching", help="transformers: layout where --batch-size is above 1.")]
ScoringOption = Annotated[
    Scoring, typer.Option("--scoring", help="vLLM, given completions only: prefill, or decode with each token forced.")
]
ShardSize = Annotated[int, typer.Option(min=1, help="Sequences per shard: the unit of resuming.")]
MaxModelLen = Annotated[int | None, typer.Option(min=2, help="vLLM's max_model_len; default: what the prompts need.")]
TensorParallel = Annotated[int, typer.Option("--tensor-parallel-size", min=1, help="vLLM's tensor_parallel_size.")]
GpuMemory = Annotated[float | None, typer.Option(help="vLLM's gpu_memory_utilization.")]
MaxNumSeqs = Annotated[int | None, typer.Option(min=1, help="vLLM's max_num_seqs.")]
MaxBatched = Annotated[int | None, typer.Option(min=1, help="vLLM's max_num_batched_tokens.")]
VllmOption = Annotated[
    list[str] | None, typer.Option("--vllm-option", metavar="KEY=VALUE", help="Any other vLLM option; may be repeated.")
]
AttnImplementation = Annotated[str | None, typer.Option(help="transformers' attn_implementation.")]
ExpertsImplementation = Annotated[str | None, typer.Option(help="transformers' experts_implementation.")]
DeviceMap = Annotated[str | None, typer.Option(help="transformers' device_map.")]
InferCheckpoint = Annotated[
    str | None,
    typer.Option(
        "--infer-checkpoint",
        metavar="OTHER",
        callback=checkpoint_there,
        help="vLLM loads this instead of CKPT: quantised rollout weights, a converted folder, an older step.",
    ),
]
ServerUrl = Annotated[
    str | None,
    typer.Option(
        "--server",
        metavar="URL",
        help="A running vLLM or SGLang server is the infer engine; CKPT is what it serves. Its key: "
        "MOEDIAG_SERVER_KEY; requests at a time: --max-num-seqs (16).",
    ),
]
ServerModel = Annotated[
    str | None,
    typer.Option("--server-model", metavar="NAME", help="Which of the server's models; default: its only one."),
]
Ray = Annotated[
    bool, typer.Option("--ray", help="Engines on a Ray cluster fill the arms together, shard by shard (moediag[ray]).")
]
RayAddress = Annotated[
    str | None,
    typer.Option(metavar="ADDRESS", help="The Ray cluster's; default: RAY_ADDRESS, else the one here, else a new one."),
]
RayTasks = Annotated[
    bool, typer.Option("--ray", help="Tasks on a Ray cluster share the work; all nodes see the folder (moediag[ray]).")
]
NumTasks = Annotated[
    int | None,
    typer.Option("--num-workers", min=1, help="Tasks on Ray at a time; default: one per CPU."),
]
NumEngines = Annotated[
    int | None,
    typer.Option(
        "--num-workers", min=1, help="Engines on Ray; default: as many as its GPUs hold, without GPUs one per node."
    ),
]
GpusPerWorker = Annotated[
    int | None, typer.Option(min=0, help="GPUs of an engine on Ray, all of one node; default: --tensor-parallel-size.")
]
OtherCheckpoint = Annotated[
    bool,
    typer.Option("--other-checkpoint", help="CKPT is another checkpoint than the run's: how the two differ is kept."),
]
ArmName = Annotated[
    str | None, typer.Option("--name", metavar="NAME", help="What the arm is called; default: as its recipe.")
]
Replay = Annotated[
    bool, typer.Option("--replay", help="Add the arm train-replay: transformers with vLLM's experts forced (MoE only).")
]
Floors = Annotated[
    bool,
    typer.Option(
        "--floors/--no-floors",
        help="Measure noise floors: each engine against itself in other batches, and the scale of one-ulp noise.",
    ),
]
Float32 = Annotated[
    bool | None,
    typer.Option(
        "--fp32/--no-fp32",
        help="Run both engines in float32 as well, on the first sequences: do they compute the same function? "
        "Default: with floors, where the model fits.",
        show_default=False,
    ),
]
ProductionRollouts = Annotated[
    bool,
    typer.Option(
        "--production-rollouts",
        help="Sample as rollouts run (graphs, prefix cache, your own --vllm-option), unobserved; then decode the same "
        "tokens again, observed: what did observation change?",
    ),
]
ReplayWeights = Annotated[
    bool, typer.Option("--replay-weights", help="train-replay: force vLLM's gate weights too, not only its experts.")
]
ReplayLayers = Annotated[
    str | None, typer.Option(metavar="FIRST:LAST", help="train-replay: MoE layers to force, inclusive; default all.")
]
TrainingWindow = Annotated[
    int | None, typer.Option(min=1, help="Length the model was trained on [tokens]; marked in the drift figure.")
]
NoText = Annotated[
    bool, typer.Option("--no-text", help="Keep prompts and responses out of the pages: no token, no text around it.")
]
Pdf = Annotated[bool, typer.Option("--pdf", help="Write the figures as PDF too, beside PNG and SVG.")]
ShardIndex = Annotated[
    int | None, typer.Option("--shard-index", metavar="I", help="Which of --num-shards workers this one is, from 0.")
]
NumShards = Annotated[
    int | None,
    typer.Option("--num-shards", metavar="N", help="Workers that fill the run; this one takes every N-th shard."),
]
Force = Annotated[
    bool, typer.Option("--force", help="Start anew: the run that is there goes once the new one is complete.")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Say what would run and how much it would write; start and write nothing.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
WORKERS: Final = "MOEDIAG_WORKERS"
Workers = Annotated[
    int | None,
    typer.Option("--workers", min=1, envvar=WORKERS, help="Processes that read and analyse; all cores by default."),
]


def n_workers(workers: int | None = None) -> int:
    """Processes that analyse: as many as given, or as the environment says, or one a core."""
    given = os.environ.get(WORKERS, "")
    if workers is None and given and not (given.isascii() and given.isdigit() and int(given) > 0):
        raise RunError(f"{WORKERS}={given!r}: expected the number of processes that analyse, such as 4")
    return workers or int(given or os.cpu_count() or 1)


def cluster_options(ray: bool, tensor_parallel_size: int, **given: Any) -> ClusterOptions | None:
    """Which Ray cluster, and what of it; None without --ray.

    Args:
        tensor_parallel_size: GPUs of an engine; 0 = none runs there.
        given: further options of :class:`~moediag.engines.cluster.ClusterOptions` as they were given.

    Raises:
        DependencyError: ray is not installed, or too old.
        EngineError: there is no such cluster, or an option that needs --ray is given without it.
    """
    if not ray:
        for name, value in given.items():
            if value is not None:
                option = "--ray-address" if name == "address" else f"--{name.replace('_', '-')}"
                raise EngineError(f"{option} is of no effect without --ray")
        return None
    from moediag.engines.cluster import ClusterOptions

    return ClusterOptions(**given, tensor_parallel_size=tensor_parallel_size).check()


@contextmanager
def pool(folder: Path, cluster: ClusterOptions | None, workers: int | None) -> Iterator[int | Pool]:
    """Who does the steps of a command: tasks on a Ray cluster that share ``folder``, or processes here."""
    if cluster is None:
        yield n_workers(workers)
        return
    with tasks(folder, cluster) as found:
        yield found


def tasks(folder: Path, cluster: ClusterOptions) -> Tasks:
    """Tasks on a Ray cluster that share ``folder``."""
    from moediag.cli.console import note
    from moediag.engines.cluster import Tasks

    return Tasks(cluster, folder, lambda line: note(f"Ray      {line}"))


Strict = Annotated[
    bool, typer.Option("--strict", help="Exit code 3 when the rules of validate find an error in the tokens.")
]
TrustPickle = Annotated[
    bool, typer.Option("--trust-pickle", help="Open a dump that is a pickle; nothing in it is run.")
]
TokensTable = Annotated[
    Path | None,
    typer.Option("--tokens", metavar="TABLE", help="Token ids and boundaries, for a dump that has none."),
]
NOT_SO: Final = 3
"""Exit code: the answer is no."""


def refuse_errors(findings: Iterable[Finding]) -> None:
    """End with :data:`NOT_SO` where a finding is an error."""
    if any(found.level == "error" for found in findings):
        raise typer.Exit(NOT_SO)


def check_arm_name(name: str | None) -> str | None:
    """The name of an arm, which is a folder's name and a part of its pairs'.

    Raises:
        RunError: it cannot be one.
    """
    if name is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise RunError(f"--name {name}: expected letters, digits, '.', '_' and '-', beginning with a letter or digit")
    return name


def parse_full_vocab(text: str | None, observer: Observer) -> int | None:
    """Sequences that keep whole distributions; more than there are for ``all``, None to let the plan decide.

    Raises:
        EngineError: not a number, or vLLM's routing is not seen by hooks, which see the distributions, too.

    Example:
        >>> parse_full_vocab("8", Observer.hooks), parse_full_vocab(None, Observer.native)
        (8, 0)
    """
    if text is None:
        return None if observer == Observer.hooks else 0
    if text != "all" and not text.isdecimal():
        raise EngineError(f"--full-vocab {text}: expected a number of sequences, or all")
    n_chosen = _ALL_SEQUENCES if text == "all" else int(text)
    if n_chosen and observer != Observer.hooks:
        raise EngineError(f"--full-vocab {text} needs --observer hooks: vLLM's own record holds expert ids only")
    return n_chosen


def parse_layers(text: str | None) -> dict[str, int | None]:
    """``FIRST:LAST`` as replay options; either end may be left out.

    Raises:
        EngineError: not two numbers, or the first is larger.

    Example:
        >>> parse_layers("2:5"), parse_layers("3:")
        ({'first_layer': 2, 'last_layer': 5}, {'first_layer': 3, 'last_layer': None})
    """
    if text is None:
        return {"first_layer": None, "last_layer": None}
    first, colon, last = text.partition(":")
    numbers = [int(part) if part.isdigit() else None for part in (first, last)]
    is_wrong = any(number is None and part for number, part in zip(numbers, (first, last), strict=True))
    if not colon or is_wrong or (None not in numbers and numbers[0] > numbers[1]):  # type: ignore[operator]
        raise EngineError(f"--replay-layers {text}: expected FIRST:LAST, e.g. --replay-layers 0:11")
    return {"first_layer": numbers[0], "last_layer": numbers[1]}


def parse_batching(batch_size: int, layout: Layout) -> dict[str, Any] | None:
    """The train arms' batching; None for the reference.

    Example:
        >>> parse_batching(4, Layout.padded)
        {'batch_size': 4, 'layout': 'padded'}
    """
    return None if batch_size == 1 else {"batch_size": batch_size, "layout": layout.value}


def parse_slice(shard_index: int | None, num_shards: int | None) -> Slice:
    """The worker's slice; without both options it takes every shard it can get.

    Raises:
        RunError: only one of the two is given, or there is no such worker.

    Example:
        >>> str(parse_slice(1, 4))
        '1/4'
    """
    from moediag.run.capture import Slice

    if (shard_index is None) != (num_shards is None):
        given, lacking = "--shard-index", "--num-shards"
        if shard_index is None:
            given, lacking = lacking, given
        raise RunError(
            f"{given} is given without {lacking}; a worker is named by both, e.g. --shard-index 0 --num-shards 2"
        )
    return Slice(shard_index or 0, 1 if num_shards is None else num_shards).check()


def parse_vllm_options(pairs: list[str] | None) -> dict[str, Any]:
    """``KEY=VALUE`` pairs; a value that is JSON is read as JSON, anything else is text.

    Raises:
        EngineError: a pair without ``=``.

    Example:
        >>> parse_vllm_options(["block_size=16", "moe-backend=triton"])
        {'block_size': 16, 'moe_backend': 'triton'}
    """
    options: dict[str, Any] = {}
    for pair in pairs or []:
        key, equals, text = pair.partition("=")
        if not equals or not key:
            raise EngineError(f"--vllm-option {pair}: expected KEY=VALUE, e.g. --vllm-option block_size=16")
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        options[key.replace("-", "_")] = value
    return options
