"""Data sets in local files: what is read from each format, what is asked, how it is scored, and what is refused."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from eval.conftest import Tiny
from eval.studies import save_tiny_model, small_policy, small_study

import kvframe
from kvframe.errors import ConfigError
from kvframe.eval import Sample, evaluate, run_study, task
from kvframe.eval.engine import make_engine
from kvframe.eval.running import task_titles
from kvframe.eval.tasks.scoring import RULES

RULER = {"index": 4, "input": "A text. 71 is one, 72 another. Which?", "outputs": ["71", "72"], "length": 30}
LONGBENCH = {"context": "The fox is red.", "input": "What is red?", "answers": ["a fox", "fox"], "_id": "x"}
INFINITE = {"context": "Long.", "input": "Which?", "answer": ["B"], "options": ["cats", "dogs"], "id": 0}
GSM8K = {"question": "One and one?", "answer": "One and one are two.\n#### 2"}
MATH = {"problem": "1 + 1", "answer": 2, "subject": "Algebra"}


def write(folder: Path, *samples: object, name: str = "set.jsonl") -> Path:
    """A file of JSON lines."""
    (folder / name).write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    return folder / name


def make(tiny: Tiny, path: Path, context: int = 300, seed: int = 0, **options: Any) -> Sample:
    """A sample of a file."""
    return task("dataset", path=path, **options).make(tiny.tokenizer, context, seed, tiny.haystack)


def texts(tiny: Tiny, sample: Sample) -> tuple[str, str, list[str]]:
    """Prompt, continuation and answers."""
    (turn,) = sample.turns
    decode = tiny.tokenizer.decode
    answers = [decode(turn.continuation_ids[start:stop]) for start, stop in turn.answers]
    return decode(turn.prompt_ids, skip_special_tokens=True), decode(turn.continuation_ids), answers


@pytest.mark.parametrize(
    "sample, prompt, continuation, answers",
    [
        (RULER, RULER["input"], " 71, 72\n", [" 71", " 72"]),
        (RULER | {"answer_prefix": " They are"}, f"{RULER['input']} They are", " 71, 72\n", [" 71", " 72"]),
        (LONGBENCH, "The fox is red.\n\nQuestion: What is red?\nAnswer:", " a fox\n", [" a fox"]),
        (INFINITE, "Long.\n\nQuestion: Which?\nA. cats\nB. dogs\nAnswer:", " B\n", [" B"]),
        (GSM8K, "Question: One and one?\nAnswer:", " 2\n", [" 2"]),
        (MATH, "Question: 1 + 1\nAnswer:", " 2\n", [" 2"]),
        (MATH | {"context": "Sums."}, "Sums.\n\nQuestion: 1 + 1\nAnswer:", " 2\n", [" 2"]),
    ],
    ids=["ruler", "ruler with a prefix", "longbench", "infinitebench", "gsm8k", "math", "questions about a text"],
)
def test_formats(
    sample: Mapping[str, Any], prompt: str, continuation: str, answers: list[str], tiny: Tiny, tmp_path: Path
) -> None:
    """Seen from the fields, in JSON lines and in a list: what is read, and what is to be said."""
    lines, listed = write(tmp_path, sample), tmp_path / "list.json"
    listed.write_text(json.dumps([sample]))
    for path in (lines, listed):
        assert texts(tiny, made := make(tiny, path)) == (prompt, continuation, answers)
        assert made.expected == tuple(answer.strip() for answer in answers) and made.max_new_tokens == 64


def test_the_seed_is_the_number(tiny: Tiny, tmp_path: Path) -> None:
    """Every sample once; blank lines are none; a file that changes is read again."""
    path = write(tmp_path, *(MATH | {"answer": number} for number in range(3)))
    path.write_text(path.read_text().replace("\n", "\n\n"))

    assert [make(tiny, path, seed=seed).expected for seed in range(3)] == [("0",), ("1",), ("2",)]
    with pytest.raises(ConfigError, match=r"set.jsonl has 3 samples, numbered from 0; seed 3 asks for one that is not"):
        make(tiny, path, seed=3)
    write(tmp_path, MATH | {"answer": "seven"})
    assert make(tiny, path).expected == ("seven",)


def test_a_template(tiny: Tiny, tmp_path: Path) -> None:
    """What stands in a text is no place of the template."""
    path = write(tmp_path, LONGBENCH | {"context": "Say {question}. {x}"})

    prompt, _, _ = texts(tiny, make(tiny, path, template="{question} In: {context}"))
    assert prompt == "What is red? In: Say {question}. {x}"
    with pytest.raises(ConfigError, match=r"Dataset.template must be a text with \{question\} in it, got 'Q'"):
        task("dataset", path=path, template="Q")


def test_longer_than_the_context(tiny: Tiny, tmp_path: Path) -> None:
    """An error that says how long it is; or the middle goes, and both ends stay."""
    path = write(tmp_path, LONGBENCH | {"context": "Begin. " + 90 * "words " + "End."})
    whole = make(tiny, path, context=4000)

    with pytest.raises(ConfigError, match=rf"sample 0 of set.jsonl has {whole.num_tokens} tokens, 100 are allowed"):
        make(tiny, path, context=100)
    cut = make(tiny, path, context=100, truncate="middle")
    prompt, continuation, _ = texts(tiny, cut)
    assert cut.num_tokens == 100 and continuation == " a fox\n"
    assert prompt.startswith("Begin. words") and prompt.endswith("End.\n\nQuestion: What is red?\nAnswer:")


@pytest.mark.parametrize(
    "rule, text, answers, value",
    [
        ("all", "it is 71 and 73", ("71", "72"), 0.5),
        ("any", "A FOX, I think", ("a fox", "hen"), 1),
        ("any", "none", ("a fox", "hen"), 0),
        ("f1", "The red fox.", ("fox", "hen"), 2 / 3),  # one of two words, and the one that was wanted
        ("f1", "nothing", ("fox",), 0),
        ("exact", " The Fox!\nAnd more", ("fox",), 1),
        ("exact", "red fox", ("fox",), 0),
        ("number", "2 + 2 = 4, so 1,024.0", ("1024",), 1),
        ("number", "2 and then 3", ("2",), 0),
        ("number", "none", ("2",), 0),
    ],
)
def test_rules(rule: Any, text: str, answers: tuple[str, ...], value: float) -> None:
    """Each by an example."""
    assert RULES[rule](text, answers) == pytest.approx(value)


def test_the_rule_of_a_format(tiny: Tiny, tmp_path: Path) -> None:
    """RULER wants all, LongBench counts words, the others want one; or what was said."""
    for sample, said, value in ((RULER, "71", 0.5), (LONGBENCH, "red fox", 2 / 3), (INFINITE, "A or B", 1)):
        scorer = make(tiny, write(tmp_path, sample)).scorer
        assert scorer is not None and scorer(said) == pytest.approx(value)
    scorer = make(tiny, write(tmp_path, MATH), scoring="number").scorer
    assert scorer is not None and (scorer("12"), scorer("2")) == (0, 1)


@pytest.mark.parametrize(
    "text, options, message",
    [
        ("", {}, "has no samples; expected JSON lines with input, outputs .ruler.; or context, input, answers"),
        ("{not json}", {}, "cannot read the samples in .*: line 1: Expecting property name"),
        ("[1]", {}, "sample 0 is a int, expected an object with input, outputs"),
        ('{"text": "x", "label": 1}', {}, "is in no format that is known: its fields are text, label; expected"),
        (
            json.dumps(LONGBENCH) + "\n" + json.dumps({"context": "x", "input": "y"}),
            {},
            "line 2: there is no field 'answers', which a sample of format 'longbench' has; there are context, input",
        ),
        (json.dumps(GSM8K), {"format": "ruler"}, "line 1: there is no field 'input', which a sample of format 'ruler'"),
        (json.dumps(RULER | {"outputs": []}), {}, "line 1: 'outputs' holds no answer"),
        (json.dumps(RULER | {"outputs": [{}]}), {}, "line 1: 'outputs' must be a text, a number, or a list of them"),
        (json.dumps(LONGBENCH | {"input": 3}), {}, "line 1: 'input' must be a text, got 3"),
        (json.dumps(INFINITE | {"options": "AB"}), {}, "line 1: 'options' must be a list of texts, got 'AB'"),
    ],
)
def test_what_cannot_be_read(text: str, options: dict[str, Any], message: str, tiny: Tiny, tmp_path: Path) -> None:
    """Which line, what was expected, what there is."""
    (tmp_path / "set.jsonl").write_text(text)
    with pytest.raises(ConfigError, match=message):
        make(tiny, tmp_path / "set.jsonl", **options)


def test_no_such_file(tmp_path: Path) -> None:
    """An error when the task is made, as an unknown format or rule is."""
    with pytest.raises(ConfigError, match=r"there is no file .*none\.jsonl"):
        task("dataset", path=tmp_path / "none.jsonl")
    with pytest.raises(ConfigError, match=r"Dataset\.format must be one of 'auto', 'ruler', .* got 'squad'"):
        task("dataset", path=write(tmp_path, MATH), format="squad")


def test_in_a_study(tmp_path: Path) -> None:
    """Known by what is in the file and by its name, not by its place; the scores of a study are those of `evaluate`."""
    model = save_tiny_model(tmp_path / "model")
    (tmp_path / "other").mkdir()
    samples = [LONGBENCH | {"context": f"{number} {60 * 'x'}"} for number in range(2)]
    here, there = write(tmp_path, *samples), write(tmp_path / "other", *samples)
    study = small_study(model, tasks=[task("dataset", path=here)], vary={}, policies=[], token_budget=[16],
                        seeds=range(2), metrics=["kl", "generated_score"], watch=0)  # fmt: skip
    moved = small_study(model, tasks=[task("dataset", path=there)], vary={}, policies=[], token_budget=[16],
                        seeds=range(2), metrics=["kl", "generated_score"], watch=0)  # fmt: skip
    keys = [cell.key for cell in study.cells()]

    assert keys == [cell.key for cell in moved.cells()] and len(set(keys)) == 2
    assert str(tmp_path) not in json.dumps([cell.to_dict()["task"] for cell in study.cells()])
    results = run_study(study, tmp_path / "results.sqlite", engine=make_engine("inline"))
    assert not results.failed() and len(results.done()) == 2
    write(tmp_path / "other", *samples[:1], name=here.name)
    os.utime(there, ns=(0, 0))
    assert keys != [cell.key for cell in moved.cells()]
    titles = task_titles([task("dataset", path=path) for path in (here, write(tmp_path, MATH, name="b.jsonl"))])
    assert [title.partition(" (sha256 ")[0] for title in titles] == ["dataset path=set.jsonl", "dataset path=b.jsonl"]


def test_every_policy_reads_the_same_prompt(tiny: Tiny, tmp_path: Path) -> None:
    """`full` has no distance from full attention on a sample of a file."""
    path = write(tmp_path, LONGBENCH)
    options: dict[str, Any] = {"context": 300, "metrics": ["kl", "score", "score_full"], "haystack": tiny.haystack}
    full = evaluate(tiny.model, tiny.tokenizer, kvframe.policy("full"), task("dataset", path=path), **options)
    tight = evaluate(tiny.model, tiny.tokenizer, small_policy("window"), task("dataset", path=path), **options)

    assert full["kl"] < 1e-9 < tight["kl"] and full["score"] == full["score_full"] == tight["score_full"]
