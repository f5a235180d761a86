"""Every changed byte of captures, tables, frames and summaries is found; what is merely stale is no damage."""

from __future__ import annotations

import random
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import safetensors.numpy
from conftest import HUNT, SEED
from scripted_engine import make_scripted_run, write_scripted_shard
from test_gradients_figures import inner_products

from moediag.audit.gradients import RECORD, GradientRequest, is_audited, seal_audit
from moediag.corrections import choose
from moediag.corrections.sources import run_source
from moediag.errors import MoediagError, RunError
from moediag.hygiene import check_run
from moediag.results import analyze_run, report_run
from moediag.results.simulation import simulate, write_simulation
from moediag.run.derived import GRADIENTS, GRAMS, captures_digest, derived_damage
from moediag.run.files import read_sealed, sha256_bytes, write_atomic, write_sealed
from moediag.run.reader import Run, open_run
from moediag.run.writer import RunWriter

N_FLIPS = 200 if HUNT == 1 else 500 * HUNT
DERIVED = ("analysis", "simulate", "gradients")
UNSEALED = {".png", ".svg", ".md", ".html", ".log"}
"""Figures, pages and logs: drawn again at any time, or of the engines."""
SIMULATED = "simulate/infer~train"


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with everything a run can hold: arms, analysis, figures, report, simulation, gradient audit, a log."""
    run = make_scripted_run(tmp_path_factory.mktemp("derived") / "run", n_prompts=2, n_layers=2)
    analyze_run(run)
    report_run(run)
    write_simulated(run, "icepop")
    write_audited(run)
    write_atomic(run.path / "logs" / "infer.log", b"engine chatter\n" * 20)
    return run.path


def write_simulated(run: Run, method: str) -> None:
    """What `moediag simulate RUN --method METHOD` writes."""
    source = run_source(run, ("infer", "train"), None)
    simulation = simulate(source, choose([method], []), run.path.name)
    write_simulation(simulation, run.path / SIMULATED, [])


def write_audited(run: Run) -> None:
    """What `moediag simulate RUN --gradient-audit` writes, of inner products made by hand."""
    record, arrays = inner_products()
    data = safetensors.numpy.save(arrays)
    folder = run.path / GRADIENTS
    write_atomic(folder / GRAMS, data)
    write_sealed(folder / RECORD, {**record, "request": asdict(GradientRequest()), "grams_sha256": sha256_bytes(data)})
    seal_audit(folder, captures_digest(run, ("train", "infer")))


@pytest.fixture
def run(reported: Path, tmp_path: Path) -> Run:
    """A copy that a test may spoil."""
    return open_run(shutil.copytree(reported, tmp_path / "run"))


def test_a_healthy_run_has_no_damage(run: Run) -> None:
    assert derived_damage(run.path) == []
    assert check_run(run) == []


def is_found(run: Path) -> bool:
    try:
        return any(finding.level == "error" for finding in check_run(open_run(run)))
    except RunError:
        return True


@pytest.mark.timeout(900 * HUNT)
def test_each_flipped_bit_in_all_sealed_files_is_found(run: Run) -> None:
    """Captures, token tables, frames and summaries; a figure or a page is drawn again from them."""
    rng = random.Random(SEED)
    files = sorted(path for path in run.path.rglob("*") if path.is_file() and path.suffix not in UNSEALED)
    kinds = {path.relative_to(run.path).parts[0] for path in files}
    assert {"analysis", "tokens", "arms", "simulate", "gradients", "summary.json"} <= kinds
    for i in range(N_FLIPS):
        path = files[i % len(files)]
        original = path.read_bytes()
        at, bit = rng.randrange(len(original)), rng.randrange(8)
        path.write_bytes(original[:at] + bytes([original[at] ^ 1 << bit]) + original[at + 1 :])
        is_derived = path.relative_to(run.path).parts[0] in DERIVED
        # The whole of validate costs three times as much: for derived files it is asked once per file.
        found = bool(derived_damage(run.path)) if is_derived and i >= len(files) else is_found(run.path)
        assert found, f"{path.relative_to(run.path)} byte {at} bit {bit}"
        path.write_bytes(original)
    assert not is_found(run.path)


def test_figures_pages_and_logs_are_not_sealed(run: Run) -> None:
    files = sorted(path for path in run.path.rglob("*") if path.suffix in UNSEALED)
    assert {path.suffix for path in files} == UNSEALED
    for path in files:
        path.write_bytes(b"edited")
    assert derived_damage(run.path) == []


@pytest.mark.parametrize(
    ("name", "advice"),
    [("summary.json", "is not named"), ("analysis/infer~train/tokens.parquet", "moediag analyze"),
     (f"{SIMULATED}/overlap.parquet", "run the same moediag simulate"),
     (f"{SIMULATED}/summary.json", "delete the folder"), (f"gradients/{GRAMS}", "--gradient-audit"),
     ("gradients/gradient_audit.parquet", "--gradient-audit"),
     ("gradients/summary.json", "is not named by summary.json")],
)  # fmt: skip
def test_a_sealed_file_that_is_missing_is_found_with_what_to_do(run: Run, name: str, advice: str) -> None:
    (run.path / name).unlink()
    assert advice in derived_damage(run.path)[0][1]


def test_a_frame_that_no_summary_names_is_found(run: Run) -> None:
    foreign = {"analysis/infer~train/extra.parquet", "gradients/extra.parquet", f"{SIMULATED}/extra.parquet"}
    for name in foreign:
        (run.path / name).parent.mkdir(exist_ok=True)
        (run.path / name).write_bytes(b"x")
    assert {where for where, _ in derived_damage(run.path)} == foreign


def test_frames_of_a_simulation_without_its_summary_are_one_finding_with_an_advice_that_works(run: Run) -> None:
    """Bug: of a simulation by an earlier moediag every frame was an error, and to make it again was refused."""
    (run.path / SIMULATED / "summary.json").unlink()
    ((where, message),) = derived_damage(run.path)
    assert where == SIMULATED
    assert message.endswith("delete the folder")
    shutil.rmtree(run.path / where)
    assert derived_damage(run.path) == []
    write_simulated(run, "icepop")


@pytest.mark.parametrize("kind", ["simulate", "gradients"])
def test_every_sealed_file_of_a_simulation_and_an_audit_is_found_changed_or_missing(run: Run, kind: str) -> None:
    """Both folders were left out: a changed number in a simulation passed `moediag validate`."""
    files = sorted(path for path in (run.path / kind).rglob("*") if path.is_file() and path.suffix not in UNSEALED)
    suffixes = {"simulate": {".json", ".parquet"}, "gradients": {".json", ".parquet", ".safetensors"}}
    assert {path.suffix for path in files} == suffixes[kind]
    for path in files:
        original, where = path.read_bytes(), path.relative_to(run.path).as_posix()
        path.write_bytes(bytes([original[0] ^ 1]) + original[1:])
        assert [found for found, _ in derived_damage(run.path)] == [where]
        path.unlink()
        found = {found for found, _ in derived_damage(run.path)}
        if path.name == "summary.json":
            others = {other.relative_to(run.path).as_posix() for other in files if other != path}
            assert found == ({SIMULATED} if kind == "simulate" else others)
        else:
            assert found == {where}
        path.write_bytes(original)
    assert derived_damage(run.path) == []


def test_a_simulation_that_another_process_makes_just_now_is_no_damage(run: Run) -> None:
    shutil.copytree(run.path / SIMULATED, run.path / "simulate" / ".wide.host-1.new" / "wide")
    (run.path / "simulate" / ".wide.host-1.new" / "wide" / "summary.json").unlink()
    assert derived_damage(run.path) == []


def test_files_of_the_users_own_elsewhere_in_a_run_are_left_alone(run: Run) -> None:
    for name in ("notes.txt", "mine/simulation.json", "mine/gradients/audit.json"):
        (run.path / name).parent.mkdir(parents=True, exist_ok=True)
        (run.path / name).write_bytes(b"x")
    assert derived_damage(run.path) == []


@pytest.mark.parametrize("name", [GRAMS, "summary.json", "gradient_audit.parquet"])
def test_an_audit_that_is_damaged_is_made_again_by_the_same_command(run: Run, name: str) -> None:
    """Else the advice to run it again would end at `the audit of these arms is there already`."""
    assert is_audited(run, GradientRequest())
    assert not is_audited(run, GradientRequest(n_sequences=1))
    (run.path / GRADIENTS / name).write_bytes(b"x")
    assert not is_audited(run, GradientRequest())


def test_a_summary_of_another_version_is_found(run: Run) -> None:
    write_sealed(run.path / "summary.json", {**read_sealed(run.path / "summary.json"), "schema_version": 999})
    assert derived_damage(run.path)[0][0] == "summary.json"


@pytest.mark.parametrize("content", [{}, {"provenance": 1}, {"provenance": {"frames": {"infer~train": 5}}}])
def test_a_sealed_summary_that_names_no_frames_is_found(run: Run, content: dict[str, object]) -> None:
    version = {"schema_version": read_sealed(run.path / "summary.json")["schema_version"]}
    write_sealed(run.path / "summary.json", {**version, **content})
    assert ("summary.json", "does not name its files; run: moediag analyze " + str(run.path)) in derived_damage(
        run.path
    )


def test_a_stale_analysis_is_no_damage(run: Run) -> None:
    (run.path / "arms/train/shard-00000.safetensors").unlink()
    (run.path / "arms/train/shard-00000.json").unlink()
    assert derived_damage(run.path) == []
    write_scripted_shard(RunWriter(run), "train", run.shards[0])
    assert derived_damage(run.path) == []


def test_foreign_files_among_the_shards_are_found(run: Run) -> None:
    """A shard outside the shard table, or of no arm, was never looked at."""
    foreign = ["arms/infer/shard-00009.safetensors", "arms/infer/notes.txt", "tokens/shard-00009.json",
               "arms/nobody/shard-00000.json", "arms/stray", "tokens/shard-00000.safetensors"]  # fmt: skip
    for name in foreign:
        (run.path / name).parent.mkdir(exist_ok=True)
        (run.path / name).write_bytes(b"x")
    (run.path / "arms/infer/.shard-00000.json.host-1.tmp").write_bytes(b"x")  # a writer's own business
    assert {where for where, _ in derived_damage(run.path)} == set(foreign)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MoediagError, match="not a moediag run"):
        derived_damage(tmp_path)
