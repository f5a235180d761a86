"""Every changed byte of a run is found, in derived files and logs too; what is merely stale is no damage."""

from __future__ import annotations

import contextlib
import random
import shutil
from pathlib import Path

import pytest
import safetensors.numpy
from conftest import HUNT, SEED
from scripted_engine import make_scripted_run, write_scripted_shard
from test_gradients_figures import inner_products

from moediag.analysis.gradients import captures_digest, is_audited, write_audit
from moediag.corrections.chosen import choose
from moediag.corrections.sources import run_source
from moediag.errors import MoediagError, RunError
from moediag.hygiene import check_run
from moediag.results import analyze_run, report_run
from moediag.run import logs
from moediag.run.derived import AUDIT_RECORD, GRADIENTS, GRAMS, begin_report, derived_damage
from moediag.run.files import read_sealed, sha256_bytes, write_atomic, write_sealed
from moediag.run.logs import kept
from moediag.run.reader import Run, open_run
from moediag.run.writer import RunWriter
from moediag.simulation import simulate, write_simulation

N_FLIPS = 500 * HUNT
DERIVED = ("figures", "analysis", "logs", "report.md", "simulate", "gradients")
SIMULATED = "simulate/infer~train"


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with everything a run can hold: arms, analysis, figures, report, simulation, gradient audit, a log."""
    run = make_scripted_run(tmp_path_factory.mktemp("derived") / "run", n_prompts=2, n_layers=2)
    analyze_run(run)
    report_run(run)
    write_simulated(run, "icepop")
    write_engine_record(run)
    write_audit(run)
    with kept(run.path / "logs" / "infer.log") as log:
        log.write(b"engine chatter\n" * 20)
    return run.path


def write_simulated(run: Run, method: str) -> None:
    """What `moediag simulate RUN --method METHOD` writes."""
    source = run_source(run, ("infer", "train"), None)
    simulation = simulate(source, choose([method], []), run.path.name)
    write_simulation(simulation, run.path / "simulate" / "infer~train", [], force=True)


def write_engine_record(run: Run) -> None:
    """What the audit's engine leaves, of inner products made by hand: the frames are made from it."""
    record, arrays = inner_products()
    data = safetensors.numpy.save(arrays)
    write_atomic(run.path / GRADIENTS / GRAMS, data)
    write_sealed(
        run.path / GRADIENTS / AUDIT_RECORD,
        {
            **record,
            "request": {"train": "train", "infer": "infer"},
            "captures": captures_digest(run, "train", "infer"),
            "grams_sha256": sha256_bytes(data),
        },
    )


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
def test_each_flipped_bit_in_all_files_is_found(run: Run) -> None:
    """Figures, pages and logs had no digest, so that a changed number in them passed `moediag validate`."""
    rng = random.Random(SEED)
    files = sorted(path for path in run.path.rglob("*") if path.is_file())
    kinds = {path.relative_to(run.path).parts[0] for path in files}
    assert {"figures", "analysis", "tokens", "arms", "logs", "simulate", "gradients"} <= kinds
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


@pytest.mark.parametrize(
    ("name", "advice"),
    [("report.md", "moediag report"), ("figures/figure1.svg", "moediag report"), ("summary.json", "is not named"),
     ("analysis/infer~train/tokens.parquet", "moediag analyze"), ("report.json", "is not named by report.json"),
     (f"{SIMULATED}/report.html", "run the same moediag simulate"), (f"{SIMULATED}/overlap.parquet", "simulate"),
     (f"{SIMULATED}/simulation.json", "is not named by simulation.json"), (f"gradients/{GRAMS}", "--gradient-audit"),
     ("gradients/record.json", "--gradient-audit"), ("gradients/gradient_audit.parquet", "--gradient-audit"),
     ("gradients/audit.json", "is not named by audit.json")],
)  # fmt: skip
def test_a_derived_file_that_is_missing_is_found_with_what_to_do(run: Run, name: str, advice: str) -> None:
    (run.path / name).unlink()
    assert advice in derived_damage(run.path)[0][1]


def test_a_file_that_its_seal_does_not_know_is_found(run: Run) -> None:
    foreign = {"figures/other.png", "analysis/infer~train/extra.parquet", "gradients/x.npy", "simulate/stray",
               f"{SIMULATED}/extra.parquet", f"{SIMULATED}/figures/a.png"}  # fmt: skip
    for name in foreign:
        (run.path / name).write_bytes(b"x")
    assert {where for where, _ in derived_damage(run.path)} == foreign


@pytest.mark.parametrize("kind", ["simulate", "gradients"])
def test_every_file_of_a_simulation_and_an_audit_is_found_changed_or_missing(run: Run, kind: str) -> None:
    """Both folders were left out: a changed number in a simulation's page passed `moediag validate`."""
    files = sorted(path for path in (run.path / kind).rglob("*") if path.is_file())
    suffixes = {"simulate": {".json", ".parquet", ".png", ".svg", ".pdf", ".md", ".html"},
                "gradients": {".json", ".parquet", ".safetensors"}}  # fmt: skip
    assert {path.suffix for path in files} == suffixes[kind]
    for path in files:
        original, where = path.read_bytes(), path.relative_to(run.path).as_posix()
        path.write_bytes(bytes([original[0] ^ 1]) + original[1:])
        assert [found for found, _ in derived_damage(run.path)] == [where]
        path.unlink()
        found = {found for found, _ in derived_damage(run.path)}
        is_seal = path.name in ("simulation.json", "audit.json")
        assert len(found) == len(files) - 1 if is_seal else found == {where}
        path.write_bytes(original)
    assert derived_damage(run.path) == []


def test_a_simulation_that_was_killed_half_way_is_told_and_repaired_by_the_same_command(run: Run) -> None:
    seal = run.path / SIMULATED / "simulation.json"
    write_sealed(seal, {name: value for name, value in read_sealed(seal).items() if name != "files"})
    assert [where for where, _ in derived_damage(run.path)] == [f"{SIMULATED}/simulation.json"]
    write_simulated(run, "icepop")
    assert derived_damage(run.path) == []


def test_simulations_below_each_other_answer_for_their_own_files(run: Run) -> None:
    inner = run.path / SIMULATED / "wide"
    shutil.copytree(run.path / SIMULATED, inner)
    assert derived_damage(run.path) == []
    (inner / "report.md").write_bytes(b"x")
    assert [where for where, _ in derived_damage(run.path)] == [f"{SIMULATED}/wide/report.md"]


def test_files_of_the_users_own_elsewhere_in_a_run_are_left_alone(run: Run) -> None:
    for name in ("notes.txt", "mine/simulation.json", "mine/gradients/audit.json"):
        (run.path / name).parent.mkdir(parents=True, exist_ok=True)
        (run.path / name).write_bytes(b"x")
    assert derived_damage(run.path) == []


@pytest.mark.parametrize("name", [GRAMS, AUDIT_RECORD, "gradient_audit.parquet"])
def test_an_audit_that_is_damaged_is_made_again_by_the_same_command(run: Run, name: str) -> None:
    """Else the advice to run it again would end at `the audit of these arms is there already`."""
    told = {"request": {"train": "train", "infer": "infer"}, "captures": captures_digest(run, "train", "infer")}
    assert is_audited(run, told)
    (run.path / GRADIENTS / name).write_bytes(b"x")
    assert not is_audited(run, told)


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


def test_a_report_that_was_killed_half_way_is_told_and_repaired_by_the_same_command(
    run: Run,
) -> None:
    """The seal of an earlier report must not vouch for what a killed one left."""
    begin_report(run.path)
    assert {where for where, _ in derived_damage(run.path)} >= {"report.md", "figures/figure1.png"}
    report_run(run)
    assert derived_damage(run.path) == []


def test_a_log_is_appended_to_and_sealed_as_far_as_it_was_written(run: Run) -> None:
    """A resumed capture used to overwrite the log of the one before, and with it why it had failed."""
    log = run.path / "logs" / "infer.log"
    with contextlib.suppress(KeyboardInterrupt), kept(log) as file:
        file.write(b"second engine\n")
        raise KeyboardInterrupt
    assert log.read_bytes() == b"engine chatter\n" * 20 + b"second engine\n"
    assert derived_damage(run.path) == []
    with log.open("ab") as file:
        file.write(b"a third, still running")
    assert derived_damage(run.path) == []
    log.write_bytes(log.read_bytes()[:50])
    assert [where for where, _ in derived_damage(run.path)] == ["logs/infer.log"]


def test_a_log_and_a_seal_of_different_machines_never_meet(run: Run, tmp_path: Path) -> None:
    """A killed engine's log would be condemned by the seal that a merge brought along, were it not sealed at once."""
    log = run.path / "logs" / "train.log"
    with contextlib.suppress(KeyboardInterrupt), kept(log):
        assert log.with_name("train.log.json").exists()
        raise KeyboardInterrupt
    assert logs.log_damage(log) is None


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MoediagError, match="not a moediag run"):
        derived_damage(tmp_path)
