"""What this machine's processor has that ONNX Runtime's kernels are chosen by."""

import platform
from pathlib import Path

# The flags that ONNX Runtime's kernels, and so the layout of pre-packed weights, are chosen by.
_FLAGS = (
    "avx2",
    "avx512f",
    "avx512_bf16",
    "avx512_vnni",
    "avx_vnni",
    "amx_tile",
    "amx_int8",
    "asimddp",
    "i8mm",
    "bf16",
    "sve",
)


def cpu_features() -> tuple[str, ...]:
    """Return the architecture and the flags that matter, sorted. Source: /proc/cpuinfo; only the architecture elsewhere."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    flags = {
        flag for line in lines if line.lower().startswith(("flags", "features")) for flag in line.split(":")[1].split()
    }
    return tuple(sorted({platform.machine(), *flags.intersection(_FLAGS)}))


def sums_bytes_exactly() -> bool:
    """Whether products of unsigned and signed bytes are summed without overflow.

    x86 without VNNI sums two of them in 16 bits. Source: ONNX Runtime's session option `session.x64quantprecision`.
    """
    features = cpu_features()
    return platform.machine() not in ("x86_64", "AMD64") or any("vnni" in flag for flag in features)
