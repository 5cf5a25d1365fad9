"""The most tokens a second that a device's bandwidth and arithmetic allow: nothing is faster. How near one comes is not said."""

import math

from galerne.optimize.fit.device import Device
from galerne.optimize.fit.workload import Workload, attention_ops, product_weights
from galerne.runtime.footprint import decode_weight_bytes, head_shape, linear_shapes, seen_cache_bytes, stored_products


def decode_bound(work: Workload, device: Device, bandwidth_bytes_per_s: float | None = None) -> float:
    """Return the bound on decoding, in tokens a second of all rows together, each at its last token of the context.

    A step reads every weight once for all rows, and each row's keys and values.

    Args:
        bandwidth_bytes_per_s: in place of the device's, as in another power mode.
    """
    model, forms = work.model, work.forms
    read = decode_weight_bytes(model, forms)
    read += work.batch * seen_cache_bytes(model, work.context, forms.cache_bytes)
    last = attention_ops(model, work.context) - attention_ops(model, work.context - 1)
    ops = work.batch * (2 * product_weights(model, linear_shapes(model)) + 2 * math.prod(head_shape(model)) + last)
    return work.batch / _seconds(read, ops, work, device, bandwidth_bytes_per_s)


def prefill_bound(work: Workload, device: Device) -> float:
    """Return the bound on reading a prompt of the whole context, in tokens a second of all rows together.

    Each run of a chunk reads every weight once; the vocabulary's projection is computed for a run's last token.
    """
    model, forms = work.model, work.forms
    runs = math.ceil(work.context / work.chunk)
    ops = 2.0 * product_weights(model, linear_shapes(model)) * work.context + 2.0 * math.prod(head_shape(model)) * runs
    ops += attention_ops(model, work.context)
    seconds = _seconds(runs * decode_weight_bytes(model, forms), work.batch * ops, work, device, None)
    return work.batch * work.context / seconds


def _seconds(read: float, ops: float, work: Workload, device: Device, bandwidth: float | None) -> float:
    # The faster rate for all, where only some are quantized: so it stays a bound.
    any_quantized = any(not product.form.is_float for product in stored_products(work.model, work.forms))
    rate = device.ops_for(work.forms.compute, quantized=any_quantized)
    return max(read / (bandwidth or device.bandwidth_bytes_per_s), 0.0 if rate is None else ops / rate)
