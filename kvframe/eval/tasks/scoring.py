"""What a generated answer is worth, beside the answers that are right: numbers from 0 to 1."""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Literal

from attrs import frozen

Rule = Literal["all", "any", "f1", "exact", "number"]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def share_of_all(text: str, answers: Sequence[str]) -> float:
    """Share of the answers that stand in the text, upper and lower case alike: RULER's match of all."""
    return sum(answer.lower() in text.lower() for answer in answers) / len(answers)


def any_of(text: str, answers: Sequence[str]) -> float:
    """1 if one of the answers stands in the text: RULER's match of a part."""
    return float(any(answer.lower() in text.lower() for answer in answers))


def f1(text: str, answers: Sequence[str]) -> float:
    """Harmonic mean of precision and recall of words, without articles and punctuation, of the answer that fits best:
    that of SQuAD (2016, arXiv 1606.05250) and of LongBench's questions."""
    return max(_f1(_words(text), _words(answer)) for answer in answers)


def exact(text: str, answers: Sequence[str]) -> float:
    """1 if the first line of the text is one of the answers, but for articles, punctuation and case."""
    first = next(iter(text.strip().splitlines()), "")
    return float(any(_words(first) == _words(answer) for answer in answers))


def number(text: str, answers: Sequence[str]) -> float:
    """1 if the last number of the text equals that of an answer: what is usual for GSM8K and AIME."""
    said = _last_number(text)
    return float(said is not None and any(said == _last_number(answer) for answer in answers))


def _words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def _f1(said: list[str], wanted: list[str]) -> float:
    common = (Counter(said) & Counter(wanted)).total()
    return 2 * common / (len(said) + len(wanted)) if common else 0.0


def _last_number(text: str) -> float | None:
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


RULES: dict[Rule, Callable[[str, Sequence[str]], float]] = {
    "all": share_of_all,
    "any": any_of,
    "f1": f1,
    "exact": exact,
    "number": number,
}


@frozen
class Scorer:
    """Scores a text by one rule."""

    rule: Rule
    answers: tuple[str, ...]

    def __call__(self, text: str) -> float:
        return RULES[self.rule](text, self.answers)
