"""The same promises on a CUDA device: a pinned pool, and offload equal to dense and to the stock model."""

import pytest
import torch
from on_cuda import generate, small, tiny_model
from transformers import LlamaForCausalLM

import kvframe
from kvframe.errors import NonFiniteError
from kvframe.memory.pool import RowPool
from kvframe.memory.slots import SlotMemory
from kvframe.registry import default_registry
from kvframe.runtime import RetrievalLayer
from kvframe.testing.tape import Tape

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    """A tiny random model on the device."""
    return tiny_model(128).cuda()


@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 32}], ids=["one-shot", "chunked"])
def test_full_budget_equals_stock(model: LlamaForCausalLM, options: dict[str, int]) -> None:
    """A budget beyond the context gives the stock model's logits and tokens, with rows moved over the link."""
    tokens, logits = generate(model)

    with kvframe.attach(model, small("louiskv", 1000)) as run:
        our_tokens, our_logits = generate(model, **options)

    assert (tokens == our_tokens).all()
    torch.testing.assert_close(our_logits, logits, atol=1e-4, rtol=1e-4)
    assert run.report().bytes_to_device > 0


@pytest.mark.filterwarnings("ignore::kvframe_kernels.dispatch.FallbackWarning")  # no kernel serves float64
@pytest.mark.parametrize("name", [record.name for record in default_registry().policies()])
def test_offload_equals_dense(model: LlamaForCausalLM, name: str) -> None:
    """Every policy attends to the same positions and gives the same logits in both executions, in float64."""
    double = LlamaForCausalLM(model.config).to(device="cuda", dtype=torch.float64).eval()
    double.load_state_dict(model.state_dict())
    results = []
    for execution in ("offload", "dense"):
        with kvframe.attach(double, small(name, 16), execution=execution) as run:
            tokens, logits = generate(double)
        cache = run.cache
        attended = [cache.attended_positions(layer, row, 1).tolist() for layer in range(3) for row in range(2)]
        results.append((tokens, logits, attended))

    (tokens, logits, attended), (dense_tokens, dense_logits, dense_attended) = results
    assert attended == dense_attended
    assert (tokens == dense_tokens).all()
    torch.testing.assert_close(logits, dense_logits, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("name", [record.name for record in default_registry().policies()])
def test_offload_equals_dense_in_float32(model: LlamaForCausalLM, name: str) -> None:
    """Where `dense` takes the decisions that `offload` took, with every kernel of a step at work."""
    tape = Tape()
    policy = tape.wrap(small(name, 16))
    with kvframe.attach(model, policy, capture=False) as run:
        tokens, logits = generate(model)
    offload = [run.cache.attended_positions(layer, row, 1).tolist() for layer in range(3) for row in range(2)]
    tape.playing = True
    with kvframe.attach(model, policy, execution="dense") as run:
        dense_tokens, dense_logits = generate(model)
    dense = [run.cache.attended_positions(layer, row, 1).tolist() for layer in range(3) for row in range(2)]

    assert not tape.decisions and offload == dense
    assert (tokens == dense_tokens).all()
    torch.testing.assert_close(logits, dense_logits, atol=1e-4, rtol=1e-4)


def test_the_host_pool_is_pinned(model: LlamaForCausalLM) -> None:
    """KV of retrieval layers lies in page-locked host memory, and a deep copy keeps it so."""
    with kvframe.attach(model, small("louiskv", 16)) as run:
        generate(model)

    runtime = run.cache.managed_layers[0].runtime
    assert isinstance(runtime, RetrievalLayer) and isinstance(runtime.memory, SlotMemory)
    store = runtime.memory._store
    assert isinstance(store, RowPool)
    slabs = [slab for _, slab in store._slabs]
    assert all(slab.device.type == "cpu" and slab.is_pinned() for slab in slabs)


def test_not_a_number_is_reported_after_generation(model: LlamaForCausalLM) -> None:
    """On a device the check is a sticky word, read when generation ends."""
    broken = LlamaForCausalLM(model.config).cuda().eval()
    broken.load_state_dict(model.state_dict())
    with torch.no_grad():
        broken.model.layers[1].self_attn.k_proj.weight[0, 0] = torch.nan

    with kvframe.attach(broken, small("louiskv", 16)), pytest.raises(NonFiniteError, match="layer 1"):
        generate(broken)
