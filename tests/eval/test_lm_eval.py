"""lm-eval's tasks under a policy, offline, from task files of our own."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from cli.words import TEXT
from eval.studies import save_tiny_model
from typer.testing import CliRunner, Result

import kvframe
from kvframe.cli.app import app

pytest.importorskip("lm_eval", reason="lm-eval is not installed; pip install 'kvframe[lm-eval]'")
pytestmark = pytest.mark.filterwarnings("ignore")

SMALL = {"sink_size": 2, "window_size": 8, "token_budget": 16, "dense_layers": (0,)}
KINDS = {
    "pick": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
""",
    "say": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[label]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 6}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
""",
    "read": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list:
  - {metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
""",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in a directory."""
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What lm-eval reads lies where it does not stay."""
    import datasets

    folder = str(tmp_path_factory.mktemp("datasets"))
    before, datasets.config.HF_DATASETS_CACHE = datasets.config.HF_DATASETS_CACHE, folder
    yield
    datasets.config.HF_DATASETS_CACHE = before


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with three tasks, one of each kind that lm-eval has, on four questions."""
    folder = tmp_path_factory.mktemp("tasks")
    words = TEXT.split()
    with (folder / "questions.jsonl").open("w") as file:
        for number in range(4):
            question = " ".join(words[number:] + words[:number])[:120]
            choices = [" a", " b", f" {words[number]}", f" {words[-number]} {words[0]}"]
            file.write(json.dumps({"question": question, "choices": choices, "label": number}) + "\n")
    data = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder / 'questions.jsonl'}}}}}\n"
    for name, kind in KINDS.items():
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{data}test_split: test\n{kind}")
    return folder


def evaluate(lm: Any, tasks: Path) -> dict[str, Any]:
    """lm-eval's results, with what the model answered."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    found: dict[str, Any] = simple_evaluate(
        model=lm, tasks=list(KINDS), task_manager=manager, bootstrap_iters=0, log_samples=True
    )
    return found


def load(model: Path) -> tuple[Any, Any]:
    """The model and its tokenizer."""
    from kvframe.cli.models import load

    return load(str(model), quiet=True)


def scores(found: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The figures of every task."""
    return {
        task: {name: float(value) for name, value in own.items() if isinstance(value, float)}
        for task, own in found["results"].items()
    }


def answers(found: dict[str, Any], task: str) -> list[Any]:
    """What the model answered to every question."""
    return [[answer[0] for answer in sample["resps"]] for sample in found["samples"][task]]


def test_full_attention_scores_as_lm_eval_does(model: Path, tasks: Path) -> None:
    """Policy `full`, one decode step a token, against lm-eval's own class, one forward pass an answer: the same scores,
    and the same log-probabilities up to rounding. A tight policy gives others."""
    from lm_eval.models.huggingface import HFLM

    from kvframe.eval.harness import PolicyLM

    loaded, tokenizer = load(model)
    theirs = evaluate(HFLM(loaded, tokenizer=tokenizer, batch_size=2), tasks)
    ours = evaluate(PolicyLM(loaded, "full", tokenizer=tokenizer, batch_size=2), tasks)
    tight = evaluate(PolicyLM(loaded, kvframe.policy("louiskv", **SMALL), tokenizer=tokenizer), tasks)

    for task, own in scores(theirs).items():
        assert scores(ours)[task] == pytest.approx(own, rel=1e-5) and own
    assert answers(ours, "say") == answers(theirs, "say")
    for mine, expected in zip(answers(ours, "pick"), answers(theirs, "pick"), strict=True):
        assert [greedy for _, greedy in mine] == [greedy for _, greedy in expected]
        assert [prob for prob, _ in mine] == pytest.approx([prob for prob, _ in expected], rel=1e-4)
    assert scores(tight)["read"] != pytest.approx(scores(theirs)["read"], rel=1e-4)
    assert all(math.isfinite(prob) for each in answers(tight, "pick") for prob, _ in each)


def test_options_as_text(model: Path) -> None:
    """As lm-eval's own command line gives them."""
    from kvframe.eval.harness import PolicyLM

    loaded, tokenizer = load(model)
    lm = PolicyLM(loaded, policy="louiskv", token_budget="32", dense_layers="0", tokenizer=tokenizer)

    assert lm.policy == kvframe.policy("louiskv", token_budget=32, dense_layers=(0,))
    assert lm.get_model_info()["kvframe_policy"] == lm.policy.to_dict()


def run(*arguments: object, code: int = 0) -> Result:
    """Run a command in this process and check its exit code."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def test_the_command(model: Path, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`kvframe eval` gives what lm-eval gives, as a table, as JSON and as a file."""
    from lm_eval.models.huggingface import HFLM

    monkeypatch.setenv("COLUMNS", "200")
    call = ("eval", model, "--tasks", "pick", "--include-path", tasks, "--policy", "full")
    found = json.loads(run(*call, "--json", "--output", tmp_path / "all.json").stdout)
    loaded, tokenizer = load(model)
    theirs = evaluate(HFLM(loaded, tokenizer=tokenizer), tasks)["results"]["pick"]

    assert found["results"]["pick"]["acc,none"] == theirs["acc,none"]
    assert found["results"]["pick"]["acc_norm,none"] == theirs["acc_norm,none"]
    assert found["policy"]["name"] == "full" and found["samples"]["pick"]["effective"] == 4
    written = json.loads((tmp_path / "all.json").read_text())
    assert written["results"]["pick"]["acc,none"] == theirs["acc,none"]


@pytest.mark.parametrize(
    "options, part",
    [
        (("--tasks", "pik"), "lm-eval has no task 'pik'; did you mean 'pick'?"),
        (("--tasks", ","), "--tasks names none"),
        (("--tasks", "pick", "--policy", "luiskv"), "no policy named 'luiskv'"),
        (("--tasks", "pick", "--include-path", "nowhere"), "--include-path must be a directory"),
        (("--tasks", "pick", "--output", "nowhere/all.json"), "there is no directory"),
    ],
)
def test_refusals(options: tuple[str, ...], part: str, model: Path, tasks: Path) -> None:
    """One line, before the model is loaded."""
    given = ("--include-path", tasks, *options)
    result = run("eval", model, *given, code=2)

    assert part in result.stderr and len(result.stderr.strip().splitlines()) == 1


def test_without_the_extra(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way out is said."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)

    assert "pip install 'kvframe[lm-eval]'" in run("eval", model, "--tasks", "pick", code=2).stderr
