"""Small random models of every family that is calibrated, with the example's tokenizer, and recipes that need text."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from galerne.export.calibrate.quantize import quantize
from galerne.export.checkpoint.open import open_checkpoint
from galerne.optimize.quantize import recipe

TINY = Path(__file__).parents[3] / "examples" / "tiny-mistral"
TEXT = Path(__file__).parents[3] / "examples" / "tiny-mistral" / "held-out.txt"

_SLIDING, _FULL = "sliding_attention", "full_attention"
_GEMMA: dict[str, Any] = {
    "sliding_window": 16,
    "layer_types": [_SLIDING, _FULL],
    "query_pre_attn_scalar": 24,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "pad_token_id": 0,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 16},
    "llama": {"tie_word_embeddings": True, "num_key_value_heads": 4},
    "qwen2": {},
    "qwen3": {},
    "phi3": {"sliding_window": 16, "pad_token_id": None, "hidden_size": 128, "num_key_value_heads": 4},
    "mixtral": {"sliding_window": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
    "gemma2": {**_GEMMA, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
    "gemma3": {
        **_GEMMA,
        "rope_parameters": {
            _FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            _SLIDING: {"rope_type": "default", "rope_theta": 1e4},
        },
    },
}


def save_family(folder: Path, family: str) -> Path:
    """Save a random model of a family; norms and biases are random too, so that a fold gone wrong shows."""
    torch.manual_seed(0)
    name = family.capitalize()
    settings = {
        "vocab_size": 2048,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 512,
        "initializer_range": 0.1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config_class = getattr(transformers, f"{name}TextConfig" if family == "gemma3" else f"{name}Config")
    model = getattr(transformers, f"{name}ForCausalLM")(config_class(**{**settings, **FAMILIES[family]}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    if family == "mixtral":
        _decide_routers(model)
    model.save_pretrained(folder)
    shutil.copy(TINY / "tokenizer.json", folder)
    return folder


@torch.no_grad()
def _decide_routers(model: torch.nn.Module) -> None:
    """Have a token's id choose its experts, two that follow each other, by four channels that no layer writes to.

    Else the choice is a matter of float16's rounding for some tokens, and what follows is another answer.
    """
    tensors = dict(model.named_parameters())
    table = tensors["model.embed_tokens.weight"]
    table[:, :4] = torch.tensor([[0.3, 0.2, -0.2, -0.3]])
    for number in range(len(table)):
        table[number, :4] = table[number, :4].roll(number % 4)
    for name, tensor in tensors.items():
        if name.endswith("mlp.gate.weight"):
            tensor.copy_(torch.eye(*tensor.shape))
        elif name.endswith("o_proj.weight"):
            tensor[:4] = 0
        elif name.endswith("experts.down_proj"):
            tensor[:, :4] = 0


@pytest.fixture(scope="session")
def family_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a family's checkpoint; made once, so tests must not change it."""
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = save_family(tmp_path_factory.mktemp("families") / family, family)
        return made[family]

    return get


MakeRecipe = Callable[..., Path]


@pytest.fixture(scope="session")
def make_recipe() -> MakeRecipe:
    """Return a function that writes a recipe that needs text."""

    def make(
        folder: Path,
        method: str = "gptq",
        *,
        tokens: int = 256,
        length: int = 32,
        block: int = 32,
        lm_head: str = "int8",
        extra: str = "",
    ) -> Path:
        path = folder / f"{method}.toml"
        path.write_text(
            f'description = "{method} for a test"\ncompute = "float16"\nmethod = "{method}"\n'
            f'weights = {{ dtype = "int4", block_size = {block} }}\nlm_head = {{ dtype = "{lm_head}" }}\n'
            'embed_tokens = { dtype = "int8" }\n'
            f"calibration = {{ tokens = {tokens}, length = {length} }}\n{extra}"
        )
        return path

    return make


@pytest.fixture(scope="session")
def quantized_of(
    family_of: Callable[[str], Path], make_recipe: MakeRecipe, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """Return a family's checkpoint quantized by a method; made once, so tests must not change it."""
    made: dict[tuple[str, str], Path] = {}

    def get(family: str, method: str = "gptq") -> Path:
        if (family, method) not in made:
            folder = tmp_path_factory.mktemp("quantized")
            source = TINY if family == "tiny" else family_of(family)
            chosen = recipe.load(str(make_recipe(folder, method)))
            made[family, method] = quantize(open_checkpoint(source), chosen, method, TEXT, folder / "quantized")
        return made[family, method]

    return get
