"""What may be written down of names, values and paths: no secret and no home folder leaves the machine.

A run directory is shared: attached to issues, copied to clusters, published with a paper. So whatever a user
gave (paths, engine options, environment variables) passes through :func:`redact` before it is written.

Invariants:
    - redacting twice is redacting once, so a record written before and one made now compare as equal;
    - numbers, booleans and None are kept (``max_num_batched_tokens`` is no token), except under names that can
      only mean a secret.
"""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Any

REDACTED = "[redacted]"

# A name holding one of these hides whatever it holds, numbers included.
_SECRET_NAMES = (
    "SECRET", "PASSWORD", "PASSWD", "PASSPHRASE", "CREDENTIAL", "AUTH", "APIKEY", "API_KEY", "ACCESS_KEY",
    "PRIVATE_KEY", "COOKIE",
)  # fmt: skip
# These are also the words of harmless counts and modes: only text is hidden, and not beside TOKENIZER.
_DOUBTFUL_NAMES = ("TOKEN", "KEY")
_HARMLESS_WORDS = re.compile("TOKENIZERS?|TOKENI[SZ]ATION|KEYWORDS?")
_COUNT = re.compile(r"TOKENS(?:_PER_\w+)?$|TOKENS_")

_SECRET_VALUES = tuple(
    re.compile(pattern)
    for pattern in (
        r"\bhf_(?=\w*[A-Z0-9])[A-Za-z0-9]{6,}",  # Hugging Face
        r"\bsk-[\w-]{8,}",  # OpenAI and those who copied its form
        r"\b(?:gh[opsur]_|github_pat_|glpat-|xox[abprs]-|nvapi-|pypi-)[\w-]{8,}",
        r"\bAKIA[0-9A-Z]{12,}",  # AWS access key id
        r"\beyJ[\w-]{8,}\.[\w-]+(?:\.[\w-]+)?",  # JSON web token
        r"(?<=://)[^/\s@]+(?=@)",  # user:password@ of a URL
        r"(?i)(?<=bearer )[^\s\"',;]+",
    )
)
# NAME=value, "name": value, --name value inside longer texts
_SECRET_PAIR = re.compile(
    r"(?i)(\b[\w-]*(?:token|secret|passw(?:or)?d|passphrase|credentials?|api[-_]?key|access[-_]?key|signature))"
    r"([\"']?\s*[=:]\s*[\"']?|\s+(?=\S*\d))(?!\[redacted\])([^\s\"'&;,{}\[\]]+)"
)
_NAME = r"(?:[^/\s:;,\"'=]+(?: [^/\s:;,\"'=]+)*(?=/)|[^/\s:;,\"'=]+)"  # a name with spaces only where / follows
_USER_FOLDER = re.compile(rf"(?:/[\w.@-]+)*?/(?:home|Users)/{_NAME}|(?<![\w.~/-])/root(?![\w.-])")


def redact(value: Any, name: str = "") -> Any:
    """``value`` as it may be written down; containers are copied, keys are kept unless they hold a secret.

    Args:
        value: JSON-like data; anything else is taken by its text.
        name: what the value is called, which may say that it is a secret.

    Example:
        >>> redact({"hf_token": "abc", "max_tokens": 5, "proxy": "http://me:pw@host:80"})
        {'hf_token': '[redacted]', 'max_tokens': 5, 'proxy': 'http://[redacted]@host:80'}
    """
    if value is None or isinstance(value, bool) or value == "":
        return value
    if isinstance(value, dict):
        return {redact_text(str(key)): redact(item, _inner_name(name, str(key))) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        items = sorted(value, key=str) if isinstance(value, (set, frozenset)) else value
        return [redact(item, name) for item in items]
    if _is_secret(name, value):
        return REDACTED
    is_number = isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))  # JSON knows no NaN
    return value if is_number else redact_text(str(value))


def redact_text(text: str) -> str:
    """``text`` with values that look like secrets hidden, and home folders written as ``~``.

    Example:
        >>> redact_text("/home/ada/models/x:/opt/lib.so")
        '~/models/x:/opt/lib.so'
    """
    text = text.encode(errors="backslashreplace").decode()  # an environment may hold what is no UTF-8
    for pattern in _SECRET_VALUES:
        text = pattern.sub(REDACTED, text)
    text = _SECRET_PAIR.sub(rf"\1\2{REDACTED}", text)
    for home in _home_folders():
        # the whole folder name only: /srv/ada is not the start of /srv/adam
        text = re.sub(rf"(?<![\w.~-]){re.escape(home)}(?![\w.-])", "~", text)
    return _USER_FOLDER.sub("~", text)


def _inner_name(outer: str, key: str) -> str:
    """What lies inside something secret is secret, whatever it is called."""
    return outer if _is_secret(outer, "text") else key


def _is_secret(name: str, value: Any) -> bool:
    words = _HARMLESS_WORDS.sub("", re.sub(r"(?<=[a-z])(?=[A-Z])|[^A-Za-z0-9]+", "_", name).upper())
    if any(part in words for part in _SECRET_NAMES):
        return True
    if isinstance(value, (int, float)) or (_COUNT.search(words) and str(value).isdigit()):
        return False
    return any(part in words for part in _DOUBTFUL_NAMES)


def _home_folders() -> list[str]:
    """The home folder as named in the environment, as the system knows it, and where links lead; longest first."""
    named = {os.environ.get("HOME", ""), str(Path("~").expanduser())}
    found = {path.rstrip("/") for home in named if home.startswith("/") for path in (home, os.path.realpath(home))}
    return sorted(found - {""}, key=len, reverse=True)
