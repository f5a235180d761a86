"""Figures and tables of reports/rl.md, from what benchmarks/rl.py left in its folder, and the times of its stages.

Run from the repository root: ``python benchmarks/rl_page.py FOLDER``. Only steps that every run has count, in windows
of ten. An interval is Student's over seeds, of each seed's own number: it says how far four trainings differ, and
nothing of other models or tasks.
"""

from __future__ import annotations

import json
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from committed_tables import REPORTS, commit_table, markdown

from moediag.figures.style import DENSE_COLOURS, INK, MOE_COLOURS, add_words, house_style, new_figure, save_figure
from moediag.hygiene.rules import NOTE
from moediag.numbers import sig
from moediag.run.files import write_atomic
from moediag.statistics.intervals import student_t
from moediag.watch import STEPS

ENGINES: Final = ("bf16", "8-bit")
CORRECTIONS: Final = ("none", "tis", "icepop")
STYLES: Final = {"none": (INK, "-"), "tis": (DENSE_COLOURS[0], (0, (4, 1.5))), "icepop": (MOE_COLOURS[0], "-")}
WORDS: Final = {"none": "no correction", "tis": "TIS", "icepop": "IcePop"}
WINDOW: Final = 10
STAGES: Final = {
    "push": "push weights into vLLM",
    "rollout": "sample with vLLM",
    "forward": "forward pass",
    "watch": "`watch.step`",
    "update": "correction, backward pass, AdamW",
}
MASKED, MASKED_ENTROPY = "masked_share.ring-1t", "masked_entropy.ring-1t"
PANELS: Final = {
    "reward": ("Reward", "share of bytes"),
    "entropy": ("Entropy of the policy", "nat"),
    "abs_logp_diff.mean": ("Mean abs logp diff", "nat"),
    "kl_infer_train_k3": ("KL (k3)", "nat"),
    "abs_prob_diff.max": ("Largest probability difference", "per step"),
    MASKED: ("Outside IcePop's band 0.5 to 5", "per mille of tokens"),
}


def main(folder: Path) -> None:
    """Read the runs, draw, put the tables in their places."""
    steps = read(folder)
    draw(steps)
    for name, table in {"levels": levels, "against none": against_none, "masked": masked, "seconds": seconds}.items():
        commit_table("rl.md", name, table(steps))
    commit_table("rl.md", "trend", verdicts(folder, steps))


def read(folder: Path) -> pd.DataFrame:
    """A row per run and step: engine, correction, seed, step, the watch's columns and those of train.jsonl."""
    frames = []
    for path in sorted(folder.glob(f"*/{STEPS}")):
        engine, correction, seed = path.parent.name.rsplit("-", 2)
        seen, trained = (pd.DataFrame(map(json.loads, _whole(path.with_name(name)))) for name in (STEPS, "train.jsonl"))
        both = seen.merge(trained.drop(columns="masked_share"), on="step")
        frames.append(both.assign(engine=engine, correction=correction, seed=int(seed)))
    n_steps = min(len(frame) for frame in frames) // WINDOW * WINDOW
    steps = pd.concat(frames, ignore_index=True)
    steps = steps[steps["step"] < n_steps].assign(window=lambda frame: frame["step"] // WINDOW)
    # the entropy of what is masked and of all, as sums over tokens: steps differ in how many they mask
    steps["n_masked"] = (steps[MASKED] * steps["n_tokens"]).round()
    steps["masked_nats"] = (steps[MASKED_ENTROPY].astype(float) * steps["n_masked"]).fillna(0.0)
    steps["nats"] = steps["entropy"] * steps["n_tokens"]
    steps["diff over entropy"] = steps["abs_logp_diff.mean"] / steps["entropy"]
    return steps


def _whole(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def interval(value_S: Any) -> tuple[float, float, float]:
    """Mean over seeds, and its 95 % bounds; no bounds of fewer than three seeds."""
    value_S = np.asarray(value_S, dtype=float)
    mean, n = float(value_S.mean()), len(value_S)
    half = float(student_t(n - 1)) * value_S.std(ddof=1) / np.sqrt(n) if n > 2 else np.nan
    return mean, mean - half, mean + half


def words(value_S: Any, factor: float = 1.0, digits: int = 3) -> str:
    """``0.5 [0.4, 0.6]``, or the values themselves where seeds are too few."""
    value_S = factor * np.asarray(value_S, dtype=float)
    if len(value_S) < 3:
        return ", ".join(sig(value, digits) for value in value_S)
    mean, low, high = interval(value_S)
    return f"{sig(mean, digits)} [{sig(low, digits)}, {sig(high, digits)}]"


def of_seeds(rows: pd.DataFrame, name: str) -> np.ndarray:
    """Each seed's mean over the rows."""
    return rows.groupby("seed")[name].mean().to_numpy()


def _ends(steps: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    return steps[steps["window"] == 0], steps[steps["window"] == steps["window"].max()]


def levels(steps: pd.DataFrame) -> str:
    """First ten steps, which corrections have hardly changed yet, and last ten of every correction."""
    names = {"reward": 1.0, "entropy": 1.0, "abs_logp_diff.mean": 1e3, "diff over entropy": 1e3,
             "kl_infer_train_k3": 1e3, "abs_prob_diff.max": 1.0}  # fmt: skip
    rows = []
    for engine in ENGINES:
        first, last = _ends(steps[steps["engine"] == engine])
        there = {"all": first} | {correction: last[last["correction"] == correction] for correction in CORRECTIONS}
        for correction, one in there.items():
            when = f"first {WINDOW}" if correction == "all" else f"last {WINDOW}"
            cells = [words(of_seeds(one, name), factor) for name, factor in names.items()]
            rows.append([engine, when, WORDS.get(correction, correction), *cells])
    header = ["rollouts", "steps", "correction", "reward [share of bytes]", "entropy [nat]",
              "mean abs logp diff [1e-3 nat]", "the same over entropy [1e-3]", "k3 [1e-3 nat]",
              "largest probability difference of a step"]  # fmt: skip
    return markdown(header, rows)


def against_none(steps: pd.DataFrame) -> str:
    """Last ten steps of a correction minus those without, seed by seed."""
    _, last = _ends(steps)
    names = {"reward": 1.0, "entropy": 1.0, "abs_logp_diff.mean": 1e3, "kl_infer_train_k3": 1e3}
    rows = []
    for engine in ENGINES:
        there = {one: last[(last["engine"] == engine) & (last["correction"] == one)] for one in CORRECTIONS}
        for correction in CORRECTIONS[1:]:
            apart = [
                words(of_seeds(there[correction], name) - of_seeds(there["none"], name), factor)
                for name, factor in names.items()
            ]
            rows.append([engine, f"{WORDS[correction]} minus none", *apart])
    header = ["rollouts", "difference", "reward", "entropy [nat]", "mean abs logp diff [1e-3 nat]", "k3 [1e-3 nat]"]
    return markdown(header, rows)


def masked(steps: pd.DataFrame) -> str:
    """What IcePop's band leaves out, by third of the training, and how uncertain it was."""
    rows = []
    third = _third(steps)
    for engine in ENGINES:
        for nth, when in enumerate(("first third", "second", "last")):
            there = steps[(steps["engine"] == engine) & (third == nth)]
            sums = there.groupby("seed")[["n_masked", "masked_nats", "nats", "n_tokens"]].sum()
            narrow = of_seeds(there, "masked_share.glm-5")
            n, n_all = sums["n_masked"], sums["n_tokens"]
            entropy, entropy_masked = sums["nats"] / n_all, sums["masked_nats"] / n
            of_masked = [words(entropy_masked), words(entropy_masked / entropy)] if (n > 0).all() else ["-", "-"]
            shares = [words(n / n_all, 1e3), words(narrow, 1e3)]
            counts = f"{int(n.sum()):,} of {int(n_all.sum()):,}"
            rows.append([engine, when, *shares, words(entropy), *of_masked, counts])
    header = ["rollouts", "steps", "outside 0.5 to 5 [per mille]", "outside 0.5 to 2 [per mille]",
              "entropy of all [nat]", "entropy of those outside 0.5 to 5 [nat]", "this over that of all",
              "n outside 0.5 to 5"]  # fmt: skip
    return markdown(header, rows)


def _third(steps: pd.DataFrame) -> pd.Series:
    return (3 * steps["step"] // (steps["step"].max() + 1)).clip(upper=2)


def seconds(steps: pd.DataFrame) -> str:
    """Median seconds of a stage and its share of a step, over the last third of the training."""
    steps = steps[_third(steps) == 2]
    median = {stage: float(steps[f"{stage} [s]"].median()) for stage in STAGES}
    high = {stage: float(steps[f"{stage} [s]"].quantile(0.9)) for stage in STAGES}
    total = float(sum(steps[f"{stage} [s]"] for stage in STAGES).median())
    rows = [[name, sig(median[stage]), sig(high[stage]), f"{sig(100 * median[stage] / total, 2)} %"]
            for stage, name in STAGES.items()]  # fmt: skip
    rows.append(["whole step", sig(total), "", "100 %"])
    return markdown(["stage", "median [s]", "90 % below [s]", "share of the median step"], rows)


def verdicts(folder: Path, steps: pd.DataFrame) -> str:
    """What ``moediag trend`` says of every run."""
    runs = [path.parent for path in sorted(folder.glob(f"*/{STEPS}"))]
    with ProcessPoolExecutor(2) as pool:
        found = dict(zip((run.name for run in runs), pool.map(_verdict, runs, [steps["step"].max() + 1] * len(runs)),
                         strict=True))  # fmt: skip
    seeds = sorted(steps["seed"].unique())
    rows = [
        [engine, WORDS[correction], *(found[f"{engine}-{correction}-{seed}"] for seed in seeds)]
        for (engine, correction), _ in _groups(steps)
    ]
    return markdown(["rollouts", "correction", *(f"seed {seed}" for seed in seeds)], rows)


def _verdict(run: Path, n_steps: int) -> str:
    from moediag.results.trend import measure_trend

    kept = run / "trend.json"
    if not kept.exists() or json.loads(kept.read_text())["n_steps"] != n_steps:
        table = run / "steps-counted.jsonl"
        write_atomic(table, "".join(_whole(run / STEPS)[:n_steps]).encode())
        trend = measure_trend([table], None, None)
        rules = sorted({f"`{one.rule}`" for one in trend.findings if one.level != NOTE})
        words = "; ".join([trend.recurrence.outcome, *rules])
        write_atomic(kept, json.dumps({"n_steps": int(n_steps), "words": words}).encode())
    return str(json.loads(kept.read_text())["words"])


def _groups(steps: pd.DataFrame) -> list[tuple[tuple[str, str], pd.DataFrame]]:
    known = dict(iter(steps.groupby(["engine", "correction"])))
    return [((engine, correction), known[engine, correction]) for engine in ENGINES for correction in CORRECTIONS]


@house_style
def draw(steps: pd.DataFrame) -> None:
    """reports/rl/curves.png: a row per number, a column per rollout engine."""
    figure = new_figure(6.2, 1.45 * len(PANELS))
    axes = figure.subplots(len(PANELS), 2, sharex=True, sharey="row")
    for row, (name, (title, unit)) in zip(axes, PANELS.items(), strict=True):
        for ax, engine in zip(row, ENGINES, strict=True):
            for correction in CORRECTIONS:
                there = steps[(steps["engine"] == engine) & (steps["correction"] == correction)]
                _line(ax, there, name, 1e3 if name == MASKED else 1.0, correction)
            ax.set_title(f"{title}, {engine}")
        row[0].set_ylim(bottom=0)
        row[0].set_ylabel(unit)
    for ax in axes[-1]:
        ax.set_xlabel("training step")
    axes[0, 0].legend(loc="lower right")
    n_seeds, n_tokens = steps["seed"].nunique(), int(steps["n_tokens"].groupby(
        [steps["engine"], steps["correction"], steps["seed"]]).sum().min())  # fmt: skip
    spread = (
        f"bands are 95 % intervals over n = {n_seeds} seeds (Student's t)" if n_seeds > 2 else "thin lines are seeds"
    )
    add_words(
        figure,
        _finding(steps),
        f"Means of {WINDOW} steps; {spread}. At least {n_tokens:,} tokens in every run. Up is good for the reward; for "
        "the mismatch, low is.",
    )
    save_figure(figure, REPORTS / "rl", "curves", ("png",))


def _line(ax: Any, there: pd.DataFrame, name: str, factor: float, correction: str) -> None:
    colour, style = STYLES[correction]
    table = factor * there.pivot_table(index="window", columns="seed", values=name, aggfunc="mean")
    middle = (table.index.to_numpy() + 0.5) * WINDOW
    ax.plot(middle, table.mean(axis=1), color=colour, linestyle=style, label=WORDS[correction], linewidth=1.3)
    if table.shape[1] > 2:
        bounds = np.array([interval(row) for row in table.to_numpy()])
        ax.fill_between(middle, bounds[:, 1], bounds[:, 2], color=colour, alpha=0.15, linewidth=0)
    else:
        ax.plot(middle, table, color=colour, linestyle=style, linewidth=0.5)


def _finding(steps: pd.DataFrame) -> str:
    parts = []
    for engine in ENGINES:
        first, last = (of_seeds(one[one["engine"] == engine], "abs_logp_diff.mean").mean() for one in _ends(steps))
        parts.append(f"{sig(first, 2)} to {sig(last, 2)} nat ({engine})")
    first, last = (one["reward"].mean() for one in _ends(steps))
    return f"Reward {sig(first, 2)} to {sig(last, 2)}; mean abs logp diff {', '.join(parts)}"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
