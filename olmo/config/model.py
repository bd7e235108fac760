"""The settings of a model: the section `model` of a run, and what a checkpoint's config.yaml must hold."""

from dataclasses import dataclass
from typing import Literal

from .setting import setting

LayerNormType = Literal["default", "low_precision", "rms"]
ActivationType = Literal["gelu", "relu", "swiglu"]
BlockType = Literal["sequential", "llama"]
InitFnType = Literal["mitchell", "normal", "kaiming_normal", "fan_in", "full_megatron"]
COEFFICIENTS = ("abs", "relu")  # what is averaged of a memory's coefficient: its absolute value, or its positive part


@dataclass
class ModelConfig:
    """The transformer; `olmo/model/olmo.py` lists the shapes that follow from these keys.

    A model of another family, transformers' own class, is described by its config.json. Only the keys that apply to
    every family may be given for it; vocabulary, EOS and padding are then filled in from its folder.
    """

    transformers: str | None = setting(
        None,
        "new weights of another family: a transformers folder or hub id with its config.json; filled in from load_path",
        unknown_to_olmo=True,
        any_family=True,
    )
    d_model: int = setting(768, "width of the residual stream", at_least=1)
    n_heads: int = setting(12, "attention heads, each d_model / n_heads wide", at_least=1)
    n_kv_heads: int | None = setting(None, "heads of keys and values; null is n_heads", at_least=1)
    clip_qkv: float | None = setting(None, "clamp queries, keys and values to [-clip_qkv, clip_qkv]", more_than=0)
    n_layers: int = setting(12, "number of blocks", at_least=1)
    mlp_ratio: int = setting(4, "mlp_hidden_size / d_model, if mlp_hidden_size is null", at_least=1)
    mlp_hidden_size: int | None = setting(
        None, "rows of ff_proj: m, or 2 m for swiglu; null is mlp_ratio * d_model", at_least=1
    )
    activation_type: ActivationType = setting("swiglu", "activation of the feed-forward layer")
    block_type: BlockType = setting(
        "sequential", only=("sequential",), instead="stack q, k and v of llama blocks in att_proj"
    )
    block_group_size: int = setting(1, "blocks per group for fsdp.wrapping_strategy by_block_group", at_least=1)
    alibi: bool = setting(False, only=(False,), instead="use rope or learned positions")
    alibi_bias_max: float = setting(8.0, no_effect="only used with alibi")
    rope: bool = setting(False, "rotary position embeddings; false is learned position embeddings")
    rope_full_precision: bool = setting(True, "rotate queries and keys in float32")
    rope_theta: int = setting(10000, "base of the rotary frequencies", at_least=1, unknown_to_olmo=True)
    flash_attention: bool = setting(False, no_effect="scaled_dot_product_attention selects the kernel")
    attention_dropout: float = setting(0.1, "dropout of the attention weights", at_least=0, at_most=1)
    multi_query_attention: bool | None = setting(None, "true is n_kv_heads: 1, false is n_kv_heads: n_heads")
    attention_layer_norm: bool = setting(False, "normalize queries and keys")
    residual_dropout: float = setting(0.1, "dropout of the output of each layer", at_least=0, at_most=1)
    embedding_dropout: float = setting(0.1, "dropout of the embeddings", at_least=0, at_most=1)
    embedding_layer_norm: bool = setting(False, "normalize the embeddings", unknown_to_olmo=True)
    layer_norm_type: LayerNormType = setting("default", "low_precision: in the precision of autocast; rms: no mean")
    layer_norm_with_affine: bool = setting(True, "norms have a weight")
    layer_norm_eps: float = setting(1e-05, "added to the variance in norms", more_than=0)
    attention_layer_norm_with_affine: bool = setting(True, "the norms of queries and keys have a weight")
    max_sequence_length: int = setting(1024, "tokens per instance", at_least=1, any_family=True)
    include_bias: bool = setting(True, "linear layers have a bias")
    bias_for_layer_norm: bool | None = setting(None, "norms with a weight have a bias; null is include_bias")
    scale_logits: bool = setting(False, "divide the logits by sqrt(d_model)")
    vocab_size: int = setting(50257, "number of tokens", at_least=1, any_family=True)
    embedding_size: int | None = setting(
        50304, "rows of the embedding, at least vocab_size; null is vocab_size", any_family=True
    )
    weight_tying: bool = setting(True, "the output layer is the embedding")
    eos_token_id: int = setting(50256, "token at the end of a document", at_least=0, any_family=True)
    pad_token_id: int = setting(50256, "token that fills short rows", at_least=0, any_family=True)
    init_device: str | None = setting(
        None,
        "meta: create weights on the device that trains them",
        only=(None, "cpu", "cuda", "mps", "meta"),
        instead="use meta",
        defines_run=False,
    )
    init_fn: InitFnType = setting("normal", "how new weights are drawn")
    init_std: float = setting(0.02, "standard deviation of new weights, for normal and full_megatron", more_than=0)
    init_cutoff_factor: float | None = setting(None, "cut new weights at this many standard deviations", more_than=0)
    precision: str | None = setting(None, no_effect="the run's precision applies")
    scale_emb_init: bool = setting(False, "full_megatron: scale new embeddings by sqrt(d_model)", unknown_to_olmo=True)
    emb_init_std: float | None = setting(
        None, "standard deviation of new embeddings", more_than=0, unknown_to_olmo=True
    )
    norm_after: bool = setting(False, "OLMo 2: normalize outputs of layers instead of inputs", unknown_to_olmo=True)
    temperature_attention: float | None = setting(
        None, "divides the attention scores", more_than=0, unknown_to_olmo=True
    )
    temperature_MLP: str | None = setting(
        None, "file of divisors of the coefficients, (n_layers, m)", unknown_to_olmo=True
    )
    temperature_decay: bool | None = setting(
        True, "both temperatures reach 1 linearly over the run", unknown_to_olmo=True
    )
    resuscitation: str | None = setting(
        None, "file of multipliers, or state dict, to apply on loading", unknown_to_olmo=True, any_family=True
    )
    resuscitation_force: bool = setting(
        False, "apply multipliers of another checkpoint, too", unknown_to_olmo=True, any_family=True, defines_run=False
    )
    save_grad_: bool | None = setting(False, only=(None, False), instead="leave it out", unknown_to_olmo=True)

    @property
    def rows(self) -> int:
        """Rows of the embedding: the ids below are those that the model can read."""
        return self.embedding_size or self.vocab_size

    @property
    def effective_n_kv_heads(self) -> int:
        if self.n_kv_heads is not None:
            return self.n_kv_heads
        return 1 if self.multi_query_attention else self.n_heads

    @property
    def projection_size(self) -> int:
        """Rows of `ff_proj`: the inner dimension m, or 2 m (up rows, then gate rows) for swiglu."""
        return self.mlp_ratio * self.d_model if self.mlp_hidden_size is None else self.mlp_hidden_size

    @property
    def inner_size(self) -> int:
        """The inner dimension m: the number of memories of a layer."""
        return self.projection_size // 2 if self.activation_type == "swiglu" else self.projection_size
