"""What figures depend on: the processor, its memory, and how much of both is used.  Linux only."""

import ctypes
import os
import platform
from pathlib import Path
from typing import Any

import torch


def machine() -> dict[str, Any]:
    """Processor, its instructions that matter here, threads and torch."""
    lines = [line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line]
    info = {name.strip(): value.strip() for name, value in lines}
    flags = info.get("flags", "").split()
    return {
        "processor": info.get("model name") or platform.machine(),
        "instructions": [flag for flag in ("avx512f", "avx512_bf16", "amx_bf16") if flag in flags],
        "limited to": os.environ.get("ONEDNN_MAX_CPU_ISA"),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        **({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}),
    }


def without_bf16() -> None:
    """Compute as on a processor that has neither AMX nor AVX512-bf16, in this process and those it starts."""
    os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX512_CORE"  # read at the first matrix product
    torch.cpu._is_amx_tile_supported = torch.cpu._is_avx512_bf16_supported = lambda: False


def free_bytes() -> int:
    """Memory that can be had without swapping."""
    return _kibibytes("/proc/meminfo", "MemAvailable")


def resident_bytes() -> int:
    """Memory this process occupies, after giving back what it has freed."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return _kibibytes("/proc/self/status", "VmRSS")


def most_resident_bytes() -> int:
    """The most it occupied since ``forget_most_resident``."""
    return _kibibytes("/proc/self/status", "VmHWM")


def forget_most_resident() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _kibibytes(path: str, name: str) -> int:
    return 1024 * int(Path(path).read_text().split(f"{name}:")[1].split()[0])
