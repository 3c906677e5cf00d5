"""Left padding, read from the 2D attention mask."""

from torch import Tensor

from kvframe.errors import PaddingError


def num_padding(mask: Tensor, num_tokens: int | None = None) -> list[int]:
    """Leading padding of every row of a mask [B, L]; of its first `num_tokens` columns where that is given.

    Raises PaddingError unless every row is 0...01...1; reads the device.
    """
    if num_tokens is not None and mask.shape[1] < num_tokens:
        raise PaddingError(
            f"attention_mask has {mask.shape[1]} columns, but there are {num_tokens} tokens; it has to cover those in "
            "the cache as well"
        )
    mask = mask[:, :num_tokens].bool()
    padding = (mask.cumsum(1) == 0).sum(1)
    whole = mask.sum(1) + padding == mask.shape[1]
    if not bool(whole.all()):
        row = int((~whole).nonzero()[0])
        raise PaddingError(
            f"attention_mask row {row} has zeros behind its first one (right padding or a hole); expected left "
            "padding, 0...01...1; set tokenizer.padding_side = 'left'"
        )
    return [int(count) for count in padding]
