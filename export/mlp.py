"""The decoder's gated MLP, alone or as one of several experts, and the products that read one input together."""

import functools
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from galerne.export.spec import Activation, DecoderSpec


def project(x: Tensor, linears: Iterable[nn.Linear]) -> Tensor:
    """Apply linear layers that read the same input as one product in their own type: [..., in] to [..., sum of out]."""
    linears = list(linears)
    weight = _joined([linear.weight for linear in linears])
    product = torch.matmul(x.to(weight.dtype), weight.t())
    biases = [linear.bias for linear in linears if linear.bias is not None]
    return product + _joined(biases) if biases else product


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def activate(x: Tensor, kind: Activation) -> Tensor:
    """Apply the gate's activation."""
    return x * torch.sigmoid(x) if kind == "silu" else nn.functional.gelu(x, approximate="tanh")


class MLP(nn.Module):
    """SwiGLU, or GeGLU by the spec's activation. Source: arXiv 2002.05202."""

    def __init__(
        self, spec: DecoderSpec, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj"
    ) -> None:
        """Build one whose layers have the given names."""
        super().__init__()
        hidden, self.width, bias = spec.hidden_size, spec.intermediate_size, spec.mlp_bias
        self.activation = spec.hidden_act
        self.inputs = {"gate_up_proj": 2 * self.width} if spec.fused_projections else {gate: self.width, up: self.width}
        for name, width in self.inputs.items():
            self.add_module(name, nn.Linear(hidden, width, bias=bias))
        self.add_module(down, nn.Linear(self.width, hidden, bias=bias))
        self.output = down

    def forward(self, x: Tensor) -> Tensor:
        """[..., E] to [..., E]."""
        both = project(x, (getattr(self, name) for name in self.inputs))
        gate, up = torch.split(both, [self.width, self.width], dim=-1)
        return project(activate(gate, self.activation) * up, [getattr(self, self.output)])


class Mixture(nn.Module):
    """Experts, of which each token takes the best few by a router. Source: arXiv 2401.04088.

    All experts run and those that were not chosen weigh zero: standard ONNX has no operator that reads only the weights of
    the chosen ones. So a step reads `num_experts / experts_per_token` times the weights that it would have to.
    """

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        self.chosen = spec.experts_per_token
        self.gate = nn.Linear(spec.hidden_size, spec.num_experts, bias=False)
        self.experts = nn.ModuleList(MLP(spec, "w1", "w3", "w2") for _ in range(spec.num_experts))

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, E] to [B, S, E]."""
        likely = torch.softmax(project(x, [self.gate]).float(), dim=-1)  # [B, S, experts]
        best, indices = torch.topk(likely, self.chosen, dim=-1)
        best = best / best.sum(dim=-1, keepdim=True)
        parts: list[Tensor] = []
        for number, expert in enumerate(self.experts):
            weight = torch.where(indices == number, best, 0.0).sum(dim=-1, keepdim=True)  # [B, S, 1]
            part = expert(x)
            parts.append(part * weight.to(part.dtype))
        total: Tensor = functools.reduce(torch.add, parts)
        return total
