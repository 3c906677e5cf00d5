"""Long output: a way through a net of roads, road by road, and then as a whole (after LongProc, 2025, arXiv
2501.05414)."""

import random
from collections.abc import Iterator
from itertools import islice, pairwise
from typing import ClassVar

from attrs import field, frozen

from kvframe.eval.tasks.base import Encoder, Piece, Sample, Task, Turn, share_found, to_tensor
from kvframe.eval.tasks.words import names
from kvframe.eval.text import Haystack
from kvframe.validators import integer

INTRODUCTION = "One road leads out of every town.\n\n"


@frozen(kw_only=True)
class PathTraversal(Task):
    """Each step needs one line of the prompt, which only the step before says; at the end all towns are named again,
    each from hundreds of tokens earlier."""

    name: ClassVar[str] = "path_traversal"
    output_tokens: int = field(default=1024, validator=integer(at_least=64))
    """Tokens of the way, at most."""

    def _make(self, encoder: Encoder, context_tokens: int, rng: random.Random, haystack: Haystack) -> Sample:
        towns = names(rng)
        path = self._path(encoder, towns)
        continuation, answers = encoder.marked(_pieces(path))
        opening = encoder.beginning + encoder.ids(INTRODUCTION)
        closing = encoder.ids(f"\nThe way from {path[0]} to {path[-1]}, road by road, and then all of its towns.\n\n")
        roads = encoder.each([_road(*pair) for pair in pairwise(path)])
        taken = len(opening) + len(closing) + len(continuation) + sum(map(len, roads))
        room = self.room(context_tokens, taken)
        for road in self._others(encoder, towns, rng):
            if len(road) > room:
                break
            roads.append(road)
            room -= len(road)
        rng.shuffle(roads)
        turn = Turn(
            prompt_ids=to_tensor(opening, *roads, closing), continuation_ids=to_tensor(continuation), answers=answers
        )
        expected = (*path[1:], *path)
        return Sample(turns=(turn,), expected=expected, scorer=share_found(path), max_new_tokens=len(continuation) + 16)

    def _path(self, encoder: Encoder, towns: Iterator[str]) -> list[str]:
        """Towns of a way that takes `output_tokens` tokens to tell, or a little less."""
        path = [next(towns)]
        left = self.output_tokens - len(encoder.ids(f"\nThe whole way: {path[0]}.\n"))
        for town in towns:
            told = encoder.each([f"From {path[-1]} to {town}.\n", f", {town}"])
            left -= sum(map(len, told))
            if left < 0 and len(path) > 1:
                break
            path.append(town)
        return path

    def _others(self, encoder: Encoder, towns: Iterator[str], rng: random.Random) -> Iterator[list[int]]:
        """Roads between other towns."""
        while True:
            batch = list(islice(towns, 65))
            yield from encoder.each([_road(*pair) for pair in pairwise(batch)])


def _road(start: str, end: str) -> str:
    return f"The road from {start} leads to {end}.\n"


def _pieces(path: list[str]) -> list[Piece]:
    pieces: list[Piece] = []
    for start, end in pairwise(path):
        pieces += [(f"From {start} to", False), (f" {end}", True), (".\n", False)]
    pieces.append(("\nThe whole way:", False))
    for place, town in enumerate(path):
        pieces += [("," if place else "", False), (f" {town}", True)]
    return [*pieces, (".\n", False)]
