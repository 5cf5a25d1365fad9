"""How many bytes a bundle's model reads: what bounds the speed of decoding."""

from galerne.runtime.manifest import Manifest, ModelFacts

_FLOATS = {"float32": 4.0, "float16": 2.0, "bfloat16": 2.0}
_QUANTIZED = {"int8": 1.0, "uint8": 1.0, "int4": 0.5, "uint4": 0.5, "float8e4m3fn": 1.0}
_SCALE_BYTES = 2


def linear_shapes(model: ModelFacts) -> list[tuple[int, int]]:
    """Return [in, out] of each product of one decoder layer: q, k and v, o, gate and up, down."""
    attention = model.num_attention_heads * model.head_dim
    kv = model.num_key_value_heads * model.head_dim
    return [
        (model.hidden_size, attention + 2 * kv),
        (attention, model.hidden_size),
        (model.hidden_size, 2 * model.intermediate_size),
        (model.intermediate_size, model.hidden_size),
    ]


def decode_weight_bytes(manifest: Manifest) -> int:
    """Return the bytes of weights that one decode step reads: every product's, with its scales; of the table one row."""
    model, recipe = manifest.model, manifest.recipe
    layer = sum(_linear_bytes(rows, columns, recipe["weights"]) for rows, columns in linear_shapes(model))
    head = _linear_bytes(model.hidden_size, model.vocab_size, recipe["lm_head"])
    return int(model.num_hidden_layers * layer + head)


def seen_cache_bytes(model: ModelFacts, length: int, bytes_per_value: int) -> int:
    """Return the bytes of the keys and values of all layers that the last of `length` tokens sees."""
    slots = sum(length if window is None else min(length, window) for window in model.layer_windows)
    return 2 * model.num_key_value_heads * model.head_dim * slots * bytes_per_value


def _linear_bytes(rows: int, columns: int, form: dict[str, object]) -> float:
    dtype, block = str(form["dtype"]), form.get("block_size")
    if dtype in _FLOATS:
        return rows * columns * _FLOATS[dtype]
    groups = rows // block if isinstance(block, int) else 1
    zero_point = _QUANTIZED[dtype] if dtype.startswith("u") else 0
    return rows * columns * _QUANTIZED[dtype] + groups * columns * (_SCALE_BYTES + zero_point)
