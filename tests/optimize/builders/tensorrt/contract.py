"""A small graph of the contract, written by hand, its bundle, and an engine built of it."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from galerne.optimize.builders.tensorrt.build_plan import NETWORK
from galerne.optimize.builders.tensorrt.compile import ENGINE, compile_plan
from galerne.optimize.builders.tensorrt.options import Options
from galerne.optimize.builders.tensorrt.plan import plan
from galerne.runtime.bundle import Bundle, entry_of
from galerne.runtime.engines.record import EngineRecord
from galerne.runtime.manifest import SCHEMA_VERSION, FloatType, GraphFacts, Manifest, ModelFacts, Source
from galerne.targets.target import Target, load

LAYERS, HIDDEN, FFN, HEADS, KV_HEADS, HEAD, VOCAB, WINDOW, CHUNK = 2, 128, 256, 4, 2, 32, 96, 48, 16
CAPACITY = WINDOW + CHUNK
ELEMENT = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}


class Graph:
    """A decoder of the contract, written by hand, with its weights in weights.bin."""

    def __init__(self, compute: FloatType, weights: str) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: list[onnx.TensorProto] = []
        self.data = io.BytesIO()
        self.element, self.weights = ELEMENT[compute], weights
        self.random = np.random.default_rng(0)

    def op(self, kind: str, inputs: list[str], *outputs: str, **attributes: Any) -> str:
        name = f"/{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, list(outputs) or [name], name=name, **attributes))
        return str(self.nodes[-1].output[0])

    def constant(self, value: Any, dtype: Any = np.int64) -> str:
        name = f"constant_{len(self.tensors)}"
        self.tensors.append(numpy_helper.from_array(np.array(value, dtype), name))
        return name

    def external(self, element: int, shape: list[int], data: bytes) -> str:
        tensor = TensorProto(name=f"weight_{len(self.tensors)}", data_type=element, data_location=TensorProto.EXTERNAL)
        tensor.dims.extend(shape)
        self.data.write(b"\0" * (-self.data.tell() % 4096))
        place = {"location": "weights.bin", "offset": self.data.tell(), "length": len(data)}
        for key, value in place.items():
            tensor.external_data.add(key=key, value=str(value))
        self.data.write(data)
        self.tensors.append(tensor)
        return tensor.name

    def floats(self, shape: list[int], element: int) -> str:
        values = self.random.standard_normal(shape) * 0.05
        return self.external(element, shape, values.astype(helper.tensor_dtype_to_np_dtype(element)).tobytes())

    def project(self, x: str, rows: int, columns: int) -> str:
        if self.weights == "int4":
            q = self.external(TensorProto.INT4, [rows, columns], self.random.bytes(rows * columns // 2))
            scale = self.floats([rows // 128, columns], self.element)
            weight = self.op("DequantizeLinear", [q, scale], axis=0, block_size=128)
        else:
            weight = self.floats([rows, columns], self.element)
        return self.op("MatMul", [x, weight])

    def in_float32(self, kind: str, x: str, rest: list[str], **attributes: Any) -> str:
        wide = self.op("Cast", [x], to=TensorProto.FLOAT)
        return self.op("Cast", [self.op(kind, [wide, *rest], **attributes)], to=self.element)

    def norm(self, x: str) -> str:
        return self.in_float32("RMSNormalization", x, [self.constant(np.ones(HIDDEN), np.float32)], axis=-1)

    def mask(self) -> str:
        slots = self.op("Squeeze", [self.op("Shape", ["past_key_values.0.key"], start=2, end=3)])
        ring = self.op("Range", [self.constant(0), slots, self.constant(1)])
        newest = self.op("Gather", ["position_ids", self.constant([-1])], axis=1)
        age = self.op("Mod", [self.op("Sub", [newest, ring]), slots])
        held = self.op("Unsqueeze", [self.op("Sub", [newest, age]), self.constant([1])])
        query = self.op("Unsqueeze", ["position_ids", self.constant([2])])
        oldest = self.op("Sub", [query, self.constant(WINDOW)])
        bounds = ("GreaterOrEqual", self.constant(0)), ("LessOrEqual", query), ("Greater", oldest)
        low, high, inside = (self.op(kind, [held, bound]) for kind, bound in bounds)
        seen = self.op("And", [self.op("And", [low, high]), inside])
        return self.op("Unsqueeze", [seen, self.constant([1])])

    def heads(self, x: str, count: int) -> str:
        return self.op("Transpose", [self.op("Reshape", [x, self.constant([0, 0, count, HEAD])])], perm=[0, 2, 1, 3])

    def layer(self, i: int, x: str, angles: list[str], mask: str) -> str:
        parts = [HEADS * HEAD, KV_HEADS * HEAD, KV_HEADS * HEAD]
        fused = self.project(self.norm(x), HIDDEN, sum(parts))
        names = [f"q{i}", f"k{i}", f"v{i}"]
        self.op("Split", [fused, self.constant(parts)], *names, axis=-1)
        q = self.in_float32("RotaryEmbedding", self.heads(names[0], HEADS), angles)
        k = self.in_float32("RotaryEmbedding", self.heads(names[1], KV_HEADS), angles)
        kv = {"key": k, "value": self.heads(names[2], KV_HEADS)}
        for part, new in kv.items():
            past = f"past_key_values.{i}.{part}"
            self.op("TensorScatter", [past, new, "write_indices"], f"present.{i}.{part}", axis=2, mode="linear")
        attended = self.op("Attention", [q, f"present.{i}.key", f"present.{i}.value", mask])
        merged = self.op("Transpose", [attended], perm=[0, 2, 1, 3])
        merged = self.op("Reshape", [merged, self.constant([0, 0, HEADS * HEAD])])
        x = self.op("Add", [x, self.project(merged, HEADS * HEAD, HIDDEN)])
        gate_up = self.project(self.norm(x), HIDDEN, 2 * FFN)
        self.op("Split", [gate_up, self.constant([FFN, FFN])], f"gate{i}", f"up{i}", axis=-1)
        silu = self.op("Mul", [f"gate{i}", self.op("Sigmoid", [f"gate{i}"])])
        return self.op("Add", [x, self.project(self.op("Mul", [silu, f"up{i}"]), FFN, HIDDEN)])

    def model(self) -> onnx.ModelProto:
        rows = self.op("Gather", [self.floats([VOCAB, HIDDEN], TensorProto.FLOAT16), "input_ids"])
        x = self.op("Cast", [rows], to=self.element)
        rates = self.constant(1e4 ** -(np.arange(0, HEAD, 2)[None, None] / HEAD), np.float32)
        position = self.op("Cast", [self.op("Unsqueeze", ["position_ids", self.constant([2])])], to=TensorProto.FLOAT)
        angle = self.op("Mul", [position, rates])
        angles, mask = [self.op("Cos", [angle]), self.op("Sin", [angle])], self.mask()
        for i in range(LAYERS):
            x = self.layer(i, x, angles, mask)
        wanted = self.op("Unsqueeze", ["logit_indices", self.constant([2])])
        x = self.op("GatherND", [x, wanted], batch_dims=1)
        self.op("Cast", [self.project(self.norm(x), HIDDEN, VOCAB)], "logits", to=TensorProto.FLOAT)
        ids = {"input_ids": ["B", "S"], "position_ids": ["B", "S"], "write_indices": ["B"], "logit_indices": ["B", "K"]}
        inputs = [helper.make_tensor_value_info(name, TensorProto.INT64, shape) for name, shape in ids.items()]
        outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["B", "K", VOCAB])]
        for i in range(LAYERS):
            for part in ("key", "value"):
                shape: list[str | int | None] = ["B", KV_HEADS, "C", HEAD]
                inputs.append(helper.make_tensor_value_info(f"past_key_values.{i}.{part}", self.element, shape))
                outputs.append(helper.make_tensor_value_info(f"present.{i}.{part}", self.element, shape))
        graph = helper.make_graph(self.nodes, "decoder", inputs, outputs, self.tensors)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)


def make_bundle(folder: Path, compute: FloatType = "float16", weights: str = "float") -> Bundle:
    graph = Graph(compute, weights)
    onnx.save(graph.model(), folder / "model.onnx")
    (folder / "weights.bin").write_bytes(graph.data.getvalue())
    return list_files(folder, compute)


def list_files(folder: Path, compute: FloatType = "float16") -> Bundle:
    sizes = (LAYERS, HIDDEN, FFN, HEADS, KV_HEADS, HEAD, VOCAB)
    model = ModelFacts("MistralForCausalLM", *sizes, (WINDOW,) * LAYERS, 1e4, 512, False, 1, (2,))
    facts = GraphFacts("opset24", 24, compute, CHUNK, (CAPACITY,), None)
    files = {name: entry_of(folder / name) for name in ("model.onnx", "weights.bin")}
    manifest = Manifest(SCHEMA_VERSION, "0", Source("safetensors", {}), model, facts, {}, {}, {}, files)
    (folder / "manifest.json").write_bytes(manifest.to_json())
    return Bundle.open(folder)


def build(bundle: Bundle, name: str, options: Options | None = None) -> tuple[EngineRecord, Path]:
    return build_for(bundle, load(name), options)


def build_for(bundle: Bundle, target: Target, options: Options | None = None) -> tuple[EngineRecord, Path]:
    folder = bundle.path / "engine"
    folder.mkdir(exist_ok=True)
    made = plan(bundle, target, target.stack("tensorrt-rtx-1.7"), bundle.path, options)
    return compile_plan(made, bundle.path / NETWORK, bundle.path / "weights.bin", folder), folder / ENGINE
