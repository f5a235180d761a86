"""The verdict in words: what was seen, whether the semantics look sound, and what the floors say.

Invariants: the word of the verdict is the summary's, never made up here; without a measured A/A floor the words are
about the mismatch of this pair and blame neither engine.
"""

from __future__ import annotations

import pandas as pd

from moediag.analysis.metrics import METRICS
from moediag.diagnosis.verdict import CANNOT_TELL, next_commands
from moediag.numbers import NONE, count, is_number, percent, sig, times
from moediag.report.blocks import Block, Bullets, Verdict, interval, number
from moediag.report.measures import (
    FORCED,
    Frames,
    Summary,
    bent_parameters,
    text_origin,
)
from moediag.report.text import Markdown, code, one_line, own_words, plain


def verdict_of(summary: Summary, pair: Summary, frames: Frames, label: str = "", run: str = "RUN") -> Verdict:
    """The summary's verdict with what was seen; a summary from before verdicts cannot tell.

    Args:
        label: the run's name among several.
        run: its folder, for the commands.
    """
    given = summary.get("verdict") or {}
    missing = "the summary holds no verdict (it was written before noise floors were): run moediag analyze again"
    then = given.get("next") or {}
    return Verdict(
        one_line(label),
        one_line(given.get("word") or CANNOT_TELL),
        one_line(given.get("tone") or "calm"),
        _reason(str(given.get("weights") or ""), str(given.get("reason") or missing)),
        own_words(str(given.get("where") or "")),
        own_words(str(then.get("words") or "")),
        tuple(map(one_line, next_commands(summary, run))),
        tuple(own_words(line) for line in given.get("evidence") or ()),
        seen_words(pair, frames, text_origin(summary)),
    )


def cause_blocks(summary: Summary) -> list[Block]:
    """Every rule that fired, likeliest first; what was ruled out; what could not be told, with the command."""
    given = summary.get("verdict") or {}
    found = [
        Markdown(f"**{plain(one['rule'])}** ({plain(one['level'])}): {own_words(one['message'])}. "
                 f"Likely: {own_words(one['cause'])}. Next: {own_words(one['next_check'])}.")
        for one in given.get("causes") or ()
    ]  # fmt: skip
    missing = [Markdown(f"{plain(one['words'])}: {code(one['command'])}") for one in given.get("untold") or ()]
    blocks: list[Block] = []
    for title, lines in (
        ("What the rules found, likeliest first:", found),
        ("Ruled out:", [plain(line) for line in given.get("ruled_out") or ()]),
        ("Not known, and what would show it:", missing),
    ):
        blocks += [Markdown(title), Bullets(tuple(lines))] if lines else []
    return blocks


def _reason(weights: str, reason: str) -> Markdown:
    """Other weights before anything else."""
    if not weights:
        return own_words(reason)
    return Markdown(f"{own_words(weights)}. {own_words(reason[:1].upper() + reason[1:])}")


def seen_words(pair: Summary, frames: Frames, origin: str = "") -> Markdown:
    """What was seen, in words: the mismatch, the routing, and whether the semantics look sound.

    Only tokens honestly sampled from infer (``origin`` empty) make a mean ratio of 1 a thing to ask for.
    """
    sentences = [_mismatch_words(pair), _routing_words(pair, frames), _ratio_words(pair, origin)]
    return Markdown(" ".join(filter(None, sentences)))


def _mismatch_words(pair: Summary) -> str:
    mean, p99, share = (
        METRICS[name].value(pair) for name in ("abs_logp_diff.mean", "abs_logp_diff.p99", "extreme_share_2")
    )
    base = f"{count(pair.get('n_tokens'), 'response token')} of {count(pair.get('n_prompts'), 'prompt')}"
    if not is_number(mean):
        return f"**No token was scored by both arms** ({base}): there is nothing to compare."
    if mean == 0:
        return f"**Bit-exact: over {base} the two arms give the same log-probabilities.**"
    tail = f", 1 token in 100 by more than {sig(p99)} nat" if is_number(p99) else ""
    far = f", {'none' if share == 0 else percent(share)} by more than a factor of 2 in probability"
    far = far if is_number(share) else ""
    return f"**Over {base}, train and infer differ by {sig(mean)} nat on average{tail}{far}.**"


def _routing_words(pair: Summary, frames: Frames) -> str:
    if not pair.get("routing"):
        reason = (pair.get("left_out") or {}).get("routing")
        if reason:
            return f"Nothing is said of routing: {reason}."
        return "The model is dense (no expert routing was captured), so routing plays no part in the mismatch."
    flip, anywhere = (METRICS[name].value(pair) for name in ("flip_rate", "any_layer_share"))
    if not is_number(flip):
        return "No (token, layer) was routed in both arms, so nothing can be said about routing."
    if flip == 0:
        return "No expert set differs in any layer."
    words = f"The expert set differs in {percent(flip)} of (token, layer) pairs"
    words += f"; {percent(anywhere)} of tokens have at least one flip" if is_number(anywhere) else ""
    return f"{words}.{_depth_words(frames.get('agreement_by_layer'))}"


def _depth_words(layers: pd.DataFrame | None) -> str:
    if layers is None or len(layers) < 2:
        return ""
    first, last = layers.iloc[0], layers.iloc[-1]
    return (
        f" By depth, sets agree for {percent(first['same_set_rate'])} of tokens in MoE layer {first['layer']:.0f} and "
        f"{percent(last['same_set_rate'])} in layer {last['layer']:.0f}."
    )


def slope_words(pair: Summary) -> str:
    """Slope of abs(logp_diff) along the response with its interval; empty when the summary has none."""
    position = pair.get("position") or {}
    slope = position.get("slope_per_1k_tokens")
    if not is_number(slope):
        return ""
    low, high = position.get("slope_per_1k_tokens_ci") or (None, None)
    where = interval(low, high)
    known = f"95 %: {where}" if where != NONE else "no interval could be given"
    n = f"{count(position.get('n_tokens'), 'token')} of {count(position.get('n_sequences'), 'sequence')}"
    return f"Slope of abs(logp_diff): {sig(slope)} nat per 1,000 tokens ({known}; {n})."


def length_words(pair: Summary) -> str:
    """Slope of the log-ratio of whole responses along their length; empty when the summary has none."""
    length = pair.get("length") or {}
    slope = length.get("log_ratio_slope_per_1k_tokens")
    if not is_number(slope):
        return ""
    low, high = length.get("log_ratio_slope_per_1k_tokens_ci") or (None, None)
    where = interval(low, high)
    known = f"95 %: {where}" if where != NONE else "no interval could be given"
    n = count(length.get("n_sequences"), "sequence")
    return f"Slope of the log-ratio along the length: {sig(slope)} nat per 1,000 tokens ({known}; {n}); 0 is best."


def margin_words(frames: Frames) -> str:
    """Median margins of flipped and of kept choices as a sentence; empty without routing."""
    frame = frames.get("margin_quantiles")
    if frame is None or frame.empty:
        return ""
    rows = frame[frame["space"] == "choice"].set_index("group")
    whose = f"Margins are the {next(iter(rows['side']), 'infer')} arm's. "
    medians = {group: float(rows["p50"].get(group, float("nan"))) for group in ("flipped", "kept")}
    if not is_number(medians["flipped"]):
        return f"{whose}No choice flipped."
    return (
        f"{whose}The median margin of flipped choices is {sig(medians['flipped'])}, "
        f"of kept ones {sig(medians['kept'])} ({times(medians['kept'], medians['flipped'])})."
    )


def sampling_words(summary: Summary) -> Markdown:
    """A caution when tokens were not drawn from the distribution the log-probs are of; else empty."""
    origin = text_origin(summary)
    if not origin:
        return Markdown("")
    if origin == FORCED:
        how = "The completions were given, not sampled by infer"
    else:
        how = f"Sampled with {', '.join(bent_parameters(summary.get('sampling') or {}))}"
    rest = "k1 and k3 are not unbiased here (no KL, only statistics), and the mean ratio need not be 1."
    return Markdown(f"{plain(how)}: {rest}")


def _ratio_words(pair: Summary, origin: str) -> str:
    metric = METRICS["mean_ratio"]
    ratio, (low, high) = metric.value(pair), metric.bounds(pair) or (None, None)
    if not is_number(ratio) or METRICS["abs_logp_diff.mean"].value(pair) == 0:
        return ""
    value, where = number(ratio, "1"), interval(low, high, "1")
    if origin:
        bounds = "no interval could be given" if where == NONE else where
        return f"The mean ratio is {value} ({bounds}); it need not be 1 here ({origin})."
    if not (is_number(low) and is_number(high)):
        return f"The mean ratio is {value} (1 is expected under honest sampling; no interval could be given)."
    if low <= 1 <= high:
        return f"The mean ratio is {value} ({where}), which contains 1, as honest sampling asks."
    return (
        f"**The mean ratio is {value} ({where}), which does not hold 1: check the semantics first** (temperature, "
        "top-p/top-k, raw or processed log-probs, tokens and positions) before reading any other number."
    )
