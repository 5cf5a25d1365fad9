"""What a target has: from its file, or measured where it is this machine."""

from pathlib import Path

import pytest

from galerne.errors import BackendError
from galerne.optimize.fit.device import Device, device_of, machine_memory
from galerne.targets import target as targets

MEMINFO = "MemTotal:       24000000 kB\nMemFree:         1000000 kB\nMemAvailable:   20000000 kB\n"


def test_a_device_is_what_its_file_says() -> None:
    target = targets.load("jetson-orin-nx-16gb")
    device = device_of(target)
    assert device.usable_bytes == target.memory_bytes - target.reserved_bytes  # type: ignore[operator]
    assert device.bandwidth_bytes_per_s == target.bandwidth_bytes_per_s and not device.measured


def test_this_machine_is_measured() -> None:
    device = device_of(targets.load("cpu"))
    assert device.measured and 0 < device.usable_bytes <= device.memory_bytes
    assert device.bandwidth_bytes_per_s > 1e8
    assert device.ops_for("float16", quantized=True) == 4 * device.ops_for("float16", quantized=False)  # type: ignore[operator]


def test_memory_is_what_can_be_had(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text(MEMINFO)
    assert machine_memory(tmp_path / "meminfo", tmp_path) == (24_000_000 * 1024, 20_000_000 * 1024)
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("1000\n")
    assert machine_memory(tmp_path / "meminfo", tmp_path) == (24_000_000 * 1024, 20_000_000 * 1024)


def test_a_container_s_limit_counts(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text(MEMINFO)
    (tmp_path / "memory.max").write_text("8000000000\n")
    (tmp_path / "memory.current").write_text("3000000000\n")
    assert machine_memory(tmp_path / "meminfo", tmp_path) == (8_000_000_000, 5_000_000_000)


def test_a_machine_without_meminfo_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="needs Linux"):
        machine_memory(tmp_path / "none", tmp_path)


def test_float32_may_run_on_tensor_cores() -> None:
    device = Device("x", "x", 1, 1, 1.0, {"float32": 10.0, "float16": 100.0}, measured=False)
    assert device.ops_for("float32", quantized=False) == 50.0
    assert device.ops_for("float16", quantized=True) == 100.0
    assert device.ops_for("bfloat16", quantized=False) is None
