"""How far a policy's predictions are from those of full attention, token by token."""

from collections.abc import Sequence

import torch
from attrs import frozen
from torch import Tensor

from kvframe.eval.tasks.base import Span

# Rows of logits that are compared at once.
_CHUNK = 64


@frozen(kw_only=True, eq=False)
class Fidelity:
    """Figures of each of n predicted tokens, on the CPU."""

    kl: Tensor
    """float64 [n]: KL(full attention || policy) of the two predictions, in nats."""
    agrees: Tensor
    """bool [n]: both hold the same token for the likeliest."""
    nll: Tensor
    """float64 [n]: -log probability of the token that comes, under the policy."""
    nll_full: Tensor
    """float64 [n]: under full attention."""
    correct: Tensor
    """bool [n]: the policy holds the token that comes for the likeliest."""
    correct_full: Tensor
    """bool [n]: full attention does."""


def compare_logits(full: Tensor, policy: Tensor, targets: Tensor) -> Fidelity:
    """Compare two predictions of the same tokens.

    full, policy: logits [n, vocabulary]; targets: int64 [n], the tokens that come.
    """
    parts = [
        _compare(full[start : start + _CHUNK], policy[start : start + _CHUNK], targets[start : start + _CHUNK])
        for start in range(0, len(targets), _CHUNK)
    ]
    kl, agrees, nll, nll_full, correct, correct_full = (torch.cat(column) for column in zip(*parts, strict=True))
    return Fidelity(kl=kl, agrees=agrees, nll=nll, nll_full=nll_full, correct=correct, correct_full=correct_full)


def _compare(full: Tensor, policy: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    dtype = torch.promote_types(full.dtype, torch.float32)
    wanted = targets.to(full.device)[:, None]
    log_full, log_policy = full.to(dtype).log_softmax(-1), policy.to(dtype).log_softmax(-1)
    # What full attention rules out, with a logit of -inf, adds nothing.
    terms = log_full.exp() * (log_full - log_policy)
    kl = terms.masked_fill(log_full == -torch.inf, 0).sum(-1).clamp(min=0)
    best_full, best = full.argmax(-1), policy.argmax(-1)
    columns = (
        kl.double(),
        best_full == best,
        -log_policy.gather(-1, wanted)[:, 0].double(),
        -log_full.gather(-1, wanted)[:, 0].double(),
        best == wanted[:, 0],
        best_full == wanted[:, 0],
    )
    return tuple(column.cpu() for column in columns)


def passed(correct: Tensor, answers: Sequence[Span]) -> list[bool]:
    """For each answer, whether all of its tokens are right. correct: bool [n]."""
    return [bool(correct[start:stop].all()) for start, stop in answers]


def in_answers(num_tokens: int, answers: Sequence[Span]) -> Tensor:
    """bool [num_tokens]: the tokens that belong to an answer."""
    inside = torch.zeros(num_tokens, dtype=torch.bool)
    for start, stop in answers:
        inside[start:stop] = True
    return inside
