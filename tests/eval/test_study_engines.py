"""Studies that run: in this process, in workers that die, under a driver that is killed, on a Ray cluster."""

import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from eval.studies import CONTEXT, save_tiny_model, small_study

import kvframe.eval
from kvframe.eval.engine import make_engine
from kvframe.eval.metrics import METRICS
from kvframe.eval.outcome import Outcome
from kvframe.eval.running import Results, run_study
from kvframe.eval.store import read_outcomes
from kvframe.eval.study import Cell
from kvframe.eval.studyfile import StudyFile

SECONDS = 240.0
"""A limit for what takes a few: the machine may be busy."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in a directory."""
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As workers have, so that sums are rounded alike."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def figures_of(outcomes: dict[str, Outcome]) -> dict[str, Any]:
    """Every figure of every cell, by key; without timings, which differ from run to run."""
    timings = {name for name, metric in METRICS.items() if metric.is_timing}
    return {
        key: outcome.error or {name: value for name, value in (outcome.figures or {}).items() if name not in timings}
        for key, outcome in outcomes.items()
    }


class Log:
    """What an observer is told."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str]] = []

    def started(self, cell: Cell) -> None:
        """Note it."""
        self.events.append(("started", cell.key))

    def finished(self, cell: Cell, outcome: Outcome) -> None:
        """Note it."""
        self.events.append(("finished", outcome.key))


# ---- in this process ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def first(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """A small study that has been run."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    found = run_study(small_study(model), tmp_path_factory.mktemp("first") / "a.sqlite", engine=make_engine("inline"))
    torch.set_num_threads(before)
    return found


def test_same_seed_same_figures(model: Path, first: Results, tmp_path: Path) -> None:
    """Twice from nothing: the same table. Once more: nothing is left to do."""
    study = small_study(model)
    second = run_study(study, tmp_path / "b.sqlite", engine=make_engine("inline"))
    log = Log()
    third = run_study(study, tmp_path / "b.sqlite", engine=make_engine("inline"), observer=log)

    assert set(first.outcomes) == {cell.key for cell in study.cells()} and not first.failed() and not first.missing()
    assert figures_of(first.outcomes) == figures_of(second.outcomes) == figures_of(third.outcomes)
    assert log.events == []


def test_figures_say_what_they_should(first: Results) -> None:
    """Full attention is no distance from itself; a selection at every step attends to what its budget says."""
    rows = {(cell.label, cell.budget): outcome.figures or {} for cell, outcome in first.done()}

    assert rows["full", None]["kl"] == pytest.approx(0, abs=1e-6)
    assert rows["full", None]["score"] == rows["full", None]["score_full"]
    assert rows["trigger: every-step", 32]["retrieval_rate"] == 1 > rows["rarely", 32]["retrieval_rate"] > 0
    assert rows["louiskv", 32]["attended_total"] - rows["louiskv", 16]["attended_total"] == pytest.approx(16, abs=8)
    watched = {cell.label: outcome.figures or {} for cell, outcome in first.done("watch")}
    assert len({tuple(each["tokens"]) for each in watched.values()}) == 1
    rarely = watched["rarely"]
    assert [sum(step) for step in zip(*rarely["fires"], strict=True)] == [2.0] + [0.0] * 7 + [2.0] + [0.0] * 3
    for step, places in enumerate(rarely["fetched_from"]):
        assert sum(places) >= sum(layer[step] for layer in rarely["fetched_rows"]) == sum(places)


def test_a_second_haystack(model: Path, tmp_path: Path) -> None:
    """Another text is other figures, one option away."""
    (tmp_path / "text.txt").write_text("\n\n".join(f"The line number {number} says nothing." for number in range(200)))
    study = small_study(model, vary={}, watch=0, token_budget=16)
    other = small_study(model, vary={}, watch=0, token_budget=16, haystack=tmp_path / "text.txt")
    found = [run_study(each, tmp_path / "results.sqlite", engine=make_engine("inline")) for each in (study, other)]

    kls = [{cell.label: (outcome.figures or {})["kl"] for cell, outcome in each.done()} for each in found]
    assert kls[0]["louiskv"] != kls[1]["louiskv"]


def test_failures_are_kept(model: Path, tmp_path: Path) -> None:
    """A cell that fails has its traceback, does not stop the others, and runs again only if that is asked for."""
    study = small_study(model, vary={}, watch=0, tasks=[
        kvframe.eval.task("copy", copy_tokens=12, cue_tokens=4), kvframe.eval.task("copy", copy_tokens=5000)
    ])  # fmt: skip
    path, log, again = tmp_path / "results.sqlite", Log(), Log()
    found = run_study(study, path, engine=make_engine("inline"))
    run_study(study, path, engine=make_engine("inline"), observer=log)
    run_study(study, path, engine=make_engine("inline"), observer=again, retry_failed=True)

    assert len(found.done()) == 3 and len(found.failed()) == 3
    for cell, outcome in found.failed():
        assert cell.task.copy_tokens == 5000 and "Traceback" in (outcome.error or "")
        assert "ConfigError: task copy needs a context of at least" in outcome.reason
    assert log.events == []
    assert {key for _, key in again.events} == {cell.key for cell, _ in found.failed()}


# ---- in workers -----------------------------------------------------------------------------------------------------

# The study file itself brings a task and a stage, which workers have to find. What the environment says is no part of
# a cell, so that a slow and deadly run can be held against a quick one. A child of the process that a file beside the
# log names never comes to its end: whoever kills that process kills it at work.
STUDY = """
import os, signal, time
from typing import ClassVar
from attrs import frozen
import kvframe, kvframe.eval
from kvframe.eval.tasks.copying import Copy

@frozen(kw_only=True)
class Logged(Copy):
    '''Says which seed it is made for, and who its parent is; takes its time, and kills its process for some.'''

    name: ClassVar[str] = "logged"
    log: str

    def make(self, tokenizer, context_tokens, seed, haystack):
        with open(self.log, "a") as file:
            file.write(f"{{seed}} {{os.getppid()}}\\n")
        if str(seed) == os.environ.get("DEADLY_SEED"):
            os.kill(os.getpid(), signal.SIGKILL)
        if os.path.exists(doomed := self.log + ".doomed") and open(doomed).read() == str(os.getppid()):
            time.sleep(600)
        time.sleep(600 if str(seed) in os.environ.get("HELD_SEEDS", "").split() else 0)
        time.sleep(float(os.environ.get("SECONDS_EACH", "0")))
        return super().make(tokenizer, context_tokens, seed, haystack)

@frozen(kw_only=True)
class Mine(kvframe.FixedStride):
    name: ClassVar[str] = "mine"

study = kvframe.eval.Study(
    model={model!r},
    tasks=Logged(copy_tokens=6, cue_tokens=4, log={log!r}),
    base=kvframe.policy("louiskv", sink_size=4, window_size=16, token_budget=16).swap(trigger=Mine(stride=4)),
    context={context}, seeds=range({seeds}), watch=0,
)
"""


def write_study(folder: Path, model: Path, *, seeds: int) -> StudyFile:
    """A study with one cell for each seed, which says at `folder / "log"` what it runs."""
    text = STUDY.format(model=str(model), log=str(folder / "log"), context=CONTEXT, seeds=seeds)
    (folder / "study.py").write_text(text)
    return StudyFile.read(folder / "study.py")


def runs_of(folder: Path) -> Counter[int]:
    """How often each seed was begun."""
    log = folder / "log"
    return Counter(int(line.split()[0]) for line in log.read_text().splitlines()) if log.exists() else Counter()


def seeds_of(file: StudyFile, outcomes: dict[str, Outcome]) -> set[int]:
    """Seeds whose cells have come to an end."""
    return {cell.seed for cell in file.study().cells() if cell.key in outcomes}


def start(folder: Path) -> "subprocess.Popen[str]":
    """`kvframe ablate` in a process of its own, with two workers, slow cells and one that kills its worker; the last
    cells never end, so that it is at work whenever it is killed."""
    # A shell that runs the tests in the background has them ignore Ctrl-C, and their children with them.
    heed = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    script = f"{heed}; from kvframe.cli import main; main()"
    command = [sys.executable, "-c", script, "ablate", str(folder / "study.py")]
    return subprocess.Popen(
        [*command, "--results", str(folder / "results.sqlite"), "--workers", "2"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        env=os.environ | {"SECONDS_EACH": "0.8", "DEADLY_SEED": "3", "HELD_SEEDS": "7 8"},
    )  # fmt: skip


def wait_for(what: Callable[[], Any]) -> Any:
    """Wait until something is true."""
    until = time.monotonic() + SECONDS
    while not (found := what()):
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.02)
    return found


def committed(path: Path) -> dict[str, Outcome]:
    """What a results file has, also while it is being made."""
    return read_outcomes(path) if path.exists() else {}


def workers_of(driver: "subprocess.Popen[str]") -> list[int]:
    """Processes of the driver's session, itself left out."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == driver.pid and int(status.parent.name) != driver.pid and fields[0] != "Z":
            found.append(int(status.parent.name))
    return found


def test_a_driver_that_is_killed(model: Path, tmp_path: Path) -> None:
    """kill -9, then Ctrl-C, then to the end: no cell that was committed is lost or run again, one in flight is, no
    worker goes on for nobody, and the table is that of a run without a break. A cell that kills its worker fails, and
    takes no other with it."""
    seeds, path = 9, tmp_path / "results.sqlite"
    file = write_study(tmp_path, model, seeds=seeds)
    kept: dict[str, Outcome] = {}
    begun: Counter[int] = Counter()
    for end, code, at_least in ((signal.SIGKILL, -signal.SIGKILL, 2), (signal.SIGINT, 130, 5)):
        driver = start(tmp_path)

        def is_working(driver: "subprocess.Popen[str]" = driver, at_least: int = at_least) -> bool:
            done = committed(path)
            in_flight = set(runs_of(tmp_path)) - seeds_of(file, done)
            return driver.poll() is not None or (len(done) >= at_least and bool(in_flight - {3}))

        try:
            wait_for(is_working)
            assert driver.poll() is None, driver.communicate()
            driver.send_signal(end)
            output = driver.communicate(timeout=SECONDS)[0]
        finally:
            driver.kill()
            driver.wait()
        assert driver.returncode == code, output
        wait_for(lambda driver=driver: not workers_of(driver))

        before, begun = begun, runs_of(tmp_path)
        assert all(begun[seed] == before[seed] for seed in seeds_of(file, kept))
        now = committed(path)
        assert kept.items() <= now.items() and at_least <= len(now) < seeds
        kept = now
        in_flight = set(begun) - seeds_of(file, kept)
        assert in_flight

    found = run_study(file.study(), path, engine=make_engine("inline"))
    whole = run_study(file.study(), tmp_path / "whole.sqlite", engine=make_engine("inline"))

    assert kept.items() <= found.outcomes.items() and not found.missing()
    ran = runs_of(tmp_path)
    assert all(ran[seed] == begun[seed] + 1 for seed in seeds_of(file, kept))  # for the whole
    assert all(ran[seed] == begun[seed] + 2 for seed in in_flight)
    ((dead, outcome),) = found.failed()
    assert dead.seed == 3 and "the worker process died" in outcome.reason
    tables = [figures_of(each.outcomes) for each in (found, whole)]
    assert tables[0].pop(dead.key) != tables[1].pop(dead.key)
    assert tables[0] == tables[1] and len(tables[0]) == seeds - 1


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed; pip install 'kvframe[ray]'")
@pytest.mark.filterwarnings("ignore")
def test_a_node_that_is_killed(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two nodes, one of them killed while it works: what it had in flight is run again, and nothing is lost."""
    monkeypatch.setenv("SECONDS_EACH", "0.7")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    from ray.cluster_utils import Cluster

    seeds = 8
    file = write_study(tmp_path, model, seeds=seeds)
    # A dead node refuses connections at once, so that ten refusals make two seconds; a busy one has its usual time to
    # answer, ten times in a row.
    checks = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 200, "health_check_failure_threshold": 10}
    head = {"num_cpus": 1, "include_dashboard": False, "_system_config": checks}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    doomed = cluster.add_node(num_cpus=1)
    # Whoever runs a cell is a child of the node's own process.
    parent = str(doomed.all_processes["raylet"][0].process.pid)
    (tmp_path / "log.doomed").write_text(parent)
    log, killed = Log(), threading.Event()

    def kill() -> None:
        def works() -> bool:
            return (tmp_path / "log").exists() and parent in (tmp_path / "log").read_text().split()

        wait_for(works)
        cluster.remove_node(doomed, allow_graceful=False)
        killed.set()

    try:
        ray.init(address=cluster.address, log_to_driver=False)
        cluster.wait_for_nodes()
        engine = make_engine("ray", study_file=file)
        assert engine.workers == 2
        threading.Thread(target=kill, daemon=True).start()
        found = run_study(file.study(), tmp_path / "results.sqlite", engine=engine, observer=log)
    finally:
        ray.shutdown()
        cluster.shutdown()

    assert killed.is_set() and not found.failed() and not found.missing()
    assert Counter(kind for kind, _ in log.events) == {"started": seeds, "finished": seeds}
    assert sum(runs_of(tmp_path).values()) == seeds + 1  # what was in flight on the node was run again
    monkeypatch.delenv("SECONDS_EACH")
    whole = run_study(file.study(), tmp_path / "whole.sqlite", engine=make_engine("inline"))
    assert figures_of(found.outcomes) == figures_of(whole.outcomes)


def test_ray_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way out is said."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(kvframe.errors.ConfigError, match=r"pip install 'kvframe\[ray\]'"):
        make_engine("ray")


def test_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """One for each GPU; on a CPU as many as there are cores, up to four."""
    from kvframe.eval.engine import local

    assert os.sched_getaffinity(0)
    for cores, devices, asked, workers, threads in (
        (2, [], None, 2, 1),
        (16, [], None, 4, 4),
        (16, [], 2, 2, 8),
        (8, ["0", "1"], None, 2, 4),
        (2, [], 8, 8, 1),
    ):
        monkeypatch.setattr(local, "available_cores", lambda cores=cores: cores)
        monkeypatch.setattr(local, "visible_devices", lambda devices=devices: devices)
        engine = local.LocalEngine(asked)
        assert (engine.workers, engine._threads) == (workers, threads)
    with pytest.raises(kvframe.errors.ConfigError, match="at least one worker"):
        local.LocalEngine(0)
    with pytest.raises(kvframe.errors.UnknownNameError, match="no engine named 'rey'; did you mean 'ray'"):
        make_engine("rey")
