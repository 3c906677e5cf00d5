"""A decode step through torch.compile, and what is refused of capturing; CUDA graphs are tested on a device."""

import pytest
import torch
from torch import Tensor

import kvframe
from kvframe import Policy
from kvframe.errors import ConfigError
from kvframe.hf.compiled import compiled_step
from kvframe.testing.models import tiny_llama


@pytest.fixture
def policy() -> Policy:
    """LouisKV with a dense layer and a selection at about every second step."""
    return kvframe.policy(
        "louiskv", token_budget=16, sink_size=4, window_size=16, cluster_size=4, dense_layers=(0,), tau=0.5
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_step_is_the_same_step(policy: Policy) -> None:
    """One graph without a break; the cache goes through it as if it were not there."""
    model = tiny_llama(dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(3, 64, (2, 90), generator=generator)
    tokens = torch.randint(3, 64, (20, 2, 1), generator=generator)

    def decode(compiled: bool) -> tuple[Tensor, list[int]]:
        with torch.no_grad(), kvframe.attach(model, policy) as run:
            cache = run.new_cache(120)
            model(input_ids=prompt, past_key_values=cache)
            step = compiled_step(model, backend="aot_eager") if compiled else model
            logits = [
                step(input_ids=ids, position_ids=torch.full_like(ids, 90 + place), past_key_values=cache).logits
                for place, ids in enumerate(tokens)
            ]
            assert cache.get_seq_length() == 110
            return torch.cat(logits, 1), cache.attended_positions(1).tolist()

    expected, attended = decode(compiled=False)
    logits, attended_compiled = decode(compiled=True)

    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    assert attended == attended_compiled


@pytest.mark.parametrize(
    "options, words",
    [
        ({"capture": True}, "capture=True needs a model on a CUDA device, this one is on cpu"),
        ({"compile": True}, "compile=True compiles the step that is captured"),
    ],
)
def test_where_there_can_be_no_graph(policy: Policy, options: dict[str, bool], words: str) -> None:
    """Asked for on a CPU it is refused, with nothing changed; by default a CPU runs steps as always."""
    model = tiny_llama(dtype=torch.float32)
    with pytest.raises(ConfigError, match=words), kvframe.attach(model, policy, **options):
        pass
    with kvframe.attach(model, policy) as run:
        model.generate(torch.full((1, 30), 5), max_new_tokens=4, pad_token_id=0)
    report = run.report()

    assert "forward" not in vars(model)
    assert not report.captured and report.num_replayed == 0
