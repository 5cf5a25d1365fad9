"""Every operator in every dialect: spelled, and computing what its PyTorch body computes."""

from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

from galerne.export import ops
from galerne.export.dialects.dialect import dialect_module
from galerne.optimize.graph.clean import clean
from galerne.runtime.manifest import Dialect

DIALECTS = get_args(Dialect)
B, S, C, D = 2, 3, 11, 8
POSITIONS = torch.tensor([[20, 21, 22], [3, 4, 5]])
MASK = torch.rand(B, 1, S, C, generator=torch.Generator().manual_seed(1)) < 0.5
MASK[..., 4], MASK[..., 7] = True, False  # a query always sees one slot at least


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def hidden(ring: Tensor) -> Tensor:
    """Put large values where no query looks: they must not matter."""
    ring[:, :, 7] = 1e4
    return ring


# Arguments for each operator; one that stands here more than once is called in each way.
SAMPLES: list[tuple[str, tuple[Any, ...]]] = [
    ("rms_norm", (normal(B, S, 24), normal(24), 1e-5)),
    ("rotate", (normal(B, 4, S, D), normal(B, S, D // 2), normal(B, S, D // 2))),
    ("split_heads", (normal(B, S, 4 * D), 4, D)),
    ("merge_heads", (normal(B, 4, S, D),)),
    ("update_ring", (normal(B, 2, C, D), normal(B, 2, S, D), torch.tensor([C - S, 0]))),
    ("held_positions", (POSITIONS, normal(B, 2, C, D))),
    ("attend", (normal(B, 4, S, D), hidden(normal(B, 2, C, D)), hidden(normal(B, 2, C, D)), MASK, None, None)),
    ("attend", (normal(B, 4, S, D), normal(B, 4, C, D), normal(B, 4, C, D), MASK, 0.3, None)),
    ("attend", (normal(B, 4, S, D), normal(B, 1, C, D), normal(B, 1, C, D), MASK, None, 1.5)),
    ("select_positions", (normal(B, S, 24), torch.tensor([[2, 0], [1, 1]]))),
]


def registered() -> set[str]:
    return {name for name, value in vars(ops).items() if isinstance(value, type(ops.attend))}


def test_every_operator_has_a_sample() -> None:
    assert registered() == {name for name, _ in SAMPLES}


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("compute_type", [torch.float32, torch.float16, torch.bfloat16])
def test_every_operator_is_spelled(dialect: Dialect, compute_type: torch.dtype) -> None:
    spelled = dialect_module(dialect).translations(compute_type)
    assert set(spelled) == {getattr(torch.ops.galerne, name).default for name in registered()}


class One(nn.Module):
    """One operator as a module of its own; what is no tensor among its arguments is fixed."""

    def __init__(self, name: str, args: tuple[Any, ...]) -> None:
        super().__init__()
        self.operator, self.args = getattr(ops, name), args

    def forward(self, *given: Tensor) -> Tensor:
        tensors = iter(given)
        result: Tensor = self.operator(*[next(tensors) if isinstance(arg, Tensor) else arg for arg in self.args])
        return result


@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch's exporter calls what torch itself calls deprecated
@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(("name", "args"), SAMPLES, ids=[name for name, _ in SAMPLES])
def test_an_operator_computes_what_its_body_does(
    dialect: Dialect, name: str, args: tuple[Any, ...], tmp_path: Path
) -> None:
    """At the batch that it was traced with, and at another."""
    spelled, one = dialect_module(dialect), One(name, args).eval()
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    names = [f"x{i}" for i in range(len(tensors))]
    batched = [tensor.shape[0] == B for tensor in tensors]
    program = torch.onnx.export(
        one,
        tuple(tensors),
        dynamo=True,
        opset_version=spelled.OPSET,
        optimize=False,
        verbose=False,
        dynamic_shapes=(tuple({0: torch.export.Dim.DYNAMIC} if rows else None for rows in batched),),
        custom_translation_table=spelled.translations(torch.float32),
        input_names=names,
    )
    assert program is not None
    clean(program.model)
    ir.save(program.model, tmp_path / "one.onnx")
    session = ort.InferenceSession(tmp_path / "one.onnx", providers=["CPUExecutionProvider"])
    for count in (B, 1):
        given = [tensor[:count] if rows else tensor for tensor, rows in zip(tensors, batched, strict=True)]
        (found,) = session.run(None, {key: tensor.numpy() for key, tensor in zip(names, given, strict=True)})
        np.testing.assert_allclose(found, one(*given).numpy(), rtol=0, atol=1e-5)
