"""Long output: a search for a sum, with every step and every way back written down (after LongProc, 2025, arXiv
2501.05414)."""

import random
from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import ClassVar

from attrs import field, frozen

from kvframe.errors import ConfigError
from kvframe.eval.tasks.base import Encoder, Piece, Sample, Task, Turn, share_found, to_tensor
from kvframe.eval.text import Haystack
from kvframe.validators import integer

CLOSING = "\n\nEnough of that text. A game follows: from given numbers, each used once, a target is to be reached.\n\n"

# Larger products are not looked at: a game of small numbers.
_LARGEST = 500

_Steps = tuple[str, ...]


@frozen(kw_only=True)
class Countdown(Task):
    """Numbers are combined two by two in depth first search until the target is reached.

    Answers are the numbers that a way back restores, said once long before, and the steps of the solution, said when
    they were tried. The target is what the search happens to reach when it is long enough.
    """

    name: ClassVar[str] = "countdown"
    output_tokens: int = field(default=1024, validator=integer(at_least=128))
    """Tokens of search and solution together, at most."""
    num_numbers: int = field(default=4, validator=integer(at_least=3))
    """Numbers of the game."""

    def _make(self, encoder: Encoder, context_tokens: int, rng: random.Random, haystack: Haystack) -> Sample:
        numbers = sorted(rng.sample(range(2, 50), self.num_numbers))
        search, steps = self._search(encoder, numbers, rng)
        target = steps[-1].rpartition(" ")[2]
        solution: list[Piece] = [("Reached. The solution:", False)]
        for place, step in enumerate(steps):
            solution += [("," if place else "", False), (f" {step}", True)]
        continuation, answers = encoder.marked([*search, *solution, (".\n", False)])
        game = f"Numbers: {_listed(numbers)}. Target: {target}.\n\n"
        closing = encoder.ids(CLOSING + game)
        room = self.room(context_tokens, len(encoder.beginning) + len(closing) + len(continuation))
        text = haystack.slice(encoder.tokenizer, room, rng)
        turn = Turn(
            prompt_ids=to_tensor(encoder.beginning, *text, closing),
            continuation_ids=to_tensor(continuation),
            answers=answers,
        )
        expected = tuple(piece.strip() for piece, is_answer in [*search, *solution] if is_answer)
        return Sample(
            turns=(turn,), expected=expected, scorer=share_found(steps), max_new_tokens=len(continuation) + 16
        )

    def _search(self, encoder: Encoder, numbers: list[int], rng: random.Random) -> tuple[list[Piece], _Steps]:
        """The longest search that fits, and the steps that it ends with.

        It may end with any result that no earlier end had: with that as its target, it would not have ended before.
        """
        pieces: list[Piece] = []
        best: tuple[int, str, _Steps] | None = None
        num_tokens, seen = 0, set()
        for line in _walk(numbers, (), rng):
            end = line.end
            if end is not None and end[-1].rpartition(" ")[2] not in seen:
                seen.add(end[-1].rpartition(" ")[2])
                last = f"Take {end[-1]}.\n"
                closing = f"Reached. The solution: {', '.join(end)}.\n"
                if num_tokens + sum(map(len, encoder.each([last, closing]))) <= self.output_tokens:
                    best = len(pieces), last, end
            pieces += line.pieces
            num_tokens += len(encoder.ids("".join(text for text, _ in line.pieces)))
            if num_tokens > self.output_tokens:
                break
        if best is None:
            raise ConfigError(
                f"task {self.name} needs more than output_tokens={self.output_tokens} under this tokenizer for "
                f"{self.num_numbers} numbers; ask for more output tokens"
            )
        count, last, steps = best
        return [*pieces[:count], (last, False)], steps


@frozen(kw_only=True)
class _Line:
    """A line of a search."""

    pieces: tuple[Piece, ...]
    end: _Steps | None = None
    """The steps that lead to one number, where the line is the last of them."""


def _walk(numbers: Sequence[int], steps: _Steps, rng: random.Random) -> Iterator[_Line]:
    """Depth first through all ways to combine the numbers, in random order."""
    options = [(pair, sign) for pair in combinations(range(len(numbers)), 2) for sign in "+-*/"]
    for (low, high), sign in rng.sample(options, len(options)):
        smaller, larger = sorted((numbers[low], numbers[high]))
        result = _result(larger, sign, smaller)
        if result is None:
            continue
        step = f"{larger} {sign} {smaller} = {result}"
        rest = [number for place, number in enumerate(numbers) if place not in (low, high)]
        if not rest:
            yield _Line(pieces=((f"Take {step}. Not it.\n", False),), end=(*steps, step))
            continue
        left = sorted([*rest, result])
        yield _Line(pieces=((f"Take {step}, left {_listed(left)}.\n", False),))
        yield from _walk(left, (*steps, step), rng)
        yield _Line(pieces=(("Back to", False), (f" {_listed(numbers)}", True), (".\n", False)))


def _result(larger: int, sign: str, smaller: int) -> int | None:
    """What a step gives; None where that is no whole number above 0, or nothing new."""
    if sign == "+":
        return larger + smaller
    if sign == "-":
        return larger - smaller or None
    if smaller == 1:
        return None
    if sign == "*":
        return larger * smaller if larger * smaller <= _LARGEST else None
    return larger // smaller if larger % smaller == 0 else None


def _listed(numbers: Sequence[int]) -> str:
    return " ".join(map(str, numbers))
