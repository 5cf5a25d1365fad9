"""Checkpoints of known shapes with random weights, for sizing: what the original takes, without the original.

A preset is a `config.json` that was written after the original's, without a copy of it at hand: the tests hold the number of
weights that it gives against the published one, and no more. Names and shapes of the tensors come from transformers' own
class, built on the meta device, so a preset needs nothing else and works whether or not Galerne exports its family yet.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from statistics import NormalDist
from typing import Any

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoConfig, AutoModelForCausalLM

from galerne.export.checkpoint.safetensors_folder import CONFIG, INDEX, WEIGHTS
from galerne.export.preset import preset_config
from galerne.files import staged_folder
from galerne.parallel import ordered
from galerne.progress import Task
from galerne.runtime.safetensors import entries_in_a_row, header_bytes

_SHARD_BYTES = 5_000_000_000
_VALUE_BYTES = 2
# Values of one random stream: the grain that is spread over the cores, and all of a tensor that is in memory at once.
_BLOCK = 4 << 20
_ATTENTION_GAIN, _BIAS_STD = 1.6, 0.1

Bfloat16 = NDArray[np.uint16]


@dataclass(frozen=True)
class Tensor:
    """One tensor to write: the standard deviation of its values, or the one value that they all have."""

    name: str
    shape: tuple[int, ...]
    std: float = 0.0
    constant: float | None = None

    @property
    def size(self) -> int:
        """Bytes, stored as bfloat16."""
        return math.prod(self.shape) * _VALUE_BYTES


def synth(preset: str, out: Path, *, layers: int | None = None, seed: int = 0, threads: int | None = None) -> int:
    """Write a checkpoint: the preset's config.json, random bfloat16 weights, and an index where there are several shards.

    Args:
        out: the checkpoint's folder, which must not exist. It appears whole or not at all.
        seed: the same one gives the same bytes, on any number of threads.
    Returns: the number of weights.
    Raises: InputError if there is no such preset, it has fewer layers, or `out` cannot be written.
    """
    config = preset_config(preset, layers)
    with staged_folder(out) as folder:
        return write_checkpoint(config, folder, seed=seed, threads=threads)


def write_checkpoint(config: dict[str, Any], folder: Path, *, seed: int = 0, threads: int | None = None) -> int:
    """Write config, weights and index into an empty folder. Returns: the number of weights."""
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tensors = tensors_of(folder)
    total = sum(tensor.size for tensor in tensors)
    shards = _shards(tensors)
    with Task("weights", total) as task:
        for file, held in shards.items():
            _write_shard(folder / file, held, seed, threads, task.advance)
    if len(shards) > 1:
        weight_map = {tensor.name: file for file, held in shards.items() for tensor in held}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return total // _VALUE_BYTES


def tensors_of(folder: Path) -> list[Tensor]:
    """Return the tensors of the model that a folder's config.json describes, as transformers' class has them.

    Values are spread so that activations stay near 1 through any number of layers: a product's by its input's width, those
    that end in the residual stream narrower by the depth. Queries and keys are a little wider, so that attention picks some
    keys among thousands, and a lost window shows. Norms do nothing.
    """
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    depth = math.sqrt(2 * config.num_hidden_layers)
    tensors = []
    for name, parameter in model.named_parameters():  # a tied projection stands under the embedding's name only
        path, _, kind = name.rpartition(".")
        module, shape = model.get_submodule(path), tuple(parameter.shape)
        if kind == "bias":
            tensors.append(Tensor(name, shape, _BIAS_STD))
        elif isinstance(module, torch.nn.Embedding):
            tensors.append(Tensor(name, shape, shape[1] ** -0.5 if config.tie_word_embeddings else 1.0))
        elif isinstance(module, torch.nn.Linear):
            gain = {"o_proj": 1 / depth, "down_proj": 1 / depth, "q_proj": _ATTENTION_GAIN, "k_proj": _ATTENTION_GAIN}
            tensors.append(Tensor(name, shape, gain.get(path.rpartition(".")[2], 1.0) * shape[1] ** -0.5))
        else:  # a norm: what a new one of its class holds, which is 1, or 0 where the class adds 1 itself
            tensors.append(Tensor(name, shape, constant=float(type(module)(*shape).weight.detach()[0])))
    return tensors


def _shards(tensors: list[Tensor]) -> dict[str, list[Tensor]]:
    groups: list[list[Tensor]] = [[]]
    for tensor in tensors:
        if groups[-1] and sum(held.size for held in groups[-1]) + tensor.size > _SHARD_BYTES:
            groups.append([])
        groups[-1].append(tensor)
    if len(groups) == 1:
        return {WEIGHTS: groups[0]}
    return {f"model-{i:05}-of-{len(groups):05}.safetensors": group for i, group in enumerate(groups, 1)}


def _write_shard(
    path: Path, tensors: list[Tensor], seed: int, threads: int | None, advance: Callable[[int], None]
) -> None:
    entries = entries_in_a_row((tensor.name, "BF16", tensor.shape) for tensor in tensors)
    with path.open("wb") as file:
        file.write(header_bytes(entries, {"format": "pt"}))
        for values in ordered(_blocks(tensors, seed), threads):
            file.write(values.data)
            advance(values.nbytes)


def _blocks(tensors: list[Tensor], seed: int) -> Iterator[Callable[[], Bfloat16]]:
    for tensor in tensors:
        count = math.prod(tensor.shape)
        for number, first in enumerate(range(0, count, _BLOCK)):
            yield partial(_values, tensor, seed, number, min(_BLOCK, count - first))


def _values(tensor: Tensor, seed: int, number: int, count: int) -> Bfloat16:
    """Return block `number` of a tensor: its random stream hangs on the seed, the tensor's name and that number alone."""
    if tensor.constant is not None:
        return _bfloat16(np.full(count, tensor.constant))
    key = int.from_bytes(hashlib.sha256(tensor.name.encode()).digest()[:8], "little")
    drawn = np.random.Generator(np.random.SFC64([seed, key, number])).bytes(count * 2)
    return _quantiles(tensor.std).take(np.frombuffer(drawn, "<u2"))


@cache
def _quantiles(std: float) -> Bfloat16:
    """Return a normal distribution's 65536 quantiles: 16 random bits pick one, many times faster than numpy's normal."""
    return _bfloat16(std * _standard_quantiles())


@cache
def _standard_quantiles() -> NDArray[np.float64]:
    normal = NormalDist()
    return np.array([normal.inv_cdf((i + 0.5) / 65536) for i in range(65536)])


def _bfloat16(values: NDArray[np.float64]) -> Bfloat16:
    return values.astype(np.float32).astype(ml_dtypes.bfloat16).view(np.uint16)
