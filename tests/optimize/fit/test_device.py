"""What a target has: from its file, or measured where it is this machine."""

from galerne.optimize.fit.device import Device, device_of
from galerne.targets import target as targets


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


def test_float32_may_run_on_tensor_cores() -> None:
    device = Device("x", "x", 1, 1, 1.0, {"float32": 10.0, "float16": 100.0}, measured=False)
    assert device.ops_for("float32", quantized=False) == 50.0
    assert device.ops_for("float16", quantized=True) == 100.0
    assert device.ops_for("bfloat16", quantized=False) is None
