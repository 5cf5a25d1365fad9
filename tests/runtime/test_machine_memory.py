"""What memory this machine has: all of it, and what can be had of it."""

from pathlib import Path

import pytest

from galerne.errors import BackendError
from galerne.runtime.machine_memory import machine_memory

MEMINFO = "MemTotal:       24000000 kB\nMemFree:         1000000 kB\nMemAvailable:   20000000 kB\n"


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
