"""A causal language model of any family: transformers' own class, behind what training and evaluation need of a model.

A model of ours and one of transformers have `hidden_states`, `logits`, `vocabulary`, `logit_divisor`, `logit_cap` and
`config` in common, so the loss and the evaluators are the same for both. Shapes as in `olmo/model/olmo.py`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn

from ..config.model import ModelConfig
from .head import Head, find_head
from .olmo import OLMo


class CausalLM(nn.Module):
    """`network`, a model of transformers' with a head for language modelling.

    `blocks` are its layers, first to last. `files` are those that its checkpoints have beside the weights, by name:
    config.json and its tokenizer's. `head` is how it computes logits from hidden states, None where that is not known:
    then hidden states are the logits themselves, (B, T, V), all in memory at once.
    `is_mixture`: whether it has routed experts; `has_auxiliary`: whether the family adds a loss to the cross-entropy
    that balances them; `obeys_mask`: whether attention masks have an effect.
    """

    def __init__(
        self,
        network: Any,
        config: ModelConfig,
        blocks: list[nn.Module],
        files: dict[str, bytes] | None = None,
        head: Callable[[Any], Head | None] = find_head,
    ):
        super().__init__()
        self.network, self.config, self.blocks, self.files = network, config, blocks, files or {}
        self.head: Head | None = head(network)
        self.obeys_mask, self.is_mixture = True, False
        self.has_auxiliary = "output_router_logits" in inspect.signature(network.forward).parameters

    def empty(self) -> CausalLM:
        """Another model of this kind on the meta device, without weights."""
        with torch.device("meta"):
            network = type(self.network)(self.network.config)
        names = {module: name for name, module in self.network.named_modules()}
        blocks = [network.get_submodule(names[block]) for block in self.blocks]
        model = CausalLM(network, self.config, blocks, self.files, head=lambda _: self.head)
        model.obeys_mask, model.has_auxiliary, model.is_mixture = self.obeys_mask, self.has_auxiliary, self.is_mixture
        return model

    @property
    def family(self) -> str:
        """The `model_type` of its config.json."""
        return str(self.network.config.model_type)

    @property
    def base_model(self) -> nn.Module:
        """The network without its head."""
        return self.network.base_model

    def hidden_states(self, input_ids: Tensor, attention_mask: Tensor | None = None, run: Any = None) -> Tensor:
        """What the vocabulary scores, (B, T) -> (B, T, D), or the logits without a known head.

        attention_mask: (B, T) bool, the tokens that later ones attend to; default: all. `run` is for models of ours;
        layers of these are compiled, or recompute their activations, in place.
        """
        assert run is None
        return self._called(input_ids, attention_mask)[0]

    def balanced_states(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Hidden states as above, and the loss () that the family adds, with its own coefficient; of models that
        `has_auxiliary`."""
        self.network.loss_function = _no_cross_entropy
        hidden, output = self._called(input_ids, attention_mask, labels=input_ids, output_router_logits=True)
        return hidden, output.loss

    def _called(self, input_ids: Tensor, attention_mask: Tensor | None, **settings: Any) -> tuple[Tensor, Any]:
        """Hidden states and the network's output, which has the logits of one token of each row."""
        if attention_mask is not None:
            self.check_mask()
        mask = None if attention_mask is None else attention_mask.long()
        seen: list[Tensor] = []

        def keep(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            seen.append(args[0])
            return (args[0][:, :1],)

        with nullcontext() if self.head is None else self._scores.register_forward_pre_hook(keep):
            output = self.network(input_ids=input_ids, attention_mask=mask, use_cache=False, **settings)
        return (seen[0] if seen else output.logits), output

    def check_mask(self) -> None:
        """Raise ValueError for a model on which attention masks have no effect."""
        if not self.obeys_mask:
            raise ValueError(
                f"data: rows with padding before tokens cannot be trained on by {type(self.network).__name__}, which "
                "ignores attention masks; pad on the right, without data.generate_attention_mask"
            )

    @property
    def _scores(self) -> nn.Linear:
        """The module that scores the vocabulary, of a known head."""
        module: nn.Linear = self.network.get_output_embeddings()
        return module

    @property
    def vocabulary(self) -> tuple[nn.Parameter, nn.Parameter | None] | None:
        """The matrix that scores the next token, (V, D), and its bias (V,) or None; None without a known head."""
        if self.head is None:
            return None
        bias: nn.Parameter | None = self._scores.bias
        return cast(nn.Parameter, self._scores.weight), bias

    @property
    def width(self) -> int:
        """D, of the residual stream."""
        return self.network.config.get_text_config().hidden_size

    @property
    def logit_divisor(self) -> float:
        """What the scores are divided by."""
        return 1.0 if self.head is None else self.head.divisor

    @property
    def logit_cap(self) -> float | None:
        """c where logits are c tanh(score / c), as in Gemma 2."""
        return None if self.head is None else self.head.cap

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the next token, (..., D) -> (..., V)."""
        return hidden if self.head is None else self.head.logits(self._scores(hidden))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Scores of the next token after every token, (B, T) -> (B, T, V); see `hidden_states`."""
        return self.logits(self.hidden_states(input_ids, attention_mask))


def _no_cross_entropy(logits: Tensor, *_: Any, **__: Any) -> Tensor:
    """What a network adds its auxiliary loss to: the cross-entropy is ours."""
    return torch.zeros((), device=logits.device)


Model: TypeAlias = OLMo | CausalLM


def distinct_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of a model, in which a weight that is tied is under the first of its names alone."""
    state: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        state.setdefault(id(tensor), (name, tensor.detach()))
    return dict(state.values())


def dropouts(model: Model) -> bool:
    """Whether a model in training drops anything at random, or adds noise."""
    if isinstance(model, OLMo):
        config = model.config
        return any((config.attention_dropout, config.residual_dropout, config.embedding_dropout))
    text = model.network.config.get_text_config().to_dict()
    # Such as attn_pdrop, hidden_dropout_prob, layerdrop, router_jitter_noise; two are of heads that are not used.
    names = [key for key in text if "drop" in key or "jitter" in key]
    rates = [text[key] for key in names if not key.startswith(("classifier_", "summary_"))]
    modules = (module.p for module in model.modules() if isinstance(module, nn.Dropout))
    return any(isinstance(rate, float) and rate for rate in rates) or any(modules)
