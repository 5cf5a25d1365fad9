"""What a workload takes of a device's memory, part by part.

On a CPU the figures follow ONNX Runtime 1.32 and are held against the resident memory of a process (docs/fit.md). On a GPU they
are counted from the shapes alone: no engine of TensorRT has been measured.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from galerne.optimize.fit.workload import Workload
from galerne.runtime.engines.tensorrt.package import numbers
from galerne.runtime.footprint import (
    StoredProduct,
    projection_parts,
    shares_table,
    slot_bytes,
    stored_products,
    stored_weight_bytes,
    table_bytes,
)
from galerne.targets.target import Stack, Target

# ONNX Runtime keeps a quantized weight packed, with a float32 scale and a float32 sum of the weights for each block, and
# the scales as they were. An int8 weight has blocks of 32 there, whatever it had in the bundle, but for the projection of an
# int4 model in the `cpu` engine (`optimize.lower.projection_blocks`).
_PACKED_BLOCK_BYTES, _BLOCK_BYTES = 8, 12
_INT8_BLOCK = 32
_FLOAT32_BYTES = 4
# A process of Python with numpy, ONNX Runtime and this runtime that has run a model of no size: measured, 64-bit Linux.
_PROCESS_BYTES, _PROCESS_LAYER_BYTES = 73_000_000, 330_000
# What a process needs while it builds the `cpu` engine beside that: onnx-ir and the graph. Measured.
_CPU_BUILDER_BYTES = 60_000_000
# How often the layers' widest activation is there at once: gate and up, and both again after they are split.
_WIDEST_COPIES = 2
# Scores before and after softmax.
_SCORE_COPIES = 2
# TensorRT's libraries in a process, counted where CPU and GPU share the memory. An assumption: not measured.
_TENSORRT_PROCESS_BYTES = 400_000_000
# TensorRT's builder: its process, and how often it holds the weights. Measured with TensorRT-RTX 1.7 on x86: docs/fit.md. Before
# this version TensorRT hands the engine over whole, which is once more.
_BUILDER_BYTES = 480_000_000
_FLOAT_BUILDER_COPIES, _QUANTIZED_BUILDER_COPIES = 3.4, 2.0
_STREAMED_SINCE = (10, 13)


@dataclass(frozen=True)
class Memory:
    """Bytes by part.

    parts: what is there while the model runs: weights, cache, activations, workspace, runtime.
    transient: the most that is there at once, all parts included, while it is loading or building.
    """

    parts: dict[str, int]
    transient: dict[str, int]

    @property
    def total(self) -> int:
        """All that is there while the model runs."""
        return sum(self.parts.values())

    @property
    def peak(self) -> int:
        """The most that is there at once, building left out."""
        return max([self.total, *(size for what, size in self.transient.items() if what != "building")])


def memory_of(work: Workload, target: Target, stack: Stack) -> Memory:
    """Return what a workload takes on a target with one of its stacks; on a CPU that is the `cpu` engine's."""
    return on_cpu(work) if stack.backend == "onnxruntime" else _on_gpu(work, target, stack)


def on_cpu(work: Workload, *, widened: bool = True) -> Memory:
    """Return what ONNX Runtime takes in this machine's memory.

    Args:
        widened: whether it runs the `cpu` engine, which computes in float32, or the portable graph.
    """
    model, forms = work.model, work.forms
    compute = _FLOAT32_BYTES if widened else forms.compute_bytes
    stored = stored_products(model, forms)
    packed = list(map(_packed_bytes, stored))
    if widened:
        packed[-1] = _projection_bytes(stored)
    products = sum(packed)
    loads = [size + _raw_bytes(product) for size, product in zip(packed, stored, strict=True)]
    if widened:
        loads[-1] /= _projection_parts(stored[-1])
    largest = max(loads)
    table = table_bytes(model, forms)
    process = _PROCESS_BYTES + model.num_hidden_layers * _PROCESS_LAYER_BYTES
    slot = slot_bytes(model, compute if forms.cache is None else forms.cache_bytes) * work.batch
    # A graph of float16 has each activation in several types, as it is and widened for a product.
    widest = work.tokens * 2 * model.intermediate_size * _FLOAT32_BYTES * (1 if compute == _FLOAT32_BYTES else 2)
    scores = work.tokens * model.num_attention_heads * work.longest_ring(grown=True) * compute
    parts = {
        "weights": int(products + table),
        "cache": work.grown_slots() * slot,
        "activations": _WIDEST_COPIES * widest + _SCORE_COPIES * scores + _logits_bytes(work),
        "workspace": 0 if forms.cache is None else _unrounded_ring(work),
        "runtime": process,
    }
    transient = {
        "loading": int(process + products + largest),
        "building": int(process + _CPU_BUILDER_BYTES + products + largest),
    }
    return Memory(parts, transient)


def _unrounded_ring(work: Workload) -> int:
    """Return what a layer's keys and values take while attention reads them, as float32, where the rings are rounded."""
    return work.batch * work.longest_ring(grown=True) * slot_bytes(work.model, _FLOAT32_BYTES)


def _packed_bytes(product: StoredProduct) -> float:
    """Return what ONNX Runtime's CPU provider keeps of a product's weight: as float32, or packed in blocks."""
    form, rows, columns = product
    if form.is_float:
        return rows * columns * _FLOAT32_BYTES
    size = form.bytes_per_weight()
    block = _INT8_BLOCK if size == 1 else form.block_for(rows)
    return rows * columns * (size + _BLOCK_BYTES / block)


def _projection_bytes(products: Sequence[StoredProduct]) -> float:
    """Return what the `cpu` engine keeps of the vocabulary projection, the last of the products."""
    form, rows, columns = products[-1]
    alike = [other.form for other in products[:-1] if other.rows == rows]
    blocks = [other.block_for(rows) for other in alike if not other.is_float and other.bytes_per_weight() < 1]
    if form.is_float or form.bytes_per_weight() < 1 or 2 * len(blocks) <= len(alike):
        return _packed_bytes(products[-1])
    return rows * columns * (1 + _BLOCK_BYTES / max(blocks))


def _projection_parts(projection: StoredProduct) -> int:
    """Return in how many products the `cpu` engine computes the vocabulary projection."""
    form, rows, columns = projection
    return projection_parts(rows, columns) if form.dtype == "int8" else 1


def _raw_bytes(product: StoredProduct) -> float:
    """Return what it reads of a weight while it packs it."""
    form, rows, columns = product
    return rows * columns * (_FLOAT32_BYTES if form.is_float else form.bytes_per_weight())


def _on_gpu(work: Workload, target: Target, stack: Stack) -> Memory:
    model, forms = work.model, work.forms
    compute, tokens = forms.compute_bytes, work.tokens
    # The rings have their full size from the start. The widest activation, and the residual stream before and after its norm.
    widest = _WIDEST_COPIES * tokens * 2 * model.intermediate_size * compute
    activations = widest + 2 * tokens * model.hidden_size * _FLOAT32_BYTES + _logits_bytes(work)
    ring = work.longest_ring(grown=False)
    activations += tokens * ring  # the mask, a byte for each query and slot
    # No attention kernel: scores and their softmax, in float32 in the primitive dialect.
    if stack.dialect == "primitive" or not stack.is_tensorrt:
        score = compute if stack.dialect != "primitive" else _FLOAT32_BYTES
        activations += _SCORE_COPIES * tokens * model.num_attention_heads * ring * score
    # For many tokens at once, kernels may unpack a quantized weight into the type that they multiply in.
    products = stored_products(model, forms)
    workspace = max(0 if form.is_float else rows * columns * compute for form, rows, columns in products)
    # Only TensorScatter updates a ring in place; without it each run reads one set of rings and writes another.
    sets = 2 if stack.dialect == "primitive" else 1
    # A quantized table is read in another type than the vocabulary projection (`optimize.lower.table`), so it is there twice.
    again = table_bytes(model, forms) if shares_table(model, forms) and not forms.table.is_float else 0
    parts = {
        "weights": stored_weight_bytes(model, forms) + again,
        "cache": sets * work.full_slots() * slot_bytes(model, forms.cache_bytes) * work.batch,
        "activations": activations,
        "workspace": workspace,
        "runtime": _TENSORRT_PROCESS_BYTES if target.unified_memory else 0,
    }
    if stack.builds_on != "device":
        return Memory(parts, {})
    layers = products[:-1]  # without the vocabulary projection
    floats = sum(product.stored_bytes for product in layers if product.form.is_float) / sum(
        product.stored_bytes for product in layers
    )
    copies = floats * _FLOAT_BUILDER_COPIES + (1 - floats) * _QUANTIZED_BUILDER_COPIES
    if stack.version is not None and numbers(stack.version) < _STREAMED_SINCE:
        copies += 1
    return Memory(parts, {"building": int(_BUILDER_BYTES + copies * parts["weights"])})


def _logits_bytes(work: Workload) -> int:
    return work.batch * work.model.vocab_size * _FLOAT32_BYTES
