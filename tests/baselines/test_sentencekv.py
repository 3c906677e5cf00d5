"""SentenceKV (arXiv 2504.00970) by its definition: sentences, chosen by the mean query of the one that has ended."""

import pytest
import torch
from baselines.plain import CASE, Step, Vector, best_tokens, dot, mean_of_group, steps_of
from baselines.test_clusterkv import mean

import kvframe
from kvframe.errors import ConfigError, UnsupportedCallError
from kvframe.testing.models import tiny_llama
from kvframe_baselines import sentence_end_ids

ENDS = (1, 4, 6)
OPTIONS = {"token_budget": 9, "sink_size": 2, "window_size": 4, "max_sentence": 5, "end_ids": ENDS}
IDS = CASE.token_ids().span(0, 0, CASE.num_tokens).tolist()


def sentences(start: int, stop: int) -> list[list[int]]:
    """Positions [start, stop), cut behind every end and at five tokens."""
    found: list[list[int]] = [[]]
    for position in range(start, stop):
        if found[-1] and (len(found[-1]) == 5 or IDS[position - 1] in ENDS):
            found.append([])
        found[-1].append(position)
    return [unit for unit in found if unit]


def score(step: Step, queries: list[Vector]) -> Vector:
    """Product of each query with each sentence's mean key, the mean over the group."""
    means = [mean([step.keys[token] for token in unit]) for unit in step.units]
    return mean_of_group([[dot(query, key) for key in means] for query in queries])


def test_sentences_chosen_when_a_sentence_ends():
    """At the first step and where a token ends a sentence, by the mean query of that sentence; in between all stays."""
    steps = steps_of(kvframe.policy("sentencekv", **OPTIONS))
    written: dict[tuple[int, int], list[list[Vector]]] = {}
    due, first_steps = 0, set()
    for step in steps:
        own = step.batch, step.head
        queries = written.setdefault(own, [])
        queries.append(step.queries)
        ends = IDS[len(step.keys) - 1] in ENDS
        if ends or own not in first_steps:
            means = [mean([sentence[member] for sentence in queries]) for member in range(CASE.group_size)]
            assert step.retrieved == best_tokens(step.units, score(step, means), 9)
            due += 1
        first_steps.add(own)
        if ends:
            written[own] = []
    assert len(first_steps) < due < len(steps)


def test_sentences_are_the_units():
    """Of the prompt and of what is generated; only what lay in the window when generating began is cut otherwise."""
    generated = set()
    for step in steps_of(kvframe.policy("sentencekv", **OPTIONS)):
        stop = step.num_prompt - 4
        assert [unit for unit in step.units if unit[0] < stop] == sentences(2, stop)
        for unit in step.units:
            if unit[0] > step.num_prompt and IDS[unit[0] - 1] in ENDS:
                assert unit == sentences(unit[0], len(IDS))[0]
                generated.add(tuple(unit))
    assert len(generated) > 1


class Words:
    """A tokenizer of a few words."""

    words = ("and", "end.", "What?", "1.5", "\n", 'he said."', "semi;", "。", "a.b", "... ")

    def __len__(self) -> int:
        return len(self.words)

    def batch_decode(self, batch: list[list[int]], **options: object) -> list[str]:
        """One word each."""
        return [self.words[token] for (token,) in batch]


def test_tokens_that_end_a_sentence():
    """Those with a mark at their end, quotes and blanks aside, or with a new line."""
    assert sentence_end_ids(Words()) == (1, 2, 4, 5, 6, 7, 9)


def test_fitted_to_a_tokenizer():
    """All three stages know the ends then; what was given stays, and other policies are what they were."""
    policy = kvframe.policy("sentencekv").fitted(Words())
    assert policy.units.end_ids == policy.trigger.end_ids == policy.scorer.end_ids == sentence_end_ids(Words())
    assert policy.fitted(Words()) is policy
    assert kvframe.policy("sentencekv", end_ids=(3,)).fitted(Words()) == kvframe.policy("sentencekv", end_ids=(3,))
    quest = kvframe.policy("quest")
    assert quest.fitted(Words()) is quest
    both = quest.swap(units=kvframe.DecoupledUnits(prompt=policy.units, output=kvframe.policy("sentencekv").units))
    assert both.fitted(Words()).units.output == policy.units


def test_without_a_tokenizer():
    """The error says how the ends come to be known, before anything is attached."""
    with (
        pytest.raises(ConfigError, match=r"does not know which tokens end a sentence; use policy\.fitted\(tokenizer\)"),
        kvframe.attach(tiny_llama(), kvframe.policy("sentencekv")),
    ):
        pass


def test_without_ids():
    """Called with embeddings the model says so; a layer by itself as well."""
    policy = kvframe.policy("sentencekv", end_ids=(3,))
    model = tiny_llama()
    embedded = model.get_input_embeddings()(torch.ones(1, 5, dtype=torch.int64))
    with kvframe.attach(model, policy) as run, pytest.raises(UnsupportedCallError, match="asks for token ids"):
        model(inputs_embeds=embedded, past_key_values=run.new_cache(9))
    with pytest.raises(UnsupportedCallError, match=r"SentenceTrigger.* asks for token ids"):
        kvframe.runtime.RetrievalLayer(CASE.layout(), policy, 9, "offload")


def test_published_defaults():
    """32 sinks and 32 recent tokens."""
    policy = kvframe.policy("sentencekv")

    assert (policy.sink_size, policy.window_size, policy.selector.capacity) == (32, 32, 1024)
