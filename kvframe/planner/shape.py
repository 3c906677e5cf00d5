"""What the planner knows of a model."""

from typing import Any

import torch
from attrs import field, frozen

from kvframe.errors import ConfigError
from kvframe.types import LayerLayout
from kvframe.validators import integer


@frozen(kw_only=True)
class ModelShape:
    """The numbers of a decoder that decide how much memory and time it takes.

    Raises ConfigError for numbers that no model has.
    """

    num_layers: int = field(validator=integer(at_least=1))
    retrieval_layers: tuple[int, ...] = field()
    """Layers that keep a full, growing KV cache; only their KV is planned for."""
    hidden_size: int = field(validator=integer(at_least=1))
    intermediate_size: int = field(default=0, validator=integer(at_least=0))
    """Width of the feed-forward part; 0 where it is unknown, which stands for four times `hidden_size`."""
    num_qo_heads: int = field(validator=integer(at_least=1))
    num_kv_heads: int = field(validator=integer(at_least=1))
    head_dim: int = field(validator=integer(at_least=1))
    """Width of a key."""
    value_dim: int = field(validator=integer(at_least=1))
    """Width of a value."""
    vocab_size: int = field(validator=integer(at_least=1))
    dtype: torch.dtype
    """Of weights, activations, keys and values."""
    num_parameters: int = field(validator=integer(at_least=1))

    @retrieval_layers.validator
    def _check_retrieval_layers(self, attribute: Any, value: tuple[int, ...]) -> None:
        outside = [layer for layer in value if not 0 <= layer < self.num_layers]
        if outside:
            raise ConfigError(
                f"retrieval_layers names layer {outside[0]}, the model has layers 0 to {self.num_layers - 1}"
            )

    @property
    def weight_bytes(self) -> int:
        """Bytes of all parameters."""
        return self.num_parameters * self.dtype.itemsize

    @property
    def row_bytes(self) -> int:
        """Bytes of one token's K and V in one KV head."""
        return (self.head_dim + self.value_dim) * self.dtype.itemsize

    def layer_kv_bytes(self, num_tokens: int, batch_size: int = 1) -> int:
        """Bytes of `num_tokens` tokens a sequence in one layer."""
        return batch_size * self.num_kv_heads * num_tokens * self.row_bytes

    def kv_bytes(self, num_tokens: int, batch_size: int = 1) -> int:
        """Bytes of `num_tokens` tokens a sequence in all layers with a full KV cache."""
        return len(self.retrieval_layers) * self.layer_kv_bytes(num_tokens, batch_size)

    def layout(self, batch_size: int = 1, layer_idx: int = 0) -> LayerLayout:
        """One of its layers on the CPU, for stages that say how much memory they take."""
        return LayerLayout(
            layer_idx=layer_idx,
            num_layers=self.num_layers,
            batch_size=batch_size,
            num_qo_heads=self.num_qo_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            value_dim=self.value_dim,
            dtype=self.dtype,
            device=torch.device("cpu"),
            sm_scale=self.head_dim**-0.5,
        )
