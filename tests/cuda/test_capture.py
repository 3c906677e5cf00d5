"""Decode steps on a CUDA device: no host sync, and one CUDA graph a step that gives the same bits."""

from typing import Any

import pytest
import torch
from on_cuda import PROMPT, capturable_policies, generate, padded_prompt, small, tiny_model
from torch import Tensor
from transformers import LlamaForCausalLM

import kvframe
from kvframe import Policy
from kvframe.errors import NotAttachedError
from kvframe_louis import SemanticTrigger

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode"),
]

POLICIES = capturable_policies()


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    """A tiny random model in bfloat16."""
    return tiny_model(256).to("cuda", torch.bfloat16)


def decode(model: Any, policy: Policy, num_steps: int, **options: Any) -> tuple[Tensor, Any]:
    """Logits of forced steps after the padded prompt, and the report."""
    prompt = padded_prompt()
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(3, 256, (num_steps, 2, 1), generator=generator).cuda()
    padding = (prompt["attention_mask"] == 0).sum(1, keepdim=True)
    logits = []
    with torch.no_grad(), kvframe.attach(model, policy, **options) as run:
        cache = run.new_cache(PROMPT + num_steps)
        model(**prompt, past_key_values=cache)
        for step, ids in enumerate(tokens):
            positions = PROMPT + step - padding
            logits.append(model(input_ids=ids, position_ids=positions, past_key_values=cache).logits)
        report = cache.report()
    return torch.cat(logits, 1), report


@pytest.mark.parametrize("name", POLICIES)
def test_no_host_sync(model: LlamaForCausalLM, name: str) -> None:
    """Every decode step runs where waiting for the device is an error, captured or not, trigger fired or not."""
    prompt = padded_prompt()
    for capture in (False, True):
        with torch.no_grad(), kvframe.attach(model, small(name, 16), capture=capture) as run:
            cache = run.new_cache(PROMPT + 40)
            model(**prompt, past_key_values=cache)
            ids = prompt["input_ids"][:, -1:].clone()
            positions = torch.full_like(ids, PROMPT)
            for step in range(30):
                # Recording a graph waits for the device, once.
                records = capture and step == 1
                torch.cuda.set_sync_debug_mode("default" if records else "error")
                try:
                    model(input_ids=ids, position_ids=positions + step, past_key_values=cache)
                finally:
                    torch.cuda.set_sync_debug_mode("default")
            report = cache.report()
        assert report.captured == capture, report.capture_reason


@pytest.mark.parametrize("name", POLICIES)
def test_captured_equals_uncaptured(model: LlamaForCausalLM, name: str) -> None:
    """Bit for bit, over 512 steps."""
    policy = small(name, 16)
    expected, _ = decode(model, policy, 512, capture=False)
    logits, report = decode(model, policy, 512)

    assert report.num_replayed == 511
    assert torch.equal(logits, expected)


def test_a_guarded_trigger(model: LlamaForCausalLM) -> None:
    """The same with every option of LouisKV's trigger: whatever it remembers lives on the device."""
    options = {"heads": "kv-head", "max_age": 9, "anchor": 0.2, "hysteresis": 0.1, "ahead": True}
    policy = small("louiskv-plus", 16).swap(trigger=SemanticTrigger(tau=0.1, **options))
    expected, _ = decode(model, policy, 512, capture=False)
    logits, report = decode(model, policy, 512)

    assert report.num_replayed == 511
    assert torch.equal(logits, expected)


def test_fired_and_not(model: LlamaForCausalLM) -> None:
    """The steps that are compared above are of both kinds."""
    _, report = decode(model, kvframe.policy("louiskv", token_budget=16, sink_size=4, window_size=16, tau=0.1), 512)

    assert 0.02 < report.retrieval_rate < 0.98


def test_generate_replays(model: LlamaForCausalLM) -> None:
    """`generate` gives the tokens that it gives without capture; a second call, and a second turn, record anew."""
    policy = small("louiskv", 16)
    with kvframe.attach(model, policy, capture=False):
        expected, _ = generate(model)
    with kvframe.attach(model, policy) as run:
        tokens, _ = generate(model)
        assert run.report().num_replayed > 30
        again, _ = generate(model)
        assert run.report().num_replayed > 30
        cache = run.cache
        mask = torch.cat([padded_prompt()["attention_mask"], again.new_ones(2, 45)], 1)
        ids = torch.cat([again, again[:, :5]], 1)
        model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=20, min_new_tokens=20)
        assert run.report().num_replayed > 45

    assert torch.equal(tokens, expected) and torch.equal(again, expected)


def test_the_model_is_as_it_was(model: LlamaForCausalLM) -> None:
    """Afterwards `forward` is the model's own, and what stood in for it refuses to run."""
    with kvframe.attach(model, small("louiskv", 16)):
        inside = model.forward
    assert "forward" not in vars(model)
    with pytest.raises(NotAttachedError, match="block that is over"):
        inside(**padded_prompt())


def test_a_stage_that_cannot_be_captured(model: LlamaForCausalLM) -> None:
    """It runs uncaptured, and the report says why."""

    class Looking(kvframe.EveryStep):
        name = "looking"
        capturable = False

    _, report = decode(model, small("louiskv", 16).swap(trigger=Looking()), 8)

    assert not report.captured and "looking" in (report.capture_reason or "")


def test_a_stage_that_only_says_so(model: LlamaForCausalLM) -> None:
    """The first step shows it, all are taken as always, and the report says why."""

    class Reading(kvframe.EveryStep):
        name = "reading"

        def step(self, inputs: Any, state: Any) -> Any:
            bool(inputs.query.any())
            return super().step(inputs, state)

    policy = small("louiskv", 16)
    expected, _ = decode(model, policy.swap(trigger=kvframe.EveryStep()), 8, capture=False)
    logits, report = decode(model, policy.swap(trigger=Reading()), 8)

    assert not report.captured and "waits for the device (test_capture.py" in (report.capture_reason or "")
    assert torch.equal(logits, expected)


def test_a_recording_that_fails(model: LlamaForCausalLM) -> None:
    """The step is taken as always, the report says why, and random numbers can still be drawn."""

    class Failing(kvframe.EveryStep):
        name = "failing"

        def step(self, inputs: Any, state: Any) -> Any:
            if torch.cuda.is_current_stream_capturing():
                raise RuntimeError("not now")
            return super().step(inputs, state)

    policy = small("louiskv", 16)
    expected, _ = decode(model, policy.swap(trigger=kvframe.EveryStep()), 8, capture=False)
    logits, report = decode(model, policy.swap(trigger=Failing()), 8)

    assert not report.captured and "not now" in (report.capture_reason or "")
    assert torch.equal(logits, expected)
    torch.randn(3, device="cuda")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:TensorFloat32 tensor cores")
def test_compiled(model: LlamaForCausalLM) -> None:
    """With torch.compile the logits differ in rounding alone. Rounding can turn a selection, so everything is selected,
    and in float32."""
    exact = LlamaForCausalLM(model.config).cuda().eval()
    exact.load_state_dict(model.state_dict())
    policy = small("louiskv", 1000)
    expected, _ = decode(exact, policy, 64, capture=False)
    logits, report = decode(exact, policy, 64, compile=True)
    divergence = torch.nn.functional.kl_div(
        logits.float().log_softmax(-1), expected.float().log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)

    assert report.captured
    assert float(divergence.mean()) < 1e-3
