"""A LoRA adapter on disk, as peft saves it: which layers it changes, by which products, at what scale.

Source: peft 0.21, tuners/lora/layer.py (scaling) and utils/other.py (get_pattern_key).
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from galerne.errors import InputError
from galerne.files import read_table
from galerne.runtime.safetensors import SafetensorsHeader

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_TENSOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])(?:\.default)?\.weight")
# What changes the adapted model's weights in another way, or not by products alone.
_REFUSED = (
    *("use_dora", "modules_to_save", "fan_in_fan_out", "lora_bias", "layer_replication", "target_parameters"),
    *("trainable_token_indices", "alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config"),
    *("kasa_config", "monteclora_config"),
)
# Beginnings of `init_lora_weights` that change the base model's weights too.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class Product:
    """What an adapter adds to one weight [out, in]: scale * B A, with A [rank, in] and B [out, rank].

    a, b: the tensors' names in the adapter's file.
    """

    a: str
    b: str
    rank: int
    scale: float


class LoraFolder:
    """An adapter's two files, opened and checked.

    file: the tensors, mapped.
    """

    def __init__(self, path: Path) -> None:
        """Open an adapter. Raises: InputError naming what is missing, or what is not plain LoRA."""
        self.path = path
        for name in (CONFIG, WEIGHTS):
            if not (path / name).is_file():
                raise InputError(f"{path}: no {name} in it; expected an adapter as peft's save_pretrained writes it")
        self._config = read_table(path / CONFIG)
        _check(self._config, str(path / CONFIG))
        self.file = SafetensorsHeader(path / WEIGHTS)

    def files(self) -> list[Path]:
        """Return the files that the adapter is made of."""
        return [self.path / CONFIG, self.path / WEIGHTS]

    def products(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        where: Path,
        unknown: str,
        is_copy: Callable[[str], bool] = lambda _: False,
    ) -> dict[str, Product]:
        """Return what the adapter adds to each layer, by the layer's name, such as `model.layers.0.mlp.up_proj`.

        Args:
            shapes: the layers that can be adapted, with the shapes [out, in] of their weights.
            where: the model that these are of.
            unknown: what to say of a layer that is none of them.
            is_copy: whether a tensor, which is no part of a product, is the base's own and can be left out.
        Raises: InputError if the adapter does not fit, is empty or incomplete.
        """
        found: dict[str, dict[str, str]] = {}
        for stored in self.file.entries:
            match = _TENSOR.fullmatch(stored)
            if match is not None:
                found.setdefault(match[1], {})[match[2]] = stored
            elif not is_copy(stored):
                raise InputError(
                    f"{self.file.path}: {stored}: neither lora_A nor lora_B of a linear layer; only these are read"
                )
        if not found:
            raise InputError(f"{self.file.path}: no tensors in it; the adapter is empty")
        return {module: self._product(module, found[module], shapes, where, unknown) for module in sorted(found)}

    def _product(
        self, module: str, parts: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]], where: Path, unknown: str
    ) -> Product:
        if len(parts) != 2:
            raise InputError(
                f"{self.file.path}: {module}: lora_{'B' if 'A' in parts else 'A'} is missing; download it again"
            )
        if module not in shapes:
            raise InputError(f"{self.file.path}: {module}: {unknown}")
        a, b = (self.file.entries[parts[part]].shape for part in "AB")
        out_features, in_features = shapes[module]
        rank = a[0] if a else 0
        if not rank or (a, b) != ((rank, in_features), (out_features, rank)):
            raise InputError(
                f"{self.file.path}: {module}: lora_A {list(a)} and lora_B {list(b)} do not fit a weight of "
                f"{[out_features, in_features]} in {where}"
            )
        return Product(parts["A"], parts["B"], rank, _scale(module, rank, self._config, str(self.path / CONFIG)))


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
