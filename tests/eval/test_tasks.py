"""Every task: the same for the same seed, as long as asked for, and answers that stand where they should."""

import pytest
import torch
from eval.conftest import Tiny

import kvframe.eval
from kvframe.errors import ConfigError, UnknownNameError
from kvframe.eval import TASKS, Sample

CONTEXT = 3000


def make(tiny: Tiny, name: str, context: int = CONTEXT, seed: int = 0, **options: object) -> Sample:
    """A sample of a task."""
    return kvframe.eval.task(name, **options).make(tiny.tokenizer, context, seed, tiny.haystack)


@pytest.mark.parametrize("name", sorted(TASKS))
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
            assert context // 2 < sample.num_tokens <= context
            assert sample.ids.shape == (1, sample.num_tokens)
            assert all(len(turn.prompt_ids) >= 2 for turn in sample.turns)
        with pytest.raises(ConfigError, match=f"task {name} needs a context of at least .* tokens, got 20"):
            make(tiny, name, 20)

    def test_answers_are_what_is_expected(self, name: str, tiny: Tiny):
        """The tokens of each answer say its text."""
        sample = make(tiny, name)
        said = [tiny.tokenizer.decode(sample.targets[start:stop]).strip() for start, stop in sample.answers]

        assert len(sample.targets) == sample.num_steps
        if name == "copy":
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
