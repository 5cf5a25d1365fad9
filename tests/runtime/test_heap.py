"""Freed memory goes back to the system, in a process of its own, since the test's has a history."""

import platform
import subprocess
import sys

import pytest

HOLD_AND_FREE = """
import re
from pathlib import Path
from galerne.runtime.heap import give_back

def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

blocks = [b"x" * (100_000 + i % 2) for i in range(1000)]  # small enough to come from the heap, which only shrinks at its end
last = b"y" * 100_000
del blocks
before = resident()
give_back()
give_back()
print(before - resident(), len(last))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps what was freed")
def test_freed_memory_is_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", HOLD_AND_FREE], capture_output=True, text=True, check=True)
    given, _ = map(int, done.stdout.split())
    assert given > 80_000_000
