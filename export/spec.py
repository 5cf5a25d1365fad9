"""What the decoder module needs to know of a model, read from its config by a family."""

from dataclasses import dataclass
from typing import Literal

from galerne.errors import InputError
from galerne.export.reader import ConfigReader
from galerne.export.rotary import Rotary, read_rotary

Activation = Literal["silu", "gelu_tanh"]
# What `hidden_act` says in a config.
_ACTIVATIONS: dict[str, Activation] = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


@dataclass(frozen=True)
class DecoderSpec:
    """One decoder-only transformer: RMS norms, rotary positions over half the head, grouped heads, a gated MLP.

    layer_windows: for each layer the number of newest positions that a query sees, itself included; None where it sees all.
    layer_rotary: for each layer how its queries and keys are rotated.
    tie_word_embeddings: whether the vocabulary projection is the embedding table.
    embedding_scale: what the embedding's rows are multiplied by.
    hidden_act: of the gate in the MLP.
    qkv_bias, output_bias, mlp_bias: whether q, k, v; the attention's output; gate, up and down have a bias.
    fused_projections: whether the checkpoint has q, k, v in one tensor, and gate and up in another.
    qk_norm: whether each head's query and key pass a norm of their own before they are rotated.
    norm_offset: what is added to the weights of all norms.
    post_norms: whether what attention and MLP give pass a norm before they are added to the residual stream.
    wide_residual: whether the residual stream is float32 whatever the graph computes in, as it grows beyond float16.
    attention_scale: of the scores; None for 1 / sqrt(head_dim).
    attention_softcap, logit_softcap: the bound c in c * tanh(x / c) of scores and of logits; None for no bound.
    num_experts: MLPs of which each token takes the `experts_per_token` best; 0 for a single MLP.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    layer_windows: tuple[int | None, ...]
    layer_rotary: tuple[Rotary, ...]
    max_position_embeddings: int
    tie_word_embeddings: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    embedding_scale: float = 1.0
    hidden_act: Activation = "silu"
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    fused_projections: bool = False
    qk_norm: bool = False
    norm_offset: float = 0.0
    post_norms: bool = False
    wide_residual: bool = False
    attention_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    num_experts: int = 0
    experts_per_token: int = 0

    @property
    def context_limit(self) -> int | None:
        """The longest text in tokens that the decoder computes as the source does; None where there is no limit."""
        limits = [rotary.limit for rotary in self.layer_rotary if rotary.limit is not None]
        return min(limits) if limits else None


def base_spec(
    config: ConfigReader,
    architecture: str,
    *,
    sliding_window: int | None,
    num_key_value_heads: int,
    layer_types: list[str] | None = None,
    activation: str = "hidden_act",
) -> DecoderSpec:
    """Read the fields that every family of this decoder spells the same way.

    Args:
        sliding_window: of the layers that have one: all, unless `layer_types` in the config or here names others.
        layer_types: stands in where the config does not say the layers' types.
        activation: the field with the gate's activation; silu where it is absent.
    Raises: InputError if a field is missing, wrong or not supported.
    """
    heads, hidden = config.integer("num_attention_heads"), config.integer("hidden_size")
    layers = config.integer("num_hidden_layers")
    head_dim = config.integer("head_dim", default=hidden // heads)
    bos = config.token_ids("bos_token_id")
    kinds = config.layer_types(layers) or layer_types or ["sliding_attention"] * layers
    rotary = {kind: read_rotary(config, head_dim, kind) for kind in dict.fromkeys(kinds)}
    attention_bias = config.flag("attention_bias", default=False)
    config.expect("quantization_config", None)
    hidden_act = config.text(activation) or "silu"
    if hidden_act not in _ACTIVATIONS:
        known = " or ".join(_ACTIVATIONS)
        raise InputError(f"{config.where}: {activation}: {hidden_act!r} is not supported; expected {known}")
    if heads % num_key_value_heads:
        raise InputError(
            f"{config.where}: num_attention_heads: {heads} is no multiple of num_key_value_heads {num_key_value_heads}"
        )
    return DecoderSpec(
        architecture=architecture,
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=config.integer("intermediate_size"),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=num_key_value_heads,
        head_dim=head_dim,
        rms_norm_eps=config.number("rms_norm_eps"),
        layer_windows=tuple(sliding_window if kind == "sliding_attention" else None for kind in kinds),
        layer_rotary=tuple(rotary[kind] for kind in kinds),
        max_position_embeddings=config.integer("max_position_embeddings"),
        tie_word_embeddings=config.flag("tie_word_embeddings", default=False),
        bos_token_id=bos[0] if bos else None,
        eos_token_ids=config.token_ids("eos_token_id"),
        hidden_act=_ACTIVATIONS[hidden_act],
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        mlp_bias=config.flag("mlp_bias", default=False),
    )
