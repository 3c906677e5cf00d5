"""RaaS (arXiv 2502.11147) by its definition: what was used last stays, and the prompt before all else."""

import pytest
from attrs import evolve
from baselines.evicting import CASE, CHUNKED, Sequence, mean, sequences_of

import kvframe
from kvframe.testing.cases import Case, Turn


def kept_by_raas(sequence: Sequence, head: int, budget: int, window: int, page: int, alpha: float) -> list[list[int]]:
    """What every step attends to: whole pages, those of the prompt before the others, and the window."""
    prompt_stop = sequence.num_prompt - window
    pages = [list(range(start, start + page)) for start in range(0, prompt_stop, page)]
    stamps = {token: token for token in range(sequence.num_prompt)}
    begun, found = prompt_stop, []  # the first token of the window
    for position, _ in sequence.steps():
        stamps[position] = position
        if begun + page <= position + 1 - window:
            pages.append(list(range(begun, begun + page)))
            begun += page
        newest = {own[0]: max(stamps[token] for token in own) for own in pages}
        pages.sort(key=lambda own: (own[0] >= sequence.num_prompt, -newest[own[0]], own[0]))
        pages = pages[: budget // page]
        taken = [token for own in pages for token in own]
        attended = sorted(taken) + list(range(begun, position + 1))
        found.append(attended)
        shares = sequence.shares(head, position, attended)
        for token in attended:
            if mean(share[token] for share in shares) > alpha:
                stamps[token] = position
    return found


# Prompt and window end with a page, so that none is shorter than others.
PAGED = evolve(CASE, padding=(0, 8), turns=(Turn(chunks=(40,), num_steps=24),))


@pytest.mark.parametrize("case, page", [(CASE, 1), (CHUNKED, 1), (PAGED, 4)], ids=["whole", "chunked", "pages"])
@pytest.mark.parametrize("budget, alpha", [(48, 0.01), (44, 0.05), (20, 0.03)])
def test_the_oldest_stamps_go(case: Case, page: int, budget: int, alpha: float):
    """With room for the prompt and some tokens more, and with a prompt that is longer than the budget."""
    policy = kvframe.policy("raas", token_budget=budget, window_size=4, page_size=page, alpha=alpha)
    dropped = 0
    for sequence in sequences_of(policy, case):
        for head in range(sequence.num_heads):
            expected = kept_by_raas(sequence, head, budget, 4, page, alpha)
            assert [heads[head] for heads in sequence.attended] == expected
            dropped += len({token for step in expected for token in step} - set(expected[-1]))
    assert dropped


def test_the_prompt_stays():
    """Whatever it is used for, as long as the budget is larger."""
    for sequence in sequences_of(kvframe.policy("raas", token_budget=44, window_size=2, page_size=1, alpha=0.2)):
        for _, heads in sequence.steps():
            for positions in heads:
                assert positions[: sequence.num_prompt] == list(range(sequence.num_prompt))


def test_published_defaults():
    """Pages of 16, a ten-thousandth of the attention, every step."""
    policy = kvframe.policy("raas")

    assert (policy.units, policy.scorer.alpha) == (kvframe.PageUnits(page_size=16), 1e-4)
    assert (policy.trigger, policy.transfer) == (kvframe.EveryStep(), kvframe.Drop())
