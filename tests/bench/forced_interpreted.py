"""The kernels of the forced schedule equal their definitions; a script that `test_forced_kernel.py` runs."""

import torch

from kvframe.bench.forced_kernel import forced_scores_triton, scheduled_due_triton
from kvframe.bench.forced_reference import forced_scores_reference, scheduled_due_reference


def check_schedule(device: torch.device) -> None:
    """The same is due at every step, past the schedule's end too."""
    schedule = torch.rand(5, 3, device=device) < 0.4
    counters = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(2)]
    answers = [torch.zeros(3, 2, dtype=torch.bool, device=device) for _ in range(2)]
    for _ in range(12):
        scheduled_due_reference(counters[0], schedule, answers[0])
        scheduled_due_triton(counters[1], schedule, answers[1])
        assert torch.equal(*answers) and torch.equal(*counters)


def check_scores(device: torch.device) -> None:
    """The same scores where due, the same places afterwards; more units than a program looks at together."""
    max_units, heads = 2500, (2, 3)
    sizes = torch.randint(1, 20, (*heads, max_units + 3), device=device)
    offsets = torch.cat([torch.full((*heads, 1), 4, device=device), 4 + sizes.cumsum(-1)], -1)
    num_units = torch.randint(0, max_units + 1, heads, device=device)
    num_units[0, 0] = 0
    starts = [torch.full(heads, 4_000_000, device=device) for _ in range(2)]
    for advance in (0, 1, 300, 5000):
        due = torch.rand(heads, device=device) < 0.6
        expected = forced_scores_reference(starts[0], due, offsets, num_units, max_units, advance)
        actual = forced_scores_triton(starts[1], due, offsets, num_units, max_units, advance)
        assert torch.equal(actual[due], expected[due]) and torch.equal(*starts)


if __name__ == "__main__":
    torch.manual_seed(0)
    where = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check_schedule(where)
    check_scores(where)
