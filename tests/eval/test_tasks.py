"""Every task: the same for the same seed, as long as asked for, and answers that stand where they should."""

import re
from collections import Counter
from itertools import pairwise

import pytest
import torch
from eval.conftest import Tiny, make_tiny
from hypothesis import given
from hypothesis import strategies as st

import kvframe.eval
from kvframe.errors import ConfigError, UnknownNameError
from kvframe.eval import TASKS, Sample

CONTEXT = 3000


def make(tiny: Tiny, name: str, context: int = CONTEXT, seed: int = 0, **options: object) -> Sample:
    """A sample of a task."""
    return kvframe.eval.task(name, **options).make(tiny.tokenizer, context, seed, tiny.haystack)


@pytest.mark.parametrize("name", sorted(set(TASKS) - {"dataset"}))  # which reads a file: test_dataset.py
class TestEvery:
    def test_is_repeatable_and_differs_by_seed(self, name: str, tiny: Tiny):
        """The seed is all that is random."""
        one, same, other = (make(tiny, name, seed=seed) for seed in (1, 1, 2))

        assert torch.equal(one.ids, same.ids) and one.answers == same.answers and one.expected == same.expected
        assert one.ids.shape != other.ids.shape or not torch.equal(one.ids, other.ids)

    def test_fits_the_context(self, name: str, tiny: Tiny):
        """At any length; a context that is too short is refused."""
        for context in (CONTEXT, CONTEXT + 777):
            sample = make(tiny, name, context)
            assert context - 50 <= sample.num_tokens <= context
            assert sample.ids.shape == (1, sample.num_tokens)
            assert all(len(turn.prompt_ids) >= 2 for turn in sample.turns)
        with pytest.raises(ConfigError, match=f"task {name} needs a context of at least .* tokens, got 20"):
            make(tiny, name, 20)

    def test_answers_are_what_is_expected(self, name: str, tiny: Tiny):
        """The tokens of each answer say its text."""
        sample = make(tiny, name)
        said = [tiny.tokenizer.decode(sample.targets[start:stop]).strip() for start, stop in sample.answers]

        assert len(sample.targets) == sample.num_steps
        if name == "perplexity":
            assert not sample.answers
        elif name == "copy":
            assert "".join(tiny.tokenizer.decode(sample.targets[a:b]) for a, b in sample.answers) == sample.expected[0]
        else:
            assert said == list(sample.expected)

    def test_the_scorer(self, name: str, tiny: Tiny):
        """What is expected gets 1, nothing gets 0."""
        sample = make(tiny, name)
        if sample.scorer is not None:
            assert sample.scorer(tiny.tokenizer.decode(sample.turns[0].continuation_ids)) == 1
            assert sample.scorer("") == 0
            assert sample.max_new_tokens > 0

    def test_options_are_plain_data(self, name: str):
        """So that a study can name them."""
        task = kvframe.eval.task(name)
        options = task.to_dict()

        assert options.pop("task") == name and kvframe.eval.task(name, **options) == task


NEEDLES = ("niah_single", "niah_multikey", "niah_multivalue", "niah_multiquery")


@pytest.mark.parametrize("name", NEEDLES)
def test_needles_stand_in_the_prompt(name: str, tiny: Tiny):
    """Each answer is to be found there, once."""
    sample = make(tiny, name)
    prompt = tiny.tokenizer.decode(sample.turns[0].prompt_ids)

    assert sample.expected and all(prompt.count(f" is {answer}.") == 1 for answer in sample.expected)


def test_pass_key(tiny: Tiny):
    """The only number in the text."""
    sample = make(tiny, "passkey", depth=0.5)
    prompt = tiny.tokenizer.decode(sample.turns[0].prompt_ids)

    assert re.findall(r"\d+", prompt) == [sample.expected[0]] * 2
    assert prompt.index(sample.expected[0]) / len(prompt) == pytest.approx(0.5, abs=0.05)


def test_lines(tiny: Tiny):
    """Nothing but lines of a name and a number, no name twice, and each that is asked for among them."""
    sample = make(tiny, "kv_retrieval", num_queries=5)
    prompt = tiny.tokenizer.decode(sample.turns[0].prompt_ids)
    lines = dict(re.findall(r"^(\w+ \w+): (\d+)$", prompt, re.M))
    asked = re.findall(r"^(\w+ \w+): (\d+)$", tiny.tokenizer.decode(sample.targets), re.M)

    assert len(asked) == 5 and all(lines[name] == number for name, number in asked)
    assert len(lines) == prompt.count(": ") > 100


def test_variables(tiny: Tiny):
    """Following the assignments from the value on gives the chain, and only that."""
    sample = make(tiny, "vt", num_hops=3, num_chains=3)
    prompt = tiny.tokenizer.decode(sample.turns[0].prompt_ids)
    held: dict[str, str] = {}
    for variable, source in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", prompt):
        held[variable] = held.get(source, source)
    (value,) = re.findall(r"hold the value (\d+)", prompt)

    assert len(held) == 12 and len(set(held.values())) == 3
    assert [variable for variable, holds in held.items() if holds == value] == list(sample.expected)


def test_word_counts(tiny: Tiny):
    """What is asked for comes more often than all else, in the order that was promised."""
    common = make(tiny, "cwe", num_common=4)
    lines = tiny.tokenizer.decode(common.turns[0].prompt_ids).split("\n\n")[1].splitlines()
    counts = Counter(lines)
    frequent = make(tiny, "fwe")
    words = Counter(tiny.tokenizer.decode(frequent.turns[0].prompt_ids).split("\n\n")[1].split())

    assert sorted(common.expected) == sorted(name for name, count in counts.items() if count > 1)
    assert list(common.expected) == sorted(common.expected, key=lines.index)
    assert sum(counts[name] for name in common.expected) == pytest.approx(len(lines) / 2, rel=0.1)
    assert len(words) == 50 and [word for word, _ in words.most_common(3)] == list(frequent.expected)
    assert words[frequent.expected[2]] > words.most_common(4)[3][1]


def test_follow_ups(tiny: Tiny):
    """The text comes in the first turn alone; each turn asks for a needle in it."""
    sample = make(tiny, "multi_turn", num_turns=3)
    prompts = [tiny.tokenizer.decode(turn.prompt_ids) for turn in sample.turns]

    assert len(prompts) == 3 and all(len(prompt) < 100 for prompt in prompts[1:])
    for prompt, number in zip(prompts, sample.expected):
        (name,) = re.findall(r"secret number of the ([\w ]+)\?", prompt)
        assert f"The secret number of the {name} is {number}." in prompts[0]


def test_a_table_twice(tiny: Tiny):
    """The answers stand in the output, far before where they are asked for, and not in the prompt."""
    for order in ("shuffled", "same"):
        sample = make(tiny, "relisting", order=order)
        prompt = tiny.tokenizer.decode(sample.turns[0].prompt_ids)
        first, second = (
            tiny.tokenizer.decode(sample.targets).removeprefix("The table:\n").split("\nThe table a second time:\n")
        )

        assert 500 < sample.num_steps <= 1024 and not any(number in prompt for number in sample.expected)
        assert sorted(first.splitlines()) == sorted(second.splitlines()) and len(first.splitlines()) > 10
        assert (first == second) == (order == "same")
        assert [line.split(": ")[1] for line in second.splitlines()] == list(sample.expected)


def test_a_way(tiny: Tiny):
    """Each step is a road of the prompt; the end names all of them again."""
    sample = make(tiny, "path_traversal", output_tokens=800)
    prompt = tiny.tokenizer.decode(sample.turns[0].prompt_ids)
    roads = dict(re.findall(r"The road from ([\w ]+) leads to ([\w ]+)\.", prompt))
    steps, whole = tiny.tokenizer.decode(sample.targets).split("\nThe whole way: ")
    path = whole.strip(".\n").split(", ")

    assert 600 < sample.num_steps <= 800 and len(roads) > 2 * len(path)
    assert all(roads[start] == end for start, end in pairwise(path))
    assert steps.splitlines() == [f"From {start} to {end}." for start, end in pairwise(path)]
    assert list(sample.expected) == path[1:] + path


@given(seed=st.integers(0, 200), num_numbers=st.integers(3, 5))
def test_a_search(seed: int, num_numbers: int):
    """Sums are right, every way back restores what was there, and the target was reached at the end, not before."""
    tiny = make_tiny()
    sample = make(tiny, "countdown", seed=seed, num_numbers=num_numbers, output_tokens=900)
    prompt, said = (tiny.tokenizer.decode(ids) for ids in (sample.turns[0].prompt_ids, sample.targets))
    given_numbers, target = re.findall(r"Numbers: ([\d ]+). Target: (\d+)", prompt)[0]
    *search, end = said.strip().splitlines()
    stack, tried = [sorted(map(int, given_numbers.split()))], []
    for line in search:
        if line.startswith("Back to"):
            stack.pop()
            tried.pop()
            assert line == f"Back to {' '.join(map(str, stack[-1]))}."
            continue
        step, result = re.findall(r"^Take ((?:\d+) . (?:\d+) = (\d+))", line)[0]
        one, sign, other = step.split()[:3]
        left = list(stack[-1])
        left.remove(int(one))
        left.remove(int(other))
        assert eval(f"{one} {sign} {other}") == int(result)
        if "Not it" in line:
            assert not left and result != target
        elif "left" in line:
            stack.append(sorted([*left, int(result)]))
            tried.append(step)
            assert line.endswith(f", left {' '.join(map(str, stack[-1]))}.")
    steps = end.removeprefix("Reached. The solution: ").rstrip(".").split(", ")

    assert search[-1] == f"Take {steps[-1]}." and steps[-1].endswith(f"= {target}") and steps[:-1] == tried
    assert 200 < sample.num_steps <= 900
    assert sample.expected[-len(steps) :] == tuple(steps)


def test_a_search_that_cannot_be_told(tiny: Tiny):
    """Too few tokens of output for the smallest search."""
    with pytest.raises(ConfigError, match="countdown needs more than output_tokens=128 .* for 6 numbers"):
        make(tiny, "countdown", num_numbers=6, output_tokens=128)


def test_distractors(tiny: Tiny):
    """One of several needles is asked for."""
    sample = make(tiny, "niah_multikey", num_needles=5)
    prompt = tiny.tokenizer.decode(sample.turns[0].prompt_ids)

    assert prompt.count("The secret number of the") == 5 and len(sample.expected) == 1


@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_depth_of_a_needle(depth: float, tiny: Tiny):
    """It stands behind the share of the text that was asked for."""
    prompt = tiny.tokenizer.decode(make(tiny, "niah_single", depth=depth).turns[0].prompt_ids)

    assert prompt.index("The secret number") / len(prompt) == pytest.approx(depth, abs=0.08)


def test_the_copied_passage_stands_in_the_prompt(tiny: Tiny):
    """Cue and continuation are one run of tokens of the text."""
    sample = make(tiny, "copy", copy_tokens=50, cue_tokens=10)
    turn = sample.turns[0]
    passage = [*turn.prompt_ids[-10:].tolist(), *turn.continuation_ids.tolist()]
    prompt = turn.prompt_ids.tolist()
    places = [i for i in range(len(prompt) - 60) if prompt[i : i + 60] == passage]

    assert len(places) == 1 and places[0] / len(prompt) == pytest.approx(0.25, abs=0.05)
    assert sample.scorer is not None and sample.scorer(sample.expected[0][:25] + "#") == pytest.approx(0.5, abs=0.02)


def test_names_and_options_that_there_are_not():
    """An unknown task, an unknown option, a value that does not fit."""
    with pytest.raises(UnknownNameError, match="no task 'niah_singel'; did you mean 'niah_single'?"):
        kvframe.eval.task("niah_singel")
    with pytest.raises(ConfigError, match="Copy has no option 'tokens'"):
        kvframe.eval.task("copy", tokens=3)
    with pytest.raises(ConfigError, match="NiahSingle.depth must be a number from 0 to 1, got 1.5"):
        kvframe.eval.task("niah_single", depth=1.5)
