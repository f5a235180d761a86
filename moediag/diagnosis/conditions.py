"""The language of ``moediag gate``: what a condition may name, and its grammar.

    condition = sum ("<" | "<=" | ">" | ">=" | "==" | "!=") sum
              | "no" ("findings" | "errors" | "warnings")
              | "verdict" ["not"] "in" "(" word {"," word} ")"
              | [metric] "not" "significantly" "worse"
    sum       = product {("+" | "-") product}
    product   = unary {("*" | "/") unary}
    unary     = "-" unary | "abs" "(" sum ")" | "(" sum ")" | number | name
    name      = ["baseline."] (metric ["." ("low" | "high" | "floor" | "rounding")] | "rounding_scale" | count)

A metric is named by its path in the summary of a pair, as declared (:mod:`moediag.analysis.metrics`). Nothing is
evaluated by Python: a condition is parsed, and refused with the position and what was expected there.
"""

from __future__ import annotations

import difflib
import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

from moediag.analysis.metrics import HARMLESS, METRICS, Metric
from moediag.diagnosis.verdict import TONES
from moediag.errors import ConditionError
from moediag.hygiene.rules import ERROR, WARNING

BASELINE: Final = "baseline"
ROUNDING_SCALE: Final = "rounding_scale"
SKIPPED: Final = "skipped_share"
PARTS: Final = {
    "low": "lower end of the metric's 95 % interval",
    "high": "upper end of the metric's 95 % interval",
    "floor": "its floor: the same metric of each engine against itself",
    "rounding": "the same metric of one unit in the last place against none, in train",
}
"""What may follow a metric's name after a dot."""

COUNTS: Final = {
    "n_tokens": "response tokens scored by both sides",
    "n_unscored": "response tokens that a side did not score",
    "n_sequences": "sequences compared",
    "n_prompts": "prompts: the unit of resampling",
}

FINDINGS: Final = {"findings": (ERROR, WARNING), "errors": (ERROR,), "warnings": (WARNING,)}
"""What ``no`` may stand before, and the levels of findings that it means; notes are information, and no finding."""

COMPARISONS: Final[Mapping[str, Callable[[float, float], bool]]] = {
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge, "==": operator.eq, "!=": operator.ne,
}  # fmt: skip
_ARITHMETIC: Final[Mapping[str, Callable[[float, float], float]]] = {
    "+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv,
}  # fmt: skip

_TOKEN: Final = re.compile(
    r"(?P<number>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?(?![\w.]))"
    r"|(?P<name>[A-Za-z_][A-Za-z0-9_]*(?:\.[A-Za-z0-9_]+)*)"
    r"|(?P<text>'[^']*'|\"[^\"]*\")"
    r"|(?P<sign><=|>=|==|!=|[<>+\-*/(),])",
    re.ASCII,
)
_DEEPEST: Final = 50
"""Parentheses and signs within each other: more is no condition that a person writes."""


@dataclass(frozen=True)
class Nameable:
    """A number that a condition may name."""

    name: str
    unit: str
    meaning: str
    metric: Metric | None = None

    def value(self, summary: Mapping[str, Any], part: str = "") -> float | None:
        """Its value, or a part of it, in a run's summary; None where there is none."""
        pair, floors = summary["pairs"][summary["main_pair"]], summary.get("floors") or {}
        if self.metric is None:
            return _number(self.name, pair, floors)
        if part in ("low", "high"):
            bounds = self.metric.bounds(pair)
            return bounds[part == "high"] if bounds else None
        if part:
            found: float | None = (floors.get("metrics") or {}).get(self.metric.name, {}).get(part)
            return found
        return self.metric.value(pair)


def skipped_share(pair: Mapping[str, Any]) -> float | None:
    """Share of the response tokens that a side did not score; None of nothing."""
    n = pair["n_tokens"] + pair["n_unscored"]
    return pair["n_unscored"] / n if n else None


def _number(name: str, pair: Mapping[str, Any], floors: Mapping[str, Any]) -> float | None:
    if name == ROUNDING_SCALE:
        found: float | None = (floors.get("rounding") or {}).get("mean")
        return found
    return skipped_share(pair) if name == SKIPPED else float(pair[name])


@cache
def nameable() -> dict[str, Nameable]:
    """Everything that conditions may name: the declared metrics by path, the rounding scale, counts."""
    metrics = {
        ".".join(metric.path): Nameable(
            ".".join(metric.path), metric.shown_unit, f"{metric.label or metric.name}; {metric.direction}", metric
        )
        for metric in METRICS.values()
    }
    scale = "mean abs logp diff that one unit in the last place makes in train: what rounding does to this model"
    others = [Nameable(ROUNDING_SCALE, "nat", scale)]
    others += [Nameable(name, "1", meaning) for name, meaning in COUNTS.items()]
    others.append(Nameable(SKIPPED, "share", "response tokens that a side did not score, of all"))
    return metrics | {one.name: one for one in others}


@dataclass(frozen=True)
class Number:
    """A number as it was written."""

    value: float


@dataclass(frozen=True)
class Name:
    """A number of the run, or of the baseline; ``part`` is one of :data:`PARTS`, or empty."""

    text: str
    of: Nameable
    part: str = ""
    is_baseline: bool = False


@dataclass(frozen=True)
class Operation:
    """Arithmetic on one operand (``abs``, ``-``) or two."""

    sign: str
    operands: tuple[Expression, ...]


Expression = Number | Name | Operation


def names_of(expression: Expression) -> list[Name]:
    """The names in an expression, each once."""
    if isinstance(expression, Name):
        return [expression]
    parts = expression.operands if isinstance(expression, Operation) else ()
    return list(dict.fromkeys(name for part in parts for name in names_of(part)))


def evaluate(expression: Expression, value_of: Callable[[Name], float]) -> float:
    """The value of an expression; NaN where it has none (a name without a value, a division by zero)."""
    if isinstance(expression, Number):
        return expression.value
    if isinstance(expression, Name):
        return value_of(expression)
    values = [evaluate(operand, value_of) for operand in expression.operands]
    if len(values) == 1:
        return abs(values[0]) if expression.sign == "abs" else -values[0]
    if expression.sign == "/" and values[1] == 0:
        return math.nan
    return _ARITHMETIC[expression.sign](values[0], values[1])


@dataclass(frozen=True)
class Comparison:
    """One number against another."""

    text: str
    value: Expression
    sign: str
    limit: Expression
    limit_text: str

    @property
    def names(self) -> list[Name]:
        """Every name, each once."""
        return list(dict.fromkeys([*names_of(self.value), *names_of(self.limit)]))


@dataclass(frozen=True)
class NoFindings:
    """No finding of some levels."""

    text: str
    levels: tuple[str, ...]


@dataclass(frozen=True)
class VerdictIn:
    """The verdict's word is, or is not, one of some."""

    text: str
    words: tuple[str, ...]
    is_inside: bool


@dataclass(frozen=True)
class NotWorse:
    """A metric, or every headline metric that has a floor, is not significantly worse than the baseline's."""

    text: str
    metric: Metric | None


Condition = Comparison | NoFindings | VerdictIn | NotWorse


def needs_baseline(condition: Condition) -> bool:
    """Whether a condition is about a second run."""
    is_named = isinstance(condition, Comparison) and any(name.is_baseline for name in condition.names)
    return is_named or isinstance(condition, NotWorse)


def parse(text: str) -> Condition:
    """A condition.

    Raises:
        ConditionError: it is none; with the position and what was expected there.

    Example:
        >>> parse("logp.kl_infer_train_k3 < 1e-3").limit
        Number(value=0.001)
        >>> parse("logp.kl_infer_train_k3 < ")
        Traceback (most recent call last):
        moediag.errors.ConditionError: 'logp.kl_infer_train_k3 < ': expected a number, a name or '(' at character 26, \
found the end
    """
    return _Parser(text).condition()


def nearest(name: str, names: Iterable[str], n: int = 3) -> str:
    """The nearest of some names, as a message ends; those that end alike come first."""
    some = list(names)
    alike = [one for one in some if one.endswith(f".{name}")]
    close = list(dict.fromkeys([*alike, *difflib.get_close_matches(name, some, n, 0.5)]))[:n]
    return f"; nearest: {', '.join(close)}" if close else ""


@dataclass(frozen=True)
class _Token:
    kind: str
    text: str
    at: int


class _Parser:
    """Recursive descent over the tokens of one condition."""

    def __init__(self, text: str) -> None:
        self._text, self._next, self._depth = text, 0, 0
        self._tokens = list(self._read())

    def _read(self) -> Iterable[_Token]:
        at = 0
        while at < len(self._text):
            if self._text[at].isspace():
                at += 1
                continue
            match = _TOKEN.match(self._text, at)
            if match is None:
                raise self._error(
                    at, "expected a number, a name, a word in quotes or one of < <= > >= == != + - * / ( )"
                )
            yield _Token(str(match.lastgroup), match.group(), at)
            at = match.end()
        yield _Token("end", "", len(self._text))

    def _error(self, at: int, expected: str, found: str = "") -> ConditionError:
        here = found or (f"found {self._text[at]!r}" if at < len(self._text) else "found the end")
        return ConditionError(f"{self._text!r}: {expected} at character {at + 1}, {here}", self._text, at)

    @property
    def _here(self) -> _Token:
        return self._tokens[self._next]

    def _take(self) -> _Token:
        token = self._here
        self._next = min(self._next + 1, len(self._tokens) - 1)
        return token

    def _takes(self, *texts: str) -> bool:
        """Whether this token is one of ``texts``, which is then behind us."""
        is_here = self._here.kind in ("name", "sign") and self._here.text in texts
        if is_here:
            self._take()
        return is_here

    def _expect(self, *texts: str) -> str:
        token = self._here
        if not self._takes(*texts):
            raise self._unexpected(f"expected {' or '.join(map(repr, texts))}")
        return token.text

    def _unexpected(self, expected: str) -> ConditionError:
        token = self._here
        return self._error(token.at, expected, f"found {token.text!r}" if token.text else "found the end")

    def condition(self) -> Condition:
        """The whole text as one condition."""
        found = self._condition()
        if self._here.kind != "end":
            raise self._unexpected("expected the end")
        return found

    def _condition(self) -> Condition:
        if self._takes("no"):
            return NoFindings(self._text.strip(), FINDINGS[self._expect(*FINDINGS)])
        if self._takes("verdict"):
            is_inside = self._expect("in", "not") == "in"
            if not is_inside:
                self._expect("in")
            return VerdictIn(self._text.strip(), self._words(), is_inside)
        if self._takes("not"):
            return self._not_worse(None)
        start = self._here.at
        value = self._sum()
        if self._takes("not"):
            if not isinstance(value, Name) or value.of.metric is None or value.part or value.is_baseline:
                raise self._error(start, "expected one metric before 'not significantly worse'", "found another value")
            if value.of.metric.direction == HARMLESS:
                raise self._error(start, "expected a metric with a good end", f"found one that is {HARMLESS}")
            return self._not_worse(value.of.metric)
        if self._here.text not in COMPARISONS:
            raise self._unexpected(f"expected {' '.join(COMPARISONS)} or 'not significantly worse'")
        sign, limit_at = self._take().text, self._here.at
        limit = self._sum()
        text = self._text[limit_at : self._here.at].strip()
        found = Comparison(self._text.strip(), value, sign, limit, text)
        if not found.names:
            raise self._error(start, "expected a name of the run (moediag gate --list)", "found numbers alone")
        return found

    def _not_worse(self, metric: Metric | None) -> NotWorse:
        self._expect("significantly")
        self._expect("worse")
        return NotWorse(self._text.strip(), metric)

    def _words(self) -> tuple[str, ...]:
        self._expect("(")
        words = []
        while True:
            token = self._here
            if token.kind != "text":
                raise self._unexpected("expected a word of the verdict in quotes")
            self._take()
            word = token.text[1:-1]
            if word not in TONES:
                known = ", ".join(map(repr, TONES))
                raise self._error(token.at, "expected a word of the verdict", f"found {token.text}; one of: {known}")
            words.append(word)
            if self._expect(",", ")") == ")":
                return tuple(words)

    def _sum(self) -> Expression:
        value = self._product()
        while self._here.text in ("+", "-") and self._here.kind == "sign":
            value = Operation(self._take().text, (value, self._product()))
        return value

    def _product(self) -> Expression:
        value = self._unary()
        while self._here.text in ("*", "/") and self._here.kind == "sign":
            value = Operation(self._take().text, (value, self._unary()))
        return value

    def _unary(self) -> Expression:
        self._depth += 1
        if self._depth > _DEEPEST:
            raise self._error(self._here.at, f"expected no more than {_DEEPEST} levels of parentheses and signs")
        try:
            return self._operand()
        finally:
            self._depth -= 1

    def _operand(self) -> Expression:
        token = self._here
        if self._takes("-"):
            return Operation("-", (self._unary(),))
        if self._takes("("):
            value = self._sum()
            self._expect(")")
            return value
        if token.kind == "number":
            self._take()
            if not math.isfinite(number := float(token.text)):
                raise self._error(token.at, "expected a finite number", f"found {token.text}")
            return Number(number)
        if token.kind != "name":
            raise self._unexpected("expected a number, a name or '('")
        self._take()
        if token.text == "abs":
            self._expect("(")
            value = self._sum()
            self._expect(")")
            return Operation("abs", (value,))
        return self._named(token)

    def _named(self, token: _Token) -> Name:
        known = nameable()
        prefix, _, rest = token.text.partition(".")
        is_baseline = prefix == BASELINE
        name = rest if is_baseline else token.text
        if name in known:
            return Name(token.text, known[name], "", is_baseline)
        base, _, part = name.rpartition(".")
        of = known.get(base)
        if of is not None and of.metric is not None and part in PARTS:
            if part in ("floor", "rounding") and not of.metric.floor:
                raise self._error(token.at, f"expected low or high: {base} has no {part}", f"found {part}")
            return Name(token.text, of, part, is_baseline)
        raise self._error(
            token.at,
            "expected a name that conditions may use (moediag gate --list)",
            f"found {token.text!r}{nearest(name, known)}",
        )
