"""Variable tracking: which variables hold a value that was handed on from one to the next (RULER, 2024, arXiv
2404.06654)."""

import random
from string import ascii_uppercase
from typing import ClassVar

from attrs import field, frozen

from kvframe.eval.tasks.base import Encoder, Piece, Sample, Task, Turn, scatter, share_found, to_tensor
from kvframe.eval.tasks.words import numbers
from kvframe.eval.text import Haystack
from kvframe.validators import integer

INTRODUCTION = "Variables get values somewhere in this text. Keep track of them.\n\n"


@frozen(kw_only=True)
class VariableTracking(Task):
    """Chains of assignments in a text; all variables of one chain are asked for, in the order of the chain."""

    name: ClassVar[str] = "vt"
    num_hops: int = field(default=4, validator=integer(at_least=1))
    """Times that a chain hands its value on."""
    num_chains: int = field(default=2, validator=integer(at_least=1))
    """Chains in the text, one of which is asked for."""

    def _make(self, encoder: Encoder, context_tokens: int, rng: random.Random, haystack: Haystack) -> Sample:
        values, fresh = numbers(rng, 5), _variables(rng, self.num_chains * (self.num_hops + 1))
        chains = [[fresh.pop() for _ in range(self.num_hops + 1)] for _ in range(self.num_chains)]
        held = [next(values) for _ in chains]
        opening = encoder.beginning + encoder.ids(INTRODUCTION)
        parts = encoder.each(_interleaved([_assignments(*pair) for pair in zip(chains, held)], rng))
        closing = encoder.ids(f"\n\nAll variables that hold the value {held[0]}, in the order of the text.\n\n")
        pieces: list[Piece] = [("VAR", False)]
        for place, variable in enumerate(chains[0]):
            pieces += [(", VAR" if place else "", False), (f" {variable}", True)]
        continuation, answers = encoder.marked([*pieces, ("\n", False)])
        taken = len(opening) + len(closing) + len(continuation) + sum(map(len, parts))
        room = self.room(context_tokens, taken)
        text = scatter(haystack.slice(encoder.tokenizer, room, rng), parts, rng)
        turn = Turn(
            prompt_ids=to_tensor(opening, text, closing), continuation_ids=to_tensor(continuation), answers=answers
        )
        expected = tuple(chains[0])
        return Sample(
            turns=(turn,), expected=expected, scorer=share_found(expected), max_new_tokens=len(continuation) + 8
        )


def _variables(rng: random.Random, count: int) -> list[str]:
    found: set[str] = set()
    while len(found) < count:
        found.add("".join(rng.choices(ascii_uppercase, k=5)))
    return rng.sample(sorted(found), count)


def _assignments(chain: list[str], value: str) -> list[str]:
    sources = [value, *(f"VAR {variable}" for variable in chain)]
    return [f"VAR {variable} = {source}.\n\n" for variable, source in zip(chain, sources)]


def _interleaved(chains: list[list[str]], rng: random.Random) -> list[str]:
    """All assignments in random order, but those of a chain in theirs."""
    turns = [number for number, chain in enumerate(chains) for _ in chain]
    rng.shuffle(turns)
    waiting = [iter(chain) for chain in chains]
    return [next(waiting[number]) for number in turns]
