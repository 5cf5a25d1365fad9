"""A mixture's experts one by one: as linear layers of their own, and the tokens that the router sends to each."""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from galerne.export.calibrate.layers import Float32, LayerRun

# Where a layer's experts and what they read come from, in transformers; the checkpoint calls the block by its old name.
EXPERTS, NORM, BLOCK = "mlp.experts", "post_attention_layernorm", "block_sparse_moe"
# An expert that fewer tokens reach is rounded on what all of them would give it: a few say little of many channels.
FEWEST_TOKENS = 128


def stored_name(name: str) -> str:
    """Return the checkpoint's name of a parameter or a module of a mixture; that of any other is its own."""
    mixture = ".mlp.experts." in name or ".mlp.gate." in name
    return name.replace(".mlp.", f".{BLOCK}.") if mixture else name


class Expert(nn.Module):
    """One expert, its layers named as in the checkpoint."""

    def __init__(self, hidden_size: int, intermediate_size: int, activation: nn.Module) -> None:
        super().__init__()
        self.activation = activation
        self.w1 = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.w3 = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.w2 = nn.Linear(intermediate_size, hidden_size, bias=False)

    def inner(self, x: Tensor) -> Tensor:
        """Return what the last product reads: [tokens, hidden_size] to [tokens, intermediate_size]."""
        gated: Tensor = self.activation(self.w1(x)) * self.w3(x)
        return gated

    def forward(self, x: Tensor) -> Tensor:
        """[tokens, hidden_size] to the same."""
        result: Tensor = self.w2(self.inner(x))
        return result


class Experts(nn.ModuleList):
    """In place of transformers' module that holds all experts in two tensors; computes the same, each token's experts only."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the sum of each token's experts by weight.

        Args:
            hidden_states: [tokens, hidden_size]. top_k_index, top_k_weights: [tokens, k].
        """
        total = torch.zeros_like(hidden_states)
        for number, expert in enumerate(self):
            token, place = torch.where(top_k_index == number)
            if len(token):
                total.index_add_(0, token, expert(hidden_states[token]) * top_k_weights[token, place, None])
        return total


def split_experts(model: nn.Module) -> None:
    """Give each expert of a model on the meta device layers of its own, in place."""
    for layer in model.get_submodule("model.layers").children():
        block = getattr(layer, "mlp", None)
        fused = getattr(block, "experts", None)
        if block is None or fused is None:
            continue
        count, hidden_size, intermediate_size = fused.down_proj.shape
        with torch.device("meta"):
            made = (Expert(hidden_size, intermediate_size, fused.act_fn) for _ in range(count))
            block.experts = Experts(made)


class Routed:
    """What a layer's experts read of all sequences, and which expert each token goes to."""

    def __init__(self, run: LayerRun, keep: NDArray[np.float32]) -> None:
        """Run the layer up to its experts.

        Args:
            keep: [sequences, S, hidden_size], is filled.
        """
        self._x, self._index = keep, list[Tensor]()
        for number, (x, index, _) in enumerate(run.calls(EXPERTS)):
            self._x[number] = x.numpy()
            self._index.append(index)

    def count(self, expert: int) -> int:
        """Return how many tokens go to an expert."""
        return sum(int((index == expert).sum()) for index in self._index)

    def rows(self, expert: int | None) -> Iterator[Tensor]:
        """Yield what an expert reads, [tokens, hidden_size] for each sequence that has any; None for every token."""
        for x, index in zip(self._x, self._index, strict=True):
            whole = torch.from_numpy(np.array(x))
            part = whole if expert is None else whole[(index == expert).any(dim=1)]
            if len(part):
                yield part

    def divide(self, factors: Float32) -> None:
        """Divide the inputs' channels by factors [hidden_size]."""
        for x in self._x:
            x /= factors
