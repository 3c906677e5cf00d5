"""The planner: bytes against a layer that really holds them, and numbers that can be worked out by hand."""

import functools

import pytest
import torch
from attrs import evolve
from helpers import policy_records, record_id
from hypothesis import given
from hypothesis import strategies as st

import kvframe
from kvframe import Policy
from kvframe.errors import ConfigError, UnsupportedModelError
from kvframe.planner import Device, ModelShape, Plan, measure_device, plan, plan_memory, plan_speed
from kvframe.planner.units import UnitCount
from kvframe.registry import PolicyRecord
from kvframe.runtime import RetrievalLayer, host_bytes_needed
from kvframe.stages import EveryStep, FixedStride, KeepOnDevice, MeanKey, Never, Once, PageUnits, TopBudget
from kvframe.testing.cases import make_text
from kvframe.testing.small import small_policy

GIB = 2**30
LLAMA = ModelShape(
    num_layers=32,
    retrieval_layers=tuple(range(32)),
    hidden_size=4096,
    intermediate_size=14336,
    num_qo_heads=32,
    num_kv_heads=8,
    head_dim=128,
    value_dim=128,
    vocab_size=128256,
    dtype=torch.bfloat16,
    num_parameters=8_030_261_248,
)
SMALL = ModelShape(
    num_layers=4,
    retrieval_layers=(0, 1, 3),
    hidden_size=64,
    intermediate_size=128,
    num_qo_heads=4,
    num_kv_heads=2,
    head_dim=8,
    value_dim=16,
    vocab_size=100,
    dtype=torch.float32,
    num_parameters=100_000,
)
CARD = Device(gpu_memory=24 * GIB)


def page_policy(**changes: object) -> Policy:
    """Pages, selected at every step."""
    stages = {
        "trigger": EveryStep(),
        "units": PageUnits(page_size=4),
        "scorer": MeanKey(),
        "selector": TopBudget(token_budget=32),
        "transfer": kvframe.policy("louiskv").transfer,
    }
    return Policy(**{**stages, "sink_size": 4, "window_size": 16, **changes})


# ---- memory ---------------------------------------------------------------------------------------------------------


def test_llama_of_8b():
    """A GPU of 24 GiB holds 128K tokens under LouisKV, and not with a full cache."""
    found = plan(LLAMA, kvframe.policy("louiskv"), CARD, context=131072)

    assert LLAMA.kv_bytes(131072) == 16 * GIB
    assert LLAMA.weight_bytes == 16_060_522_496
    assert found.fits and not found.full_cache_fits
    assert found.reason == "" and found.advice == () and found.missing_bytes == 0
    assert found.full_cache.dense_kv == LLAMA.kv_bytes(131072 + 512)
    assert found.full_cache.host_bytes == 0
    # Two dense layers of 32 keep theirs on the GPU.
    assert found.memory.dense_kv == 2 * LLAMA.layer_kv_bytes(131584)
    assert found.memory.pool_on_host == 30 * LLAMA.layer_kv_bytes(131584)


def run_layer(policy: Policy, *, context: int, max_new_tokens: int, chunk: int, batch_size: int = 1) -> RetrievalLayer:
    """A layer of the small model that has read a prompt in chunks and made a step."""
    layout = SMALL.layout(batch_size)
    layer = RetrievalLayer(layout, policy, context + max_new_tokens, "offload")
    text = make_text(evolve(layout, dtype=torch.float64), context, 0)
    query, keys, values = (tensor.to(SMALL.dtype) for tensor in (text.query, text.keys, text.values))
    for start in range(0, context, chunk):
        own = slice(start, min(start + chunk, context))
        num = own.stop - start
        layer.prompt(query[:, :, own], keys[:, :, own], values[:, :, own], [num] * batch_size, num)
    layer.decode(query[:, :, :1], keys[:, :, :1], values[:, :, :1])
    return layer


@pytest.mark.parametrize("chunk", [2000, 512])
def test_index_is_that_of_a_layer(chunk: int):
    """Within 2 %, and never less."""
    policy = page_policy()
    layer = run_layer(policy, context=2000, max_new_tokens=100, chunk=chunk)
    found = plan_memory(SMALL, policy, context=2000, max_new_tokens=100, batch_size=1, chunk=chunk)

    assert layer.index_bytes() <= found.index / 3 <= 1.02 * layer.index_bytes()


def test_bytes_are_those_of_a_layer():
    """Slots and host memory, to the byte."""
    policy = page_policy()
    layer = run_layer(policy, context=600, max_new_tokens=100, chunk=600, batch_size=2)
    found = plan_memory(SMALL, policy, context=600, max_new_tokens=100, batch_size=2, chunk=600)

    assert found.slots == 3 * layer.device_bytes()
    assert found.pool_on_host == 3 * layer.host_bytes()
    assert found.positions_on_host == 3 * 4 * 700 * 2 * layer.layout.num_kv_heads
    assert found.host_bytes == 3 * host_bytes_needed(layer.layout, policy, 700)


def runs_alone(policy: Policy) -> bool:
    """Whether a layer needs neither token ids nor what other layers publish."""
    return not policy.needs_token_ids and not policy.scorer.sources


# LouisKV's published settings differ in sizes alone, which small policies have in common.
DISTINCT = [
    record for record in policy_records() if not record.name.startswith("louiskv-") and runs_alone(small_policy(record))
]


@pytest.mark.parametrize("chunk", [600, 100])
@pytest.mark.parametrize("record", DISTINCT, ids=record_id)
def test_no_layer_takes_more(record: PolicyRecord, chunk: int):
    """Whatever the policy: slots are exact, and the index never takes more than was planned. A transfer that drops has
    let go of the prompt by then, which was planned for."""
    policy = small_policy(record).swap(dense_layers=())
    layer = run_layer(policy, context=600, max_new_tokens=50, chunk=chunk)
    found = plan_memory(SMALL, policy, context=600, max_new_tokens=50, batch_size=1, chunk=chunk)

    if policy.transfer.drops:
        assert found.slots < 3 * layer.device_bytes() < found.slots + found.pool_on_gpu
    else:
        assert found.slots + found.pool_on_gpu == 3 * layer.device_bytes()
    assert 3 * layer.index_bytes() <= found.index
    assert found.pool_on_host == 3 * layer.host_bytes()


def test_keep_on_device():
    """A transfer without a host pool keeps everything on the GPU, and pins nothing."""
    policy = page_policy(transfer=KeepOnDevice(), dense_layers=(0,))
    layer = run_layer(policy, context=200, max_new_tokens=10, chunk=200, batch_size=2)
    found = plan_memory(SMALL, policy, context=200, max_new_tokens=10, batch_size=2, chunk=200)

    assert found.pool_on_gpu + found.slots == 2 * layer.device_bytes()
    assert found.dense_kv == SMALL.layer_kv_bytes(210, 2)
    assert found.pool_on_host == 0


def test_only_dense_layers():
    """Nothing is staged, indexed or pinned where nothing is retrieved."""
    found = plan_memory(SMALL, kvframe.policy("full"), context=200, max_new_tokens=10, batch_size=1, chunk=64)

    assert found.dense_kv == SMALL.kv_bytes(210)
    assert (found.slots, found.index, found.staging, found.host_bytes) == (0, 0, 0, 0)
    assert found.gpu_bytes == sum(found.gpu_items.values()) > found.dense_kv + SMALL.weight_bytes


def test_chunked_prompts_bring_their_past_back():
    """Three buffers of a chunk's KV of one sequence; two of a whole text's where a chunk has something before it."""
    whole, chunked = (
        plan_memory(LLAMA, page_policy(), context=8192, max_new_tokens=1, batch_size=3, chunk=chunk)
        for chunk in (8192, 2048)
    )

    assert whole.staging == 3 * LLAMA.layer_kv_bytes(8192)
    assert chunked.staging == 3 * LLAMA.layer_kv_bytes(2048) + 2 * LLAMA.layer_kv_bytes(8193)
    assert chunked.activations * 4 == whole.activations


@functools.cache
def counted(record: PolicyRecord) -> tuple[Policy, UnitCount]:
    """A policy with the count of its units, which takes longer than all the rest of a plan."""
    return record.make(), UnitCount(record.make())


@given(
    record=st.sampled_from(policy_records()),
    sizes=st.fixed_dictionaries(
        {"context": st.integers(1, 5000), "max_new_tokens": st.integers(1, 600), "batch_size": st.integers(1, 3)}
    ),
    name=st.sampled_from(["context", "max_new_tokens", "batch_size"]),
    more=st.integers(1, 5000),
    chunk=st.sampled_from([64, 1024, 10000]),
)
def test_more_never_needs_less(record: PolicyRecord, sizes: dict[str, int], name: str, more: int, chunk: int):
    """A longer context, a longer output or a larger batch never takes less memory, of either kind, nor less time."""
    policy, units = counted(record)
    memory, speed = [], []
    for request in (sizes, sizes | {name: sizes[name] + more}):
        request |= {"chunk": min(chunk, request["context"])}
        memory.append(plan_memory(SMALL, policy, units=units, **request))
        speed.append(plan_speed(SMALL, policy, CARD, memory[-1], **request))

    assert memory[0].gpu_bytes <= memory[1].gpu_bytes
    assert memory[0].host_bytes <= memory[1].host_bytes
    assert speed[0].time_to_first_token <= speed[1].time_to_first_token * (1 + 1e-9)


# ---- the plan -------------------------------------------------------------------------------------------------------


def plan_llama(memory: float, **changes: object) -> Plan:
    """128K tokens of an 8B model on a GPU of some GiB."""
    device = Device(gpu_memory=int(memory * GIB))
    return plan(LLAMA, kvframe.policy("louiskv"), device, **{"context": 131072, **changes})


def test_the_largest_chunk_that_fits():
    """More memory never gives a smaller chunk, and the next larger one would not have fitted."""
    chunks = []
    for memory in (19, 20, 21, 22, 24, 40, 80):
        found = plan_llama(memory)
        chunks.append(found.chunk)
        if found.chunk < 131072:
            larger = 131072 if found.chunk == 32768 else 2 * found.chunk
            assert not plan_llama(memory, chunk=larger).fits

    assert chunks == sorted(chunks) and chunks[-1] == 131072
    assert {*chunks[:-1]} <= {2**power for power in range(10, 16)} | {131072}
    assert plan_llama(80, context=700).chunk == 700


def test_a_chunk_of_ones_own():
    """It is taken as it is, and never beyond the prompt."""
    assert plan_llama(24, chunk=3000).chunk == 3000
    assert plan_llama(24, context=1000, chunk=3000).chunk == 1000


def test_what_would_help():
    """A plan that does not fit says by how much, and what could be changed."""
    found = plan_llama(24, batch_size=8)

    assert not found.fits and found.chunk == 1024
    assert found.missing_bytes == found.memory.gpu_bytes - 24 * GIB
    assert found.reason.startswith(f"needs {found.missing_bytes / GIB:.1f} GiB more on the GPU")
    assert {"a smaller batch", "fewer dense layers", "a shorter context"} <= {*found.advice}
    assert not any("chunks" in advice for advice in found.advice)
    assert any("chunks" in advice for advice in plan_llama(20, chunk=32768).advice)


def test_weights_alone_may_be_too_much():
    """Then nothing about the context is suggested."""
    assert plan_llama(12).advice == ("a smaller model or a narrower dtype",)


def test_keeping_all_on_the_device_is_named():
    """A transfer to the host is what helps first."""
    policy = kvframe.policy("louiskv").swap(transfer=KeepOnDevice())

    assert plan(LLAMA, policy, CARD, context=131072).advice[0] == "a transfer that keeps KV on the host"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"context": 0}, "context must be a whole number >= 1, got 0"),
        ({"context": 1.5}, "context"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"batch_size": True}, "batch_size"),
        ({"chunk": 0}, "chunk"),
        ({"retrieval_rate": 1.1}, "retrieval_rate must lie between 0 and 1"),
    ],
)
def test_requests_that_are_none(changes: dict[str, object], message: str):
    """Each is refused by its name."""
    with pytest.raises(ConfigError, match=message):
        plan_llama(24, **changes)


def test_other_numbers_that_are_none():
    """So are devices, shapes and policies."""
    with pytest.raises(ConfigError, match="dense_layers names layer 40, the model has layers 0 to 31"):
        plan(LLAMA, kvframe.policy("louiskv", dense_layers=(40,)), CARD, context=10)
    with pytest.raises(ConfigError, match="gpu_memory"):
        Device(gpu_memory=0)
    with pytest.raises(ConfigError, match=r"Device.link_bandwidth must be a number > 0"):
        Device(gpu_memory=1, link_bandwidth=0.0)
    with pytest.raises(ConfigError, match="retrieval_layers names layer 4"):
        evolve(SMALL, retrieval_layers=(0, 4))
    with pytest.raises(ConfigError, match="hidden_size"):
        evolve(SMALL, hidden_size=0)


# ---- speed ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "trigger, rate", [(EveryStep(), 1.0), (FixedStride(stride=8), 0.125), (Once(), 0.0), (Never(), 0.0)]
)
def test_rates_that_follow_from_the_trigger(trigger: kvframe.Trigger, rate: float):
    """They do not depend on what is assumed of others."""
    found = plan(LLAMA, page_policy(trigger=trigger), CARD, context=4096, retrieval_rate=0.5)

    assert found.speed.retrieval_rate == rate


def test_rates_that_depend_on_data():
    """LouisKV's is what the caller says; retrieving more often is slower."""
    rare, often = (plan_llama(24, retrieval_rate=rate).speed for rate in (0.01, 0.5))

    assert (rare.retrieval_rate, often.retrieval_rate) == (0.01, 0.5)
    assert often.step_retrieval == pytest.approx(50 * rare.step_retrieval)
    assert often.tokens_per_second < rare.tokens_per_second
    assert rare.time_to_first_token == often.time_to_first_token


def test_a_step_by_hand():
    """The sum of its parts, from the formulas."""
    speed = plan(LLAMA, page_policy(), CARD, context=8192, max_new_tokens=2).speed
    recalled = 32 * 0.3 * 32 * 8 * 512 / (0.9 * 55e9)
    index = plan_memory(LLAMA, page_policy(), context=8192, max_new_tokens=2, batch_size=1, chunk=8192).index

    assert speed.step_weights == pytest.approx(1.35 * 16_060_522_496 / 4.3e12)
    assert speed.step_layers == pytest.approx(32 * 25e-6)
    assert speed.step_retrieval == pytest.approx(recalled + index / 4.3e12)
    assert 1 / speed.tokens_per_second == pytest.approx(speed.step)


def test_a_prompt_by_hand():
    """Weights twice for every token, and attention over half of all pairs; the link hides behind it where it can."""
    whole = plan(LLAMA, page_policy(), Device(gpu_memory=200 * GIB), context=8192).speed
    flops = 2 * 8_030_261_248 * 8192 + 4 * 128 * 32 * 32 * 8192**2 / 2
    slow = Device(gpu_memory=200 * GIB, link_bandwidth=1e9)
    chunked = plan(LLAMA, page_policy(), slow, context=8192, chunk=4096).speed

    assert whole.prefill_compute == pytest.approx(flops / (7e14 * 0.55))
    assert whole.prefill_waiting == 0
    assert chunked.prefill_compute == pytest.approx(whole.prefill_compute)
    # Each chunk sends or fetches 4096 tokens of 32 layers.
    assert chunked.time_to_first_token == pytest.approx(2 * LLAMA.kv_bytes(4096) / 1e9)


def test_nothing_crosses_the_link_on_the_device():
    """A slow link does not matter to a policy that keeps everything on the GPU."""
    fast, slow = Device(gpu_memory=200 * GIB), Device(gpu_memory=200 * GIB, link_bandwidth=1.0)
    policy = page_policy(transfer=KeepOnDevice())

    assert plan(LLAMA, policy, fast, context=4096).speed == plan(LLAMA, policy, slow, context=4096).speed


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_measuring_needs_a_device():
    """The error says what to do instead."""
    with pytest.raises(ConfigError, match="there is no CUDA device to measure"):
        measure_device()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_measuring_a_device():
    """Speeds that a GPU can have, and the memory that was asked for or is free."""
    found, given = measure_device(), measure_device(5)

    assert 1e10 < found.memory_bandwidth < 1e14
    assert 1e8 < found.link_bandwidth < found.memory_bandwidth
    assert 1e11 < found.matmul_flops < 1e17
    assert 0 < found.gpu_memory <= torch.cuda.get_device_properties(0).total_memory
    assert given.gpu_memory == 5


# ---- shapes from configs --------------------------------------------------------------------------------------------


def test_named_shapes():
    """The configs that are written out give the models' known numbers."""
    from kvframe.hf.shape import model_shape
    from kvframe.hf.shapes import named_config

    assert model_shape(named_config("llama-3.1-8b"), torch.bfloat16) == LLAMA
    qwen = model_shape(named_config("qwen3-8b"), torch.bfloat16)
    assert (qwen.num_layers, qwen.num_kv_heads, qwen.head_dim) == (36, 8, 128)
    assert qwen.num_parameters == 8_190_735_360
    with pytest.raises(ConfigError, match=r"did you mean 'qwen3-8b'\?"):
        named_config("qwen3_8b")


def test_shapes_of_other_families():
    """KV heads are those of the keys, and only layers with a full cache are planned for."""
    from transformers import Gemma3TextConfig, GPT2Config, MixtralConfig

    from kvframe.hf.shape import model_shape

    # Its config does not say how many KV heads there are.
    gpt2 = model_shape(GPT2Config(n_layer=2), torch.float32)
    assert (gpt2.num_kv_heads, gpt2.num_qo_heads, gpt2.head_dim) == (12, 12, 64)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    gemma = Gemma3TextConfig(**sizes, head_dim=16, num_hidden_layers=6, vocab_size=50)
    assert model_shape(gemma, torch.bfloat16).retrieval_layers == (5,)
    mixtral = model_shape(MixtralConfig(**sizes, num_hidden_layers=2, vocab_size=50), torch.float32)
    assert (mixtral.num_kv_heads, mixtral.head_dim, mixtral.intermediate_size) == (2, 8, 64)


def test_models_that_are_not_served():
    """They are refused as `attach` refuses them, and configs of no language model as well."""
    from transformers import DeepseekV3Config, ViTConfig

    from kvframe.hf.shape import model_shape

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 50}
    with pytest.raises(UnsupportedModelError, match="latent"):
        model_shape(DeepseekV3Config(**sizes, num_attention_heads=4, num_key_value_heads=4), torch.float32)
    with pytest.raises(ConfigError, match="cannot build a causal language model from a ViTConfig"):
        model_shape(ViTConfig(), torch.float32)
