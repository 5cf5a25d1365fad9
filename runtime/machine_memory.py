"""What memory this machine has, and what of it can still be had."""

from pathlib import Path

from galerne.errors import BackendError

_MEMINFO, _CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


def machine_memory(meminfo: Path = _MEMINFO, cgroup: Path = _CGROUP) -> tuple[int, int]:
    """Return this machine's memory and what of it can still be had without swapping, in bytes; a container's limit counts.

    Raises: BackendError if there is no /proc/meminfo.
    """
    try:
        lines = meminfo.read_text().splitlines()
    except OSError as exc:
        raise BackendError(f"{meminfo}: cannot be read ({exc.strerror}); the target cpu needs Linux") from exc
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    total, available = sizes["MemTotal"], sizes["MemAvailable"]
    try:
        limit, used = (int((cgroup / name).read_text()) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):  # no cgroup of version 2, or "max": no limit
        return total, available
    return min(total, limit), max(0, min(available, limit - used))
