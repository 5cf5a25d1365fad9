"""A parser's error becomes the operator, its place in the model and what to do."""

from typing import Any

import pytest

from galerne.optimize.builders.tensorrt.explain import build_failure, parse_error, place


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("/model/layers.3/self_attn/o_proj/MatMul", "layer 3, attention, o_proj"),
        ("/model/layers.21/mlp/Sigmoid", "layer 21, MLP"),
        ("/model/layers.0/input_layernorm/RMSNormalization", "layer 0, norm before the attention"),
        ("/model/rotary.0/Cos", "rotation"),
        ("/model/Greater", "attention mask"),
        ("/model/norm/RMSNormalization", "last norm"),
        ("/lm_head/MatMul", "vocabulary projection"),
        ("/Unsqueeze", ""),
        ("/model/embed_tokens/Gather", "token embedding"),
    ],
)
def test_the_place_of_a_node(name: str, expected: str) -> None:
    assert place(name) == expected


class Parser:
    """As much of TensorRT's as is read of it."""

    def __init__(self, **error: Any) -> None:
        self.num_errors = 1 if error else 0
        self._error = type("Error", (), {key: staticmethod(lambda v=value: v) for key, value in error.items()})

    def get_error(self, index: int) -> Any:
        assert index == 0
        return self._error


def test_an_error_in_the_models_terms() -> None:
    name = "/model/layers.3/self_attn/Attention"
    parser = Parser(node_name=name, node_operator="Attention", desc="Assertion\n failed: softcap", node=9)
    assert parse_error(parser, "TensorRT 10.3.0") == (
        f"TensorRT 10.3.0 cannot parse {name} (Attention in layer 3, attention): Assertion failed: softcap; "
        "export with --dialect primitive, which spells this operator out in basic ones"
    )
    nameless = parse_error(Parser(node_name="", node_operator="", desc="no", node=9), "TensorRT 10.3.0")
    assert nameless.startswith("TensorRT 10.3.0 cannot parse node 9 (?): no; export with another --dialect")
    blocks = Parser(node_name="/lm_head/DequantizeLinear", node_operator="DequantizeLinear", desc="type", node=1)
    assert "export with another --precision" in parse_error(blocks, "TensorRT")
    assert "gives no reason" in parse_error(Parser(), "TensorRT")


def test_the_cause_of_a_failed_build() -> None:
    driver = "CUDA driver version is insufficient for CUDA runtime version"
    assert build_failure(["the cause", driver]) == "the cause"
    assert build_failure([driver]) == driver
    assert build_failure([]) == "it gave no reason"
