"""What this process computes with: machine, threads, determinism switches, environment.

Read in the process that holds the model (a vLLM worker, the transformers process): a parent's environment and
thread count are not its children's. Everything is plain data, so it crosses to other processes and into arm.json.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import sys
import warnings
from collections.abc import Callable
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any

from moediag import __version__
from moediag.engines.redaction import redact

# Environment variables that may change a number, by prefix and by name; only those that are set are recorded.
NUMERIC_PREFIXES = (
    "VLLM_", "TORCH", "PYTORCH_", "ATEN_", "CUDA_", "CUBLAS", "CUDNN_", "NCCL_", "OMP_", "GOMP_", "KMP_", "MKL_",
    "DNNL_", "ONEDNN_", "OPENBLAS_", "BLIS_", "TRITON_", "XLA_", "TRANSFORMERS_", "TOKENIZERS_", "ACCELERATE_",
    "FLASHINFER_", "FLASH_ATT", "XFORMERS_", "HIP_", "ROCM_", "ROCBLAS_", "HIPBLAS", "MIOPEN_", "BNB_", "DG_",
)  # fmt: skip
NUMERIC_NAMES = (
    "NVIDIA_TF32_OVERRIDE", "NVIDIA_VISIBLE_DEVICES", "USE_HUB_KERNELS", "DISABLE_KERNEL_MAPPING", "LD_PRELOAD",
    "LD_LIBRARY_PATH", "GLIBC_TUNABLES", "PYTHONHASHSEED", "HF_HUB_OFFLINE", "HF_DEACTIVATE_ASYNC_LOAD",
)  # fmt: skip
# Named anew by every process, or only where things are kept and logged: noise between two runs.
_NOISE = re.compile(
    r"_CACHE(_DIR|_ROOT|_PATH)?$|_DIST_IDENT$|_SHM_BUFFER_NAME$|_RPC_BASE_PATH$|_PORT$|_HOST(_IP)?$|_HOME$"
    r"|_LOG(S|GING_\w+|_LEVEL|_STATS\w*)?$|_VERBOSITY$|_DEBUG_DIR$|_INSTANCE_ID$"
)
_LIBRARIES = re.compile(
    r"/(lib(?:gomp|iomp5|omp|mkl_rt|mkl_core|openblas\w*|blis|dnnl|cublas|cublasLt|cudnn|nccl|tcmalloc\w*|jemalloc))"
    r"(?:-[0-9a-f]{6,})?[.\d-]*\.so[.\d]*"
)


def process_facts() -> dict[str, Any]:
    """Hardware, threads, determinism, environment and software of this process, JSON-ready and redacted.

    Without torch, what only torch knows is left out.
    """
    facts = {"software": software(), "hardware": hardware(), "environment": environment()}
    if _has_torch():
        facts |= {"threads": threads(), "determinism": determinism()}
    return dict(redact(facts))


def arm_sections(facts: dict[str, Any]) -> dict[str, Any]:
    """Sections of arm.json from what the process that holds the model says of itself.

    Args:
        facts: what was loaded, and beside it ``kernels``, ``dtypes`` and ``process`` (:func:`process_facts`).

    Returns:
        ``loaded``, which is the same for all shards of an arm, with the instruction set and the accelerator that
        computed it; ``kernels``; ``dtypes``; and one section for each of the process's.
    """
    loaded = {name: value for name, value in facts.items() if name not in ("kernels", "dtypes", "process")}
    process = facts.get("process", {})
    computed_by = {name: process.get("hardware", {}).get(name) for name in ("cpu_capability", "accelerator")}
    sections = {name: facts[name] for name in ("kernels", "dtypes") if name in facts}
    return {"loaded": {**loaded, **computed_by}, **sections, **process}


def environment() -> dict[str, str]:
    """Environment variables of this process that may change a number, secrets and home folders redacted."""
    # where a virtual environment lies changes nothing: two machines' LD_PRELOAD of its libgomp are the same
    is_own = sys.prefix not in ("/", "/usr", "/usr/local")
    values = numeric_variables()
    own = {name: value.replace(sys.prefix, "{sys.prefix}") if is_own else value for name, value in values.items()}
    return {name: redact(value, name) for name, value in own.items()}


def numeric_variables() -> dict[str, str]:
    """Environment variables of this process that may change a number, as they are."""
    names = (name for name in os.environ if name.startswith(NUMERIC_PREFIXES) or name in NUMERIC_NAMES)
    return {name: os.environ[name] for name in sorted(names) if not _NOISE.search(name)}


def software() -> dict[str, Any]:
    """Python, the system, and which moediag: its version, and a digest of its source for those between versions."""
    return {
        "python": platform.python_version(),
        "implementation": platform.python_implementation(),
        "platform": platform.platform(),
        "moediag": __version__,
        "moediag_source_sha256": _source_digest(),
    }


def hardware() -> dict[str, Any]:
    """The processor and, where torch sees one, the accelerator with its driver and libraries."""
    facts: dict[str, Any] = {
        "cpu_model": _cpu_model(),
        "machine": platform.machine(),
        "n_cores": os.cpu_count(),
        "n_usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }
    if not _has_torch():
        return facts
    import torch

    facts["cpu_capability"] = torch.backends.cpu.get_cpu_capability()
    facts["has_amx"] = _value(lambda: torch.cpu._is_amx_tile_supported())
    return facts | (_cuda() if torch.cuda.is_available() else {"accelerator": None})


def _cuda() -> dict[str, Any]:
    import torch

    device = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "accelerator": device.name,
        "compute_capability": f"{device.major}.{device.minor}",
        "n_visible_accelerators": torch.cuda.device_count(),
        "accelerator_memory_gib": round(device.total_memory / 2**30, 1),
        "driver": _driver_version(),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        "nccl": _nccl_version(),
    }


def _nccl_version() -> str | None:
    from torch.cuda import nccl

    version = _value(lambda: tuple(nccl.version()))  # type: ignore[no-untyped-call]
    return ".".join(map(str, version)) if version else None


def threads() -> dict[str, Any]:
    """Thread counts as torch uses them now, and which OpenMP, MKL and oneDNN it uses them with."""
    import torch

    return {
        "intra_op": torch.get_num_threads(),
        "inter_op": torch.get_num_interop_threads(),
        **parse_parallel_info(torch.__config__.parallel_info()),
        "libraries": loaded_libraries(),
    }


def parse_parallel_info(text: str) -> dict[str, Any]:
    """What torch says of its parallel libraries, without the counts it repeats from the environment.

    Example:
        >>> parse_parallel_info("OpenMP 201511 (a.k.a. OpenMP 4.5)\\n\\tomp_get_max_threads() : 2\\n")
        {'openmp': '201511 (a.k.a. OpenMP 4.5)', 'omp_max_threads': 2}
    """
    patterns = {
        "openmp": r"^OpenMP (.+)$",
        "mkl": r"Math Kernel Library Version (.+?)(?: for .*)?$",
        "onednn": r"MKL-DNN v([^\n]+)$",
        "backend": r"^ATen parallel backend: (.+)$",
        "omp_max_threads": r"omp_get_max_threads\(\) : (\d+)",
        "mkl_max_threads": r"mkl_get_max_threads\(\) : (\d+)",
    }
    found = {name: re.search(pattern, text, re.MULTILINE) for name, pattern in patterns.items()}
    values = {name: match.group(1).strip() for name, match in found.items() if match}
    return {name: int(value) if value.isdigit() else value for name, value in values.items()}


def loaded_libraries() -> list[str]:
    """Libraries for threads, matrices and memory that this process has mapped; two OpenMPs at once show here."""
    try:
        maps = Path("/proc/self/maps").read_text(errors="replace")
    except OSError:  # not a Linux
        return []
    return sorted({match.group(0)[1:] for match in _LIBRARIES.finditer(maps)})


def determinism() -> dict[str, Any]:
    """Torch's switches that decide which kernels may run and how precisely they add up."""
    import torch
    from torch.utils import deterministic

    backends, matmul = torch.backends, torch.backends.cuda.matmul
    switches: dict[str, Callable[[], Any]] = {
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled,
        "deterministic_warn_only": torch.is_deterministic_algorithms_warn_only_enabled,
        "fill_uninitialized_memory": lambda: deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
        "float32_matmul_precision": torch.get_float32_matmul_precision,
        "matmul_allow_tf32": lambda: matmul.allow_tf32,
        "matmul_fp32_precision": lambda: matmul.fp32_precision,
        "cudnn_allow_tf32": lambda: backends.cudnn.allow_tf32,
        "cudnn_enabled": lambda: backends.cudnn.enabled,
        "cudnn_deterministic": lambda: backends.cudnn.deterministic,
        "cudnn_benchmark": lambda: backends.cudnn.benchmark,
        "allow_bf16_reduced_precision_reduction": lambda: matmul.allow_bf16_reduced_precision_reduction,
        "allow_fp16_reduced_precision_reduction": lambda: matmul.allow_fp16_reduced_precision_reduction,
        "allow_fp16_accumulation": lambda: matmul.allow_fp16_accumulation,
        "preferred_blas": lambda: str(backends.cuda.preferred_blas_library()).rpartition(".")[2],
        "sdp_backends": _sdp_backends,
        "mkldnn_enabled": lambda: backends.mkldnn.enabled,
        "mkldnn_matmul_fp32_precision": lambda: backends.mkldnn.matmul.fp32_precision,  # type: ignore[attr-defined]
    }
    with warnings.catch_warnings():  # torch warns when its older TF32 switches are only read
        warnings.simplefilter("ignore")
        return {name: _value(switch) for name, switch in switches.items()}


def _sdp_backends() -> list[str]:
    from torch.backends import cuda

    enabled = {
        "flash": cuda.flash_sdp_enabled(),  # type: ignore[no-untyped-call]
        "mem_efficient": cuda.mem_efficient_sdp_enabled(),  # type: ignore[no-untyped-call]
        "math": cuda.math_sdp_enabled(),  # type: ignore[no-untyped-call]
        "cudnn": cuda.cudnn_sdp_enabled(),  # type: ignore[no-untyped-call]
    }
    return [name for name, is_enabled in enabled.items() if is_enabled]


def _value(read: Callable[[], Any]) -> Any:
    """A switch's value, or None where this torch has no such switch or was set through a newer one that hides it."""
    try:
        return read()
    except (AttributeError, RuntimeError):
        return None


def _has_torch() -> bool:
    if "torch" in sys.modules:
        return True
    from importlib.util import find_spec

    return find_spec("torch") is not None


def _cpu_model() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return platform.processor() or None
    names = (line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model", "cpu model")))
    return next(names, platform.processor() or None)


def _driver_version() -> str | None:
    """Version of the NVIDIA kernel driver, which the CUDA runtime does not know."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text(errors="replace")
    except OSError:
        return None
    match = re.search(r"Kernel Module\s+(?:for \S+\s+)?([\d.]+)", text)
    return match.group(1) if match else None


@cache
def _source_digest() -> str:
    root = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def plain(value: Any) -> Any:
    """``value`` as JSON knows it: dtypes and enums by their names, objects by their text.

    Example:
        >>> plain((1, {"b"}, None))
        [1, ['b'], None]
    """
    if isinstance(value, Enum):
        return value.name
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted((plain(item) for item in value), key=str)
    return str(value).removeprefix("torch.")


def stored_dtypes(model: Any) -> dict[str, list[str]]:
    """Dtypes of parameters, and of buffers that are numbers: rotary frequencies, correction biases."""
    buffers = {plain(buffer.dtype) for buffer in model.buffers() if buffer.is_floating_point()}
    return {"parameters": sorted({plain(p.dtype) for p in model.parameters()}), "buffers": sorted(buffers)}
