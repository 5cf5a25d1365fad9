"""A checkpoint with a LoRA adapter merged into it: W + scale * B A, in float32, tensor by tensor as they are read.

Source: peft 0.21, tuners/lora/layer.py (scaling, get_delta_weight) and utils/other.py (get_pattern_key).
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from galerne.errors import InputError
from galerne.export.checkpoint.checkpoint import Checkpoint, DType
from galerne.export.checkpoint.safetensors_file import SafetensorsFile
from galerne.export.checkpoint.safetensors_folder import read_table

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_TENSOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])(?:\.default)?\.weight")
_COPY = re.compile(r"base_model\.model\.(.+?)(?:\.base_layer)?\.weight")
# What changes the merged weights, or cannot be merged at all.
_REFUSED = (
    *("use_dora", "modules_to_save", "fan_in_fan_out", "lora_bias", "layer_replication", "target_parameters"),
    *("trainable_token_indices", "alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config"),
    *("kasa_config", "monteclora_config"),
)
# Beginnings of `init_lora_weights` that change the base model's weights too.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class Adapter:
    """What is added to one weight [out, in]: scale * B A, with A [r, in] and B [out, r]."""

    a: str
    b: str
    scale: float


class AdaptedCheckpoint(Checkpoint):
    """A checkpoint whose tensors are read with an adapter's changes.

    base: the checkpoint without them.
    folder: the adapter's.
    """

    def __init__(self, base: Checkpoint, folder: Path) -> None:
        """Open an adapter as peft saves it. Raises: InputError naming what is missing, or what cannot be merged."""
        if base.quantization is not None:
            raise InputError(
                f"{base.path}: quantized already with {base.quantization}; an adapter can be merged into floats only"
            )
        self.base, self.folder = base, folder
        self.path, self.config = base.path, base.config
        self.format = base.format
        for name in (CONFIG, WEIGHTS):
            if not (folder / name).is_file():
                raise InputError(f"{folder}: no {name} in it; expected an adapter as peft's save_pretrained writes it")
        config = read_table(folder / CONFIG)
        _check(config, str(folder / CONFIG))
        self._file = SafetensorsFile(folder / WEIGHTS)
        self._adapters = self._pair(config)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Return the base's shapes."""
        return self.base.shapes()

    def dtype(self, name: str) -> DType:
        """Return float32 for a tensor that the adapter changes, and the base's type for the rest."""
        return "float32" if name in self._adapters else self.base.dtype(name)

    def read(self, name: str) -> NDArray[Any]:
        """Return one tensor, with the adapter's change added in float32."""
        values = self.base.read(name)
        adapter = self._adapters.get(name)
        if adapter is None:
            return values
        a, b = (_float32(self._file.read(part)) for part in (adapter.a, adapter.b))
        merged = np.empty(values.shape, np.float32)
        for first in range(0, len(values), _ROWS_AT_ONCE):
            rows = slice(first, first + _ROWS_AT_ONCE)
            merged[rows] = (b[rows] @ a) * np.float32(adapter.scale)
            merged[rows] += _float32(values[rows])
        return merged

    def release(self, name: str) -> None:
        """Drop a tensor's pages from the resident set."""
        self.base.release(name)

    def tokenizer_files(self) -> dict[str, bytes]:
        """Return the base's tokenizer."""
        return self.base.tokenizer_files()

    def files(self) -> list[Path]:
        """Return the base's files and the adapter's."""
        return [*self.base.files(), self.folder / CONFIG, self.folder / WEIGHTS]

    def _copies_base(self, stored: str) -> bool:
        """Whether a tensor is the base's own, which peft saves beside adapters of embeddings and lm_head."""
        match = _COPY.fullmatch(stored)
        name = f"{match[1]}.weight" if match else ""
        if self.base.shapes().get(name) != self._file.entries[stored].shape:
            return False
        return np.array_equal(_float32(self.base.read(name)), _float32(self._file.read(stored)))

    def _pair(self, config: Mapping[str, Any]) -> dict[str, Adapter]:
        found: dict[str, dict[str, str]] = {}
        for stored in self._file.entries:
            match = _TENSOR.fullmatch(stored)
            if match is None and self._copies_base(stored):
                continue
            if match is None:
                raise InputError(
                    f"{self._file.path}: {stored}: neither lora_A nor lora_B of a linear layer; only these are merged"
                )
            found.setdefault(match[1], {})[match[2]] = stored
        if not found:
            raise InputError(f"{self._file.path}: no tensors in it; the adapter is empty")
        adapters = {}
        for module, parts in sorted(found.items()):
            if len(parts) != 2:
                raise InputError(
                    f"{self._file.path}: {module}: lora_{'B' if 'A' in parts else 'A'} is missing; download it again"
                )
            name = f"{module}.weight"
            if name not in self.base.shapes():
                raise InputError(
                    f"{self._file.path}: {module}: no weight of this name in {self.base.path}; is it the adapter's base?"
                )
            shapes = [self._file.entries[parts[part]].shape for part in "AB"]
            out_features, in_features = self.base.shapes()[name]
            rank = shapes[0][0] if shapes[0] else 0
            if not rank or shapes != [(rank, in_features), (out_features, rank)]:
                raise InputError(
                    f"{self._file.path}: {module}: lora_A {list(shapes[0])} and lora_B {list(shapes[1])} do not fit a weight of "
                    f"{[out_features, in_features]} in {self.base.path}"
                )
            adapters[name] = Adapter(parts["A"], parts["B"], _scale(module, rank, config, str(self.folder / CONFIG)))
        return adapters


def _check(config: Mapping[str, Any], where: str) -> None:
    if config.get("peft_type") != "LORA":
        raise InputError(f"{where}: peft_type: {config.get('peft_type')!r} is not supported; expected 'LORA'")
    for key in _REFUSED:
        if config.get(key):
            raise InputError(
                f"{where}: {key}: {json.dumps(config[key])} is not supported; merge the adapter with peft first"
            )
    if config.get("bias", "none") != "none":
        raise InputError(f"{where}: bias: {config['bias']!r} is not supported; expected 'none'")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        raise InputError(
            f"{where}: init_lora_weights: {start!r} changes the base model too; convert the adapter to plain LoRA with peft"
        )


def _scale(module: str, rank: int, config: Mapping[str, Any], where: str) -> float:
    alpha = _patterned(config.get("alpha_pattern"), module, config.get("lora_alpha"), f"{where}: alpha_pattern")
    expected = _patterned(config.get("rank_pattern"), module, config.get("r"), f"{where}: rank_pattern")
    for key, value in (("lora_alpha", alpha), ("r", expected)):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InputError(f"{where}: {key}: expected a number, found {value!r}")
    if rank != expected:
        raise InputError(
            f"{where}: r: {expected} for {module}, but lora_A has {rank} rows; the two files do not belong together"
        )
    return float(alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank)


def _patterned(patterns: Any, module: str, default: Any, where: str) -> Any:
    """Return the value of the first pattern that ends a module's name, as peft looks it up."""
    if not isinstance(patterns or {}, Mapping):
        raise InputError(f"{where}: expected a table, found {patterns!r}")
    for pattern, value in (patterns or {}).items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        except re.error as exc:
            raise InputError(f"{where}: {pattern!r} is no regular expression ({exc})") from exc
    return default


def _float32(values: NDArray[Any]) -> NDArray[np.float32]:
    if values.dtype == ml_dtypes.bfloat16:
        return (values.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)
