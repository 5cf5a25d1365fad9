"""Finds the dialect that a graph is written in: the other modules of this folder are one each."""

import importlib
from collections.abc import Callable
from typing import Any, Protocol, cast

import torch
from onnxscript.values import Opset

from galerne.runtime.manifest import Dialect

Translations = dict[Callable[..., Any], Callable[..., Any]]
Cast = Callable[[Any], Any]


class DialectModule(Protocol):
    """What a dialect's module offers: its ONNX opset, and the spelling of every operator in it."""

    OPSET: int

    def translations(self, compute_type: torch.dtype) -> Translations: ...


def dialect_module(name: Dialect) -> DialectModule:
    """Return the module of a dialect."""
    return cast(DialectModule, importlib.import_module(f"galerne.export.dialects.{name}"))


def casts(onnx: Opset, compute_type: torch.dtype) -> tuple[Cast, Cast]:
    """Return what casts a value to float32 and what casts it back to `compute_type`; both do nothing for float32."""
    narrow = {torch.float16: 10, torch.bfloat16: 16}.get(compute_type)  # onnx.TensorProto's numbers of the types
    if narrow is None:
        return (lambda x: x), (lambda x: x)
    return (lambda x: onnx.Cast(x, to=1)), (lambda x: onnx.Cast(x, to=narrow))
