"""The OLMo transformer on one page, with the parameter names of OLMo's own checkpoints.

Dimensions in comments: B instances, T tokens, D = d_model, H heads, K key-value heads, C = D / H,
M memories (inner dimension of the feed-forward layer), P rows of ff_proj (2 M for swiglu), V rows of the embedding.

The feed-forward layer is a key-value memory (method section 1): the input of `ff_out` holds the M memory
coefficients of a token, column i of `ff_out.weight` is memory vector i. For swiglu, `ff_proj` computes the up
projection in its first M rows and the gate in its last M rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config.model import ActivationType, ModelConfig
from .initialization import truncated_normal_

Table: TypeAlias = tuple[Tensor, Tensor] | None  # sine and cosine of the rotary angles, (T, C) each; None without RoPE
Tap: TypeAlias = Callable[[Tensor, Tensor], None]  # gets the output of ff_proj (B, T, P), memory coefficients (B, T, M)
Call: TypeAlias = Callable[..., Tensor]


def _call(part: Call, *inputs: Any) -> Tensor:
    return part(*inputs)


class LayerNorm(nn.Module):
    """Layer norm or RMS norm over the last dimension, with the parameters that OLMo gives it."""

    def __init__(self, config: ModelConfig, size: int, affine: bool):
        super().__init__()
        self.kind, self.eps, self.size = config.layer_norm_type, config.layer_norm_eps, size
        wants_bias = config.include_bias if config.bias_for_layer_norm is None else config.bias_for_layer_norm
        self.weight = nn.Parameter(torch.ones(size)) if affine else None
        self.bias = nn.Parameter(torch.zeros(size)) if affine and wants_bias else None

    def reset_parameters(self) -> None:
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "rms":
            wide = x.float()
            x = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)
            x = x if self.weight is None else self.weight * x
            return x if self.bias is None else x + self.bias
        if self.kind == "low_precision" and torch.is_autocast_enabled(x.device.type):
            narrow = torch.get_autocast_dtype(x.device.type)
            weight, bias = (None if t is None else t.to(narrow) for t in (self.weight, self.bias))
            with torch.autocast(x.device.type, enabled=False):
                return F.layer_norm(x.to(narrow), (self.size,), weight, bias, self.eps)
        return F.layer_norm(x, (self.size,), self.weight, self.bias, self.eps)


class Embedding(nn.Embedding):
    def reset_parameters(self) -> None:
        # Drawing on the meta device imports torch's compiler, which takes a second, and fills nothing.
        if not self.weight.is_meta:
            super().reset_parameters()


class Activation(nn.Module):
    """From the output of `ff_proj` (..., P) to the signed memory coefficients (..., M)."""

    def __init__(self, kind: ActivationType):
        super().__init__()
        self.kind = kind

    def forward(self, projected: Tensor) -> Tensor:
        if self.kind == "swiglu":
            up, gate = projected.chunk(2, dim=-1)
            return F.silu(gate) * up
        return F.gelu(projected) if self.kind == "gelu" else F.relu(projected)


def rotary_table(config: ModelConfig, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Sine and cosine of the rotary angles, float32 (length, C); the second half repeats the first."""
    size = config.d_model // config.n_heads
    exponents = torch.arange(0, size, 2, device=device, dtype=torch.float32) / size
    positions = torch.arange(length, device=device, dtype=torch.float32)
    angles = torch.outer(positions, 1.0 / config.rope_theta**exponents).repeat(1, 2)
    return angles.sin(), angles.cos()


def rotate(x: Tensor, table: tuple[Tensor, Tensor], full_precision: bool) -> Tensor:
    """Rotary position embedding of x (B, H, T, C) by halves, in float32 where `full_precision`."""
    sin, cos = table
    wide = x.float() if full_precision else x
    first, second = wide.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (wide * cos.to(wide.dtype) + turned * sin.to(wide.dtype)).to(x.dtype)


def seen_tokens(attention_mask: Tensor) -> Tensor:
    """Which tokens each token attends to: (B, T) bool -> (B, 1, T, T) bool. One without any attends to itself."""
    length, device = attention_mask.shape[1], attention_mask.device
    causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    itself = torch.eye(length, dtype=torch.bool, device=device) & (attention_mask.cumsum(1) == 0)[:, None, :, None]
    return causal & attention_mask[:, None, None, :] | itself


class Block(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        d, bias, affine = config.d_model, config.include_bias, config.layer_norm_with_affine
        kv_size = config.effective_n_kv_heads * (d // config.n_heads)
        self.qkv_sizes = (d, kv_size, kv_size)
        self.attn_norm = LayerNorm(config, d, affine)
        self.ff_norm = LayerNorm(config, d, affine)
        self.q_norm = self.k_norm = None
        if config.attention_layer_norm:
            self.q_norm = LayerNorm(config, d, config.attention_layer_norm_with_affine)
            self.k_norm = LayerNorm(config, kv_size, config.attention_layer_norm_with_affine)
        self.att_proj = nn.Linear(d, sum(self.qkv_sizes), bias=bias)
        self.attn_out = nn.Linear(d, d, bias=bias)
        self.ff_proj = nn.Linear(d, config.projection_size, bias=bias)
        self.act = Activation(config.activation_type)
        self.ff_out = nn.Linear(config.inner_size, d, bias=bias)
        # Set by `olmo/memory/temperature.py`: () divides the attention scores, (M,) the memory coefficients.
        self.attention_temperature: Tensor | None = None
        self.memory_temperature: Tensor | None = None
        self.tap: Tap | None = None  # set by `olmo/memory/observation.py`

    def dropout(self, x: Tensor) -> Tensor:
        p = self.config.residual_dropout
        return F.dropout(x, p, self.training) if p else x

    def attend(self, projected: Tensor, table: Table, seen: Tensor | None) -> Tensor:
        """Attention from the output of `att_proj` to the output of `attn_out` (B, T, D)."""
        config, d, (batch, length, _) = self.config, self.config.d_model, projected.shape
        if config.clip_qkv is not None:
            projected = projected.clamp(-config.clip_qkv, config.clip_qkv)
        q, k, v = projected.split(self.qkv_sizes, dim=-1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        size = d // config.n_heads
        q, k, v = (t.view(batch, length, -1, size).transpose(1, 2) for t in (q, k, v))  # (B, H or K, T, C)
        if table is not None:
            q, k = (rotate(t, table, config.rope_full_precision) for t in (q, k))
        if self.attention_temperature is not None:
            q = q / self.attention_temperature
        dropout = config.attention_dropout if self.training else 0.0
        grouped = config.effective_n_kv_heads != config.n_heads
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=seen, dropout_p=dropout, is_causal=seen is None, enable_gqa=grouped
        )
        return self.attn_out(out.transpose(1, 2).reshape(batch, length, d))

    def coefficients(self, projected: Tensor) -> Tensor:
        """Signed memory coefficients, from the output of `ff_proj`, (B, T, P) -> (B, T, M)."""
        coefficients = self.act(projected)
        if self.memory_temperature is not None:
            coefficients = coefficients / self.memory_temperature.to(coefficients.dtype)
        return coefficients

    # The layer in three parts, each a function of the residual stream x (B, T, D) or of what the part before returns.
    # `call` runs what a fine-grained recomputation of activations does not keep.

    def attention_update(self, x: Tensor, table: Table, seen: Tensor | None = None, call: Call = _call) -> Tensor:
        """What the attention adds to the residual stream, (B, T, D)."""
        if self.config.norm_after:
            return call(self.attn_norm, call(self.attend, self.att_proj(x), table, seen))
        return call(self.attend, self.att_proj(call(self.attn_norm, x)), table, seen)

    def project(self, x: Tensor, call: Call = _call) -> Tensor:
        """The first projection of the feed-forward layer, (B, T, P)."""
        return self.ff_proj(x if self.config.norm_after else call(self.ff_norm, x))

    def memory_update(self, coefficients: Tensor, call: Call = _call) -> Tensor:
        """What the memories add to the residual stream, (B, T, M) -> (B, T, D)."""
        written = self.ff_out(coefficients)
        return call(self.ff_norm, written) if self.config.norm_after else written

    def compute(
        self, x: Tensor, table: Table, seen: Tensor | None = None, tap: Tap | None = None, call: Call = _call
    ) -> Tensor:
        """The residual stream after this layer, (B, T, D) -> (B, T, D)."""
        x = x + self.dropout(self.attention_update(x, table, seen, call))
        projected = self.project(x, call)
        coefficients = call(self.coefficients, projected)
        if tap is not None:
            tap(projected, coefficients)
        del projected  # twice as large as the coefficients, and not needed for what follows
        return x + self.dropout(self.memory_update(coefficients, call))

    def forward(self, x: Tensor, table: Table, seen: Tensor | None = None, run: Call | None = None) -> Tensor:
        """As `compute`, or by `run` in its place: called from here, because FSDP gathers weights around this call."""
        return self.compute(x, table, seen, self.tap) if run is None else run(self, x, table, seen)


# Computes layer `number` in place of the block: (number, block, x, table, seen) -> x.
LayerRunner: TypeAlias = Callable[[int, Block, Tensor, Table, Tensor | None], Tensor]


class OLMo(nn.Module):
    """A causal language model. `OLMo(config)` has initial weights; `OLMo.empty(config)` is on the meta device."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        rows = config.embedding_size or config.vocab_size
        parts: dict[str, nn.Module] = {
            "wte": Embedding(rows, config.d_model),
            "blocks": nn.ModuleList(Block(config) for _ in range(config.n_layers)),
            "ln_f": LayerNorm(config, config.d_model, config.layer_norm_with_affine),
        }
        if not config.rope:
            parts["wpe"] = Embedding(config.max_sequence_length, config.d_model)
        if config.embedding_layer_norm:
            parts["emb_norm"] = LayerNorm(config, config.d_model, config.layer_norm_with_affine)
        if not config.weight_tying:
            parts["ff_out"] = nn.Linear(config.d_model, rows, bias=config.include_bias)
        self.transformer = nn.ModuleDict(parts)
        if self.transformer["wte"].weight.device.type != "meta":
            self.reset_parameters()

    @classmethod
    def empty(cls, config: ModelConfig) -> OLMo:
        """The model on the meta device: shapes without memory, to be filled from a checkpoint."""
        with torch.device("meta"):
            return cls(config)

    @property
    def blocks(self) -> list[Block]:
        """The layers, first to last."""
        return list(cast(Iterable[Block], self.transformer["blocks"]))

    def embed(self, input_ids: Tensor) -> tuple[Tensor, Table]:
        """Input of the first block, (B, T) -> (B, T, D), and the table of rotary angles."""
        config, parts = self.config, self.transformer
        x = parts["wte"](input_ids)
        if config.embedding_layer_norm:
            x = parts["emb_norm"](x)
        table = None
        if config.rope:
            table = rotary_table(config, input_ids.shape[1], input_ids.device)
        else:
            x = x + parts["wpe"].weight[: input_ids.shape[1]]  # type: ignore[index]
        if config.embedding_dropout:
            x = F.dropout(x, config.embedding_dropout, self.training)
        return x, table

    def hidden_states(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, run: LayerRunner | None = None
    ) -> Tensor:
        """Normalized output of the last block, (B, T) -> (B, T, D).

        attention_mask: (B, T) bool, the tokens that later ones attend to; default: all. `run` computes each layer in
        place of `Block.compute` (see `olmo/train/layer_runner.py`).
        """
        x, table = self.embed(input_ids)
        seen = None if attention_mask is None else seen_tokens(attention_mask)
        for number, block in enumerate(self.blocks):
            x = block(x, table, seen, None if run is None else partial(run, number))
        return self.transformer["ln_f"](x)

    @property
    def vocabulary(self) -> tuple[nn.Parameter, nn.Parameter | None]:
        """The matrix that scores the next token, (V, D), and its bias (V,) or None."""
        tied = self.config.weight_tying
        module = self.transformer["wte" if tied else "ff_out"]
        return cast(nn.Parameter, module.weight), None if tied else cast(nn.Parameter | None, module.bias)

    @property
    def width(self) -> int:
        """D, of the residual stream."""
        return self.config.d_model

    @property
    def logit_divisor(self) -> float:
        """What the scores of the vocabulary are divided by."""
        return math.sqrt(self.config.d_model) if self.config.scale_logits else 1.0

    @property
    def logit_cap(self) -> float | None:
        """A soft cap of the logits, which OLMo has none of; `CausalLM` may."""
        return None

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the next token, (..., D) -> (..., V)."""
        weight, bias = self.vocabulary
        scores = F.linear(hidden.to(weight.device), weight, bias)
        return scores / math.sqrt(self.config.d_model) if self.config.scale_logits else scores

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Scores of the next token after every token, (B, T) -> (B, T, V); see `hidden_states`."""
        return self.logits(self.hidden_states(input_ids, attention_mask))

    def reset_parameters(self) -> None:
        """Initialize as OLMo does: normals, truncated or not, whose deviations depend on `init_fn` and, for the two
        projections that write to the residual stream, on the depth of the block.

        `normal`, `mitchell` and `full_megatron` as in OLMo 0.6.0; `kaiming_normal` and `fan_in`, which OLMo 0.6.0 no
        longer has, as in OLMo 0.2: deviations sqrt(2 / fan-in) and 1 / sqrt(fan-in).
        """
        config, parts, kind = self.config, self.transformer, self.config.init_fn
        megatron, mitchell = kind == "full_megatron", kind == "mitchell"
        gain = {"kaiming_normal": 2.0, "fan_in": 1.0}.get(kind)  # the deviation is sqrt(gain / fan-in)
        cutoff = None if gain else config.init_cutoff_factor or (3.0 if mitchell or megatron else None)
        wide = math.sqrt(config.d_model)
        std = 1 / wide if mitchell else config.init_std

        def fill(module: nn.Module, deviation: float, given: float | None = None) -> None:
            weight, bias = module.weight, getattr(module, "bias", None)
            assert isinstance(weight, Tensor)
            if gain is not None:
                deviation = math.sqrt(gain / weight.shape[1])
            deviation = given or deviation
            if cutoff is None:
                nn.init.normal_(weight, std=deviation)
            else:
                truncated_normal_(weight, deviation, cutoff)
            if bias is not None:
                nn.init.zeros_(bias)

        fill(parts["wte"], std * wide if megatron and config.scale_emb_init else std, config.emb_init_std)
        if "wpe" in parts:
            fill(parts["wpe"], std)
        if "ff_out" in parts:
            fill(parts["ff_out"], 1 / wide if mitchell or megatron else std)
        for module in self.modules():
            if isinstance(module, LayerNorm):
                module.reset_parameters()
        for depth, block in enumerate(self.blocks, start=1):
            attn_out = ff_out = std
            if mitchell:
                attn_out = 1 / math.sqrt(2 * config.d_model * depth)
                ff_out = 1 / math.sqrt(2 * config.inner_size * depth)
            elif megatron:
                attn_out = ff_out = std / math.sqrt(2.0 * config.n_layers)
            fill(block.att_proj, std)
            fill(block.ff_proj, std)
            fill(block.attn_out, attn_out)
            fill(block.ff_out, ff_out)
