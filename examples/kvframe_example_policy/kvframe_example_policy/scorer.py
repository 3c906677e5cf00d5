"""A scorer: units by the direction of their keys."""

from typing import Any, ClassVar

import torch
from attrs import frozen
from torch import Tensor

import kvframe


@frozen(kw_only=True)
class KeyDirection(kvframe.Scorer):
    """The cosine of the query and a unit's mean key, the largest over the query heads of a group.

    A long mean key, as sinks and punctuation have, does not make a unit relevant; and a unit that one head of a group
    needs is not outvoted by the others.
    """

    name: ClassVar[str] = "key-direction"
    capturable: ClassVar[bool] = True

    def index(self, keys: Tensor, values: Tensor, unit_ids: Tensor, num_units: int) -> dict[str, Tensor]:
        heads, _, head_dim = keys.shape
        # Tokens that belong to no unit have the id num_units; their column is dropped. The sum of a unit's keys has the
        # direction of their mean.
        sums = keys.new_zeros(heads, num_units + 1, head_dim).scatter_add_(1, unit_ids[..., None].expand_as(keys), keys)
        return {"direction": torch.nn.functional.normalize(sums[:, :num_units], dim=-1)}

    def score(self, inputs: kvframe.StepInputs, index: Any, units: kvframe.UnitTable) -> Tensor:
        directions = index["direction"]  # [B, H, U, D]
        batch_size, num_kv_heads, max_units, head_dim = directions.shape
        query = torch.nn.functional.normalize(inputs.query, dim=-1).view(batch_size, num_kv_heads, -1, head_dim)
        cosines = query @ directions.transpose(2, 3)  # [B, H, G, U]
        scores = cosines.amax(2).to(torch.promote_types(cosines.dtype, torch.float32))
        absent = torch.arange(max_units, device=scores.device) >= units.num_units[..., None]
        return scores.masked_fill(absent, -torch.inf)
