"""How a store keeps rows that do not come back as they were."""

from abc import ABC, abstractmethod

from torch import Tensor


class Codec(ABC):
    """What becomes of rows on their way into a store and back.

    A store that uses one encodes and decodes; the memory that keeps everything on the device only asks what would come
    back.
    """

    @abstractmethod
    def block(self, rows: Tensor) -> Tensor:
        """What comes back of a prompt block; rows [H, n, D + Dv], K and V of a token side by side, in unit order."""

    @abstractmethod
    def tokens(self, rows: Tensor) -> Tensor:
        """What comes back of tokens that are stored one by one; rows [..., D + Dv]."""
