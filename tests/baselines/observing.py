"""SnapKV's scores by their definition, for the three papers that use them."""

from baselines.evicting import Sequence, mean


def pooled_attention(sequence: Sequence, head: int, window: int, kernel: int, pooling: str) -> dict[int, float]:
    """For each token before the last `window` of the prompt: their mean attention, pooled, and the mean of the
    group."""
    stop = sequence.num_prompt
    observers = range(max(0, stop - window), stop)
    rows = [sequence.shares(head, position, range(position + 1)) for position in observers]
    scores = dict.fromkeys(range(observers.start), 0.0)
    group = len(sequence.queries[head])
    for member in range(group):
        means = [mean(row[member][token] for row in rows) for token in scores]
        for token in scores:
            reach = range(token - kernel // 2, token + kernel // 2 + 1)
            near = [means[other] if 0 <= other < len(means) else 0.0 for other in reach]
            scores[token] += (max(near) if pooling == "max" else mean(near)) / group
    return scores


def kept_after(sequence: Sequence, kept: set[int], window: int, room: int) -> list[list[int]]:
    """What every step attends to if `kept` of the prompt's tokens stay, all that come after them, and of those that
    leave a window the first `room`."""
    found, kept, extra = [], set(kept), 0
    first = max(0, sequence.num_prompt - window + 1)  # of the window at the first step
    for position, _ in sequence.steps():
        recent = set(range(max(first, position - window + 1), position + 1))
        if position - window >= first and extra < room:
            kept.add(position - window)
            extra += 1
        found.append(sorted(kept | recent))
    return found
