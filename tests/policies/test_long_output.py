"""Long output, and output that nobody planned for: the device holds what it held at the start, and nothing is lost."""

from types import ModuleType
from typing import Any

import pytest
import torch

import kvframe
from kvframe import Policy, RetrievalCache, hookimpl
from kvframe.dense_layer import DenseLayer
from kvframe.hf import ATTENTION_NAME
from kvframe.plugins import create_plugin_manager
from kvframe.registry import Registry
from kvframe.report import Report
from kvframe.runtime import RetrievalLayer
from kvframe.testing.cases import Case, Turn, attended, make_call, unit_positions
from kvframe.testing.models import tiny_llama

NUM_PROMPT = 48


def small_louiskv(**options: Any) -> Policy:
    """LouisKV that retrieves, cuts and drops from the window all the time."""
    sizes = {"token_budget": 48, "sink_size": 4, "window_size": 32, "cluster_size": 8, "tau": 0.5}
    return kvframe.policy("louiskv", **{**sizes, "dense_layers": (), **options})


def prompt(batch_size: int = 1) -> torch.Tensor:
    """Random ids."""
    return torch.randint(3, 64, (batch_size, NUM_PROMPT), generator=torch.Generator().manual_seed(0))


def lost(layer: RetrievalLayer, batch: int, head: int) -> set[int]:
    """Positions that are neither attended nor in a unit of the index."""
    units = unit_positions(layer, batch, head, int(layer.ledger.num_units[batch, head]))
    seen = layer.attended_positions(batch, head).tolist()
    return set(range(layer.ledger.lengths[batch])) - {position for unit in units for position in unit} - set(seen)


class Observer:
    """What the layers hold on the device after every forward pass; now and then, whether anything is lost."""

    def __init__(self) -> None:
        self.device_bytes: list[tuple[int, ...]] = []

    def after_step(self, stats: Any) -> None:
        """Look at the cache."""
        runtimes = [layer.runtime for layer in stats.managed_layers]
        self.device_bytes.append(tuple(runtime.device_bytes() for runtime in runtimes))
        if len(self.device_bytes) % 500 == 2:
            for runtime in runtimes:
                assert not lost(runtime, 0, 0) and not lost(runtime, 0, 1)

    def registry(self) -> Registry:
        """The installed plugins and this observer."""
        module = ModuleType("observer")
        vars(module).update(KVFRAME_API_VERSION=1, kvframe_step_finished=hookimpl(lambda stats: self.after_step(stats)))
        return Registry(create_plugin_manager([module]))


@torch.no_grad()
def generate(policy: Policy, num_tokens: int, registry: Registry | None = None) -> tuple[torch.Tensor, Report]:
    """Greedy output of a tiny model, and the report."""
    model = tiny_llama(dtype=torch.float32)
    with kvframe.attach(model, policy, registry=registry) as run:
        ids = model.generate(
            prompt(), max_new_tokens=num_tokens, min_new_tokens=num_tokens, do_sample=False, pad_token_id=0
        )
    return ids, run.report()


@pytest.mark.slow
def test_four_thousand_tokens():
    """Without dense layers device KV is, from the prompt to the last token, what was allocated at first."""
    observer = Observer()
    ids, report = generate(small_louiskv(), 4000, observer.registry())
    layers = report.layers

    assert ids.shape == (1, NUM_PROMPT + 4000) and len(observer.device_bytes) >= 3999
    assert set(observer.device_bytes) == {observer.device_bytes[0]}
    assert report.device_kv_bytes == sum(observer.device_bytes[0])
    slots = 4 + 48 + 32 + 16
    per_slot = 2 * (2 * 8 * 4 + 4)  # both KV heads: K, V and the bias
    assert all(size == slots * per_slot + 2 * 48 * 8 for size in observer.device_bytes[0])
    assert all(0 < layer.retrieval_rate < 1 and layer.rows_recalled > 0 for layer in layers)
    assert report.attended_sinks == 4 and report.attended_retrieved <= 48


@pytest.mark.parametrize("dense_layers", [(), (0,), (0, 1)])
def test_device_memory_grows_by_the_dense_layers(dense_layers: tuple[int, ...]):
    """Of two runs the longer one holds more on the device by what its dense layers store, and by nothing else."""
    policy = small_louiskv(dense_layers=dense_layers)
    sizes = {num_tokens: generate(policy, num_tokens)[1].device_kv_bytes for num_tokens in (20, 150)}

    assert sizes[150] - sizes[20] == len(dense_layers) * 130 * 2 * 2 * 8 * 4


@torch.no_grad()
def test_a_cache_that_was_not_told_its_length():
    """Output beyond the rows that were planned for: nothing is lost, and the slots are the same tensors."""
    model = tiny_llama(dtype=torch.float32, attention=ATTENTION_NAME)
    cache = RetrievalCache(model, small_louiskv())
    ids = torch.randint(3, 64, (2, 1000), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :100] = 0
    first = model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=2, pad_token_id=0)
    runtimes = [layer.runtime for layer in cache.managed_layers]
    before = [(runtime.memory.slots.keys.data_ptr(), runtime.device_bytes(), runtime.capacity) for runtime in runtimes]
    mask = torch.cat([mask, torch.ones(2, 2, dtype=mask.dtype)], 1)
    model.generate(
        first, attention_mask=mask, past_key_values=cache, min_new_tokens=60, max_new_tokens=60, pad_token_id=0
    )

    for runtime, (address, size, capacity) in zip(runtimes, before):
        assert runtime.capacity > capacity == 1024
        assert (runtime.memory.slots.keys.data_ptr(), runtime.device_bytes()) == (address, size)
        assert runtime.ledger.lengths == [1061, 961]
        assert not any(lost(runtime, batch, head) for batch in range(2) for head in range(2))


@pytest.mark.parametrize("execution", ["dense", "offload"])
def test_a_layer_grows_many_times(execution: str, monkeypatch: pytest.MonkeyPatch):
    """However often a layer outgrows its plan, it does what a layer of the full size does."""
    monkeypatch.setattr("kvframe.runtime.layer._SLAB_ROWS", 3)
    turns = (Turn(chunks=(9, 4), num_steps=30), Turn(chunks=(6,), num_steps=20))
    policy = small_louiskv(token_budget=16, window_size=6)
    planned, grown = Case(turns=turns), Case(turns=turns, capacity=1)
    text = planned.text(planned.layout())
    full, small = planned.layer(policy, execution), grown.layer(policy, execution)
    slots = small.device_bytes()
    for call in planned.calls():
        expected, out = (make_call(layer, text, planned, call) for layer in (full, small))
        torch.testing.assert_close(out, expected, atol=1e-12, rtol=1e-12)
        if not call.is_prompt:
            assert attended(small) == attended(full)

    assert small.capacity > 60
    assert execution == "dense" or small.device_bytes() == slots


def test_dense_layers_are_dense():
    """A layer the policy calls dense keeps everything on the device; the others do not."""
    model = tiny_llama(dtype=torch.float32)
    with torch.no_grad(), kvframe.attach(model, small_louiskv(dense_layers=(1,))) as run:
        model.generate(prompt(), max_new_tokens=3, do_sample=False, pad_token_id=0)
        kinds = [type(layer.runtime) for layer in run.cache.managed_layers]

    assert kinds == [RetrievalLayer, DenseLayer]
