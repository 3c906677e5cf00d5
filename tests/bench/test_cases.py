"""What `kvframe bench kernels` and `gather` run: every call is a call that the operation takes."""

import pytest
import torch

from kvframe.bench.case import Case, KernelSizes
from kvframe.bench.gather import GatherBenchmark, check_gather, draw_rows, gather_once
from kvframe.bench.kernel_cases import make_cases
from kvframe.bench.kernels import added_by_entries
from kvframe.bench.model import config_of, make_model, weight_bytes
from kvframe.errors import ConfigError
from kvframe_kernels.dispatch import KernelError

CPU = torch.device("cpu")
SIZES = KernelSizes(
    device=CPU, dtype=torch.float32, num_qo_heads=4, num_kv_heads=2, head_dim=16, context=512, token_budget=64,
    sink_size=4, window_size=16, max_segment=8, num_slots=32, attention_batches=(1, 2), prompts=(128, 300),
    block_size=128, num_iterations=2, spread=0,
)  # fmt: skip


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    """All cases, tiny."""
    return [case for make in make_cases(SIZES) for case in make()]


def test_every_operation_is_called(cases: list[Case]) -> None:
    """Each call runs, twice in turn, with the references on the CPU."""
    for case in cases:
        for call in case.calls * 2:
            call()

    assert {case.op for case in cases} >= {
        "query_turned", "append_token", "store_token", "window_mean", "unit_scores", "select_units",
        "exchange_resident", "gather_kv", "slot_attention", "unit_mean", "kmeans", "unattended_tokens",
        "sketch_scores", "select_runs", "window_sketch",
    }  # fmt: skip


def test_what_is_due_has_a_floor(cases: list[Case]) -> None:
    """Bytes where there is work, none where nothing is due."""
    for case in cases:
        assert (case.num_bytes > 0) == (case.state != "nothing due") or case.op.startswith("(bench)")


def test_what_entries_add() -> None:
    """Time and floor of a state less those of the same without entries; only where both were measured."""
    rows = [
        {"op": "slot_attention", "state": state, "microseconds": time, "floor_microseconds": floor}
        for state, time, floor in (
            ("batch 1, 9 slots", 7.0, 2.0), ("batch 1, 9 slots, 5 entries", 19.0, 10.0),
            ("batch 8, 9 slots", None, 3.0), ("batch 8, 9 slots, 5 entries", 50.0, 40.0),
        )
    ]  # fmt: skip

    assert added_by_entries(rows) == {"batch 1, 9 slots, 5 entries: added by entries / their floor": 1.5}


def test_exchange_misses_what_was_asked() -> None:
    """After the first round, each call misses the share that was asked for."""
    for make in make_cases(SIZES):
        for case in make():
            if case.op == "exchange_resident" and case.state == "due":
                for call in case.calls:
                    call()
                missing = [int((call() >= 0).sum()) for call in case.calls]  # type: ignore[operator]
                assert set(missing) == {SIZES.num_kv_heads * round(SIZES.miss * SIZES.token_budget)}
                return
    pytest.fail("there is no such case")


def test_gather_brings_what_was_drawn() -> None:
    """Units are whole and come once; a wrong row would be noticed."""
    benchmark = GatherBenchmark(pool_bytes=2**20, num_kv_heads=2, head_dim=16, tokens=(64,))
    pool = torch.randn(1, 2, benchmark.num_rows, 32, dtype=torch.bfloat16)
    rows = draw_rows(benchmark, 4, 64, seed=0)
    keys, values = gather_once(pool, rows, "reference", None)
    check_gather(pool, rows, keys, values)

    assert rows.shape == (1, 2, 64) and all(len(head.unique()) == 64 for head in rows[0])
    assert bool((rows.view(-1, 4)[:, 0] % 4 == 0).all()) and bool((rows.view(-1, 4).diff() == 1).all())
    with pytest.raises(KernelError, match="other rows"):
        check_gather(pool, rows.roll(1, -1), keys, values)


def test_pool_that_is_too_small() -> None:
    """It has to hold what is gathered."""
    with pytest.raises(ConfigError, match="rows for a KV head"):
        assert GatherBenchmark(pool_bytes=2**12).num_rows


def test_weights_that_a_step_reads() -> None:
    """All but the embeddings' table, unless it is the head as well."""
    model = make_model("tiny", CPU)
    table = model.get_input_embeddings().weight
    everything = sum(parameter.nbytes for parameter in model.parameters())

    assert weight_bytes(model) == everything - table.nbytes
    model.get_output_embeddings().weight = table
    assert weight_bytes(model) == sum(parameter.nbytes for parameter in model.parameters())


def test_llama_shape() -> None:
    """The shape that the figures are about."""
    config = config_of("llama-3.1-8b")

    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (32, 32, 8)
