"""What forces a schedule, in plain torch: the definitions of the kernels in `forced_kernel`."""

import math

import torch
from torch import Tensor

# Units lie at places of a ring of so many, spread evenly by a fixed one-to-one mixing of their numbers. So a unit has
# its place whatever comes after it, and a score (a distance on the ring) is exact in float32.
PLACES = 2**22
# Odd, so that multiplying by one modulo a power of two loses nothing; beyond that any number does.
MIX_FIRST = 2654435
MIX_SECOND = 2246823
MIX_OFFSET = 40503
HEAD_STEP = 104729


def scheduled_due_reference(steps: Tensor, schedule: Tensor, due: Tensor) -> None:
    """What is due at this step, and on to the next, in place.

    steps: int64 [1], steps since the prompt; schedule: bool [num_steps, B], used again from its beginning once it ends;
    due: bool [B, H], set to the step's entry of the sequence. Everything is due at step 0.
    """
    drawn = schedule.index_select(0, steps % schedule.shape[0])[0]
    due.copy_((drawn | (steps == 0))[:, None].expand_as(due))
    steps += 1


def forced_scores_reference(
    starts: Tensor, due: Tensor, offsets: Tensor, num_units: Tensor, max_units: int, advance: int
) -> Tensor:
    """Scores under which a selection of units slides over the ring by `advance` tokens wherever it is due.

    starts: int64 [B, H], where on the ring a selection begins, moved on in place where `due`, bool [B, H]; offsets:
    int32 or int64 [B, H, >= num_units + 1] and num_units int64 [B, H] as in a `UnitTable`.
    Returns float32 [B, H, max_units]: minus the distance from the start, -inf where there is no unit.
    """
    ends = offsets.gather(-1, num_units[..., None])[..., 0]
    num_tokens = (ends - offsets[..., 0]).long().clamp(min=1)
    starts.copy_(torch.where(due, (starts + advance * PLACES // num_tokens) % PLACES, starts))
    units = torch.arange(max_units, device=due.device)
    heads = torch.arange(due.numel(), device=due.device).view(*due.shape, 1)
    place = ((units + heads * HEAD_STEP) * MIX_FIRST + MIX_OFFSET) % PLACES
    place = place ^ (place >> 11)
    place = (place * MIX_SECOND) % PLACES
    place = place ^ (place >> 9)
    ahead = (place - starts[..., None]) % PLACES
    return (-ahead).float().masked_fill(units >= num_units[..., None], -math.inf)
