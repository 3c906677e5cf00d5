"""How many units a text will have."""

from functools import cached_property

import torch

from kvframe.composition import Policy
from kvframe.runtime import units_of_regrouping

_SAMPLE_TOKENS = 8192


class UnitCount:
    """Room that a layer makes for units, in units a head.

    A builder may pad its units to more than it makes, as k-means does for clusters that it splits. So it is run once,
    over a short text of zeros, and says by itself how many it gives to a token.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._sample = max(_SAMPLE_TOKENS, policy.units.unit_size)

    @cached_property
    def _padded(self) -> int:
        return int(self._policy.units.build(torch.zeros(1, self._sample, 1)).sizes.shape[-1])

    def of_block(self, num_tokens: int) -> int:
        """Units of a run of prompt tokens."""
        return -(-num_tokens * self._padded // self._sample)

    def most(self, context: int, max_new_tokens: int, chunk: int) -> int:
        """Units of a prompt that is read in chunks, and of what follows it.

        The window at the end of a chunk belongs to the next block, and that of the last is cut like output.
        """
        policy = self._policy
        in_blocks = max(0, context - policy.sink_size - policy.window_size)
        num_blocks = -(-context // chunk)
        # A block that does not end with a unit has one more, which is shorter.
        prompt = self.of_block(in_blocks) + num_blocks
        later = max_new_tokens + policy.window_size + policy.units.max_size
        output = later // min(policy.units.min_size, policy.units.max_size) + 1
        return prompt + output + units_of_regrouping(policy.units, later)
