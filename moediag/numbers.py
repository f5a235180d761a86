"""Numbers as a reader wants them, on pages, in figures and on the terminal.

Significant digits, shares in per cent, an en dash for none.

Invariant: a value that is absent or NaN is never printed as 0; it is the en dash, and whoever prints
it says why.
"""

from __future__ import annotations

import math
from typing import Final, TypeGuard

NONE: Final = "–"
"""What stands where there is no number."""

MINUS: Final = "−"


def is_number(value: object) -> TypeGuard[float]:
    """Whether ``value`` can be printed as a number (neither None, NaN nor text)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)


def sig(value: float | None, digits: int = 3) -> str:
    """``value`` with that many significant digits; powers of ten only where decimals would not read.

    Example:
        >>> sig(0.014812), sig(12345.6), sig(1.538e-6), sig(0.0), sig(None), sig(-0.5)
        ('0.0148', '12,346', '1.54e-06', '0', '–', '−0.500')
    """
    if value is None or math.isnan(value):
        return NONE
    if math.isinf(value):
        return "inf" if value > 0 else f"{MINUS}inf"
    if value == 0:
        return "0"
    size = math.floor(math.log10(abs(value)))
    text = f"{value:.{digits - 1}e}" if size < -4 or size > 6 else f"{value:,.{max(digits - 1 - size, 0)}f}"
    return text.replace("-", MINUS, 1) if value < 0 else text


_LEAST: Final = 1e-6
"""Smallest share that is written out; what is below, mostly bounds of intervals, is only said to be below."""
_MOST: Final = 1 - 1e-5
"""Largest share below 1 that is written out: nobody reads the difference of eight nines."""


def percent(share: float | None) -> str:
    """A share in [0, 1] as per cent; small shares keep two digits, shares near 1 their distance, up to a limit.

    ``0 %`` and ``100 %`` are kept for none and every one.

    Example:
        >>> percent(0.9683), percent(0.00031), percent(0.0), percent(1.0), percent(0.99997), percent(None)
        ('96.83 %', '0.031 %', '0 %', '100 %', '99.997 %', '–')
        >>> percent(1e-11), percent(0.99999997)
        ('<0.0001 %', '>99.999 %')
    """
    if share is None or math.isnan(share):
        return NONE
    if share in (0.0, 1.0):
        return f"{share:.0%}".replace("%", " %")
    if abs(share) < _LEAST:
        return f"{'<' if share > 0 else f'>{MINUS}'}0.0001 %"
    if _MOST < share < 1:
        return ">99.999 %"
    if share < 0.01:
        return f"{sig(100 * share, 2)} %"
    decimals = 2 if share < 0.9999 or share > 1 else math.ceil(-math.log10(1 - share)) - 2
    return f"{100 * share:.{min(max(decimals, 2), 3)}f} %"


def near_one(value: float, digits: int = 5) -> str:
    """A number near 1 whose distance from 1 counts (a ratio, a correlation): written as distance where digits end.

    Example:
        >>> near_one(0.99931), near_one(1.0), near_one(0.99999997), near_one(1.0000021)
        ('0.99931', '1.0000', '1 − 3.0e-08', '1 + 2.1e-06')
    """
    beyond = abs(value - 1)
    if not 0 < beyond < 10.0 ** (1 - digits) / 2:
        return sig(value, digits)
    return f"1 {'+' if value > 1 else MINUS} {sig(beyond, 2)}"


_NEAR_ONE: Final = 0.1
"""Within this of 1, three significant digits would say 1.00."""


def in_unit(value: object, unit: str) -> str:
    """A value in its unit's habit: shares as per cent, else three significant digits, more for a ratio near 1.

    Example:
        >>> in_unit(0.0312, "share"), in_unit(0.99931, "1"), in_unit(0.0148, "nat"), in_unit(None, "nat")
        ('3.12 %', '0.99931', '0.0148', '–')
    """
    if not is_number(value):
        return NONE
    if unit == "share":
        return percent(value)
    return near_one(value) if unit == "1" and abs(value - 1) < _NEAR_ONE else sig(value)


def times(numerator: float | None, denominator: float | None) -> str:
    """``numerator / denominator`` as ``2.2×``; the en dash where no honest ratio exists.

    Example:
        >>> times(0.0148, 0.0067), times(0.1, 0.0), times(None, 1.0)
        ('2.2×', '–', '–')
    """
    if numerator is None or denominator is None or math.isnan(numerator) or math.isnan(denominator):
        return NONE
    if denominator == 0 or math.isinf(numerator) or math.isinf(denominator):
        return NONE
    return f"{sig(numerator / denominator, 2)}×"


def count(n: float | None, noun: str = "", plural: str | None = None) -> str:
    """``n`` with thousands separated, and the noun in its number.

    Example:
        >>> count(16384, "token"), count(1, "prompt"), count(2, "choice"), count(None, "token")
        ('16,384 tokens', '1 prompt', '2 choices', '– tokens')
    """
    text = NONE if n is None or math.isnan(n) else f"{int(n):,}"
    if not noun:
        return text
    return f"{text} {noun if n == 1 else plural or noun + 's'}"
