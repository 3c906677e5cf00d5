"""On leaving `attach` the model is as it was, however the block is left."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hf.tiny import generate, implementations, louiskv, make_config, make_model, make_prompt, tiny_llava
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

import kvframe
from kvframe.errors import ConfigError, NotAttachedError, SlotError
from kvframe.hf import ATTENTION_NAME, attention


class Stop(Exception):
    """Raised by a test in the middle of something."""


def state(model: PreTrainedModel) -> dict[str, Any]:
    """Whatever attaching could leave behind."""
    return {
        "implementations": implementations(model),
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "hooks": [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
        "configs": model.config.to_dict(),
        "generation": model.generation_config.to_dict(),
        "remembered": dict(attention._before),
        "functions": dict(AttentionInterface._global_mapping),
        "masks": dict(AttentionMaskInterface._global_mapping),
    }


def finish(model: Any) -> None:
    """Leave the block at its end, after use."""
    with kvframe.attach(model, louiskv()):
        generate(model)


def leave_unused(model: Any) -> None:
    """Leave the block at once."""
    with kvframe.attach(model, louiskv()):
        pass


def raise_in_the_block(model: Any) -> None:
    """Leave the block by an exception between two calls."""
    with kvframe.attach(model, louiskv()):
        generate(model)
        raise Stop


def raise_in_generate(model: Any) -> None:
    """Leave the block by an exception in the middle of generation."""

    def stop(ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        if ids.shape[1] > 45:
            raise Stop
        return torch.zeros(ids.shape[0], dtype=torch.bool)

    with kvframe.attach(model, louiskv()):
        generate(model, stopping_criteria=[stop])


def raise_in_a_layer(model: Any) -> None:
    """Leave the block by an exception in the middle of a forward pass."""

    def stop(module: Any, args: Any) -> None:
        raise Stop

    with kvframe.attach(model, louiskv()):
        layers = model.get_decoder().layers
        hook = layers[1].register_forward_pre_hook(stop)
        try:
            generate(model)
        finally:
            hook.remove()


def interrupt(model: Any) -> None:
    """Leave the block by Ctrl-C."""
    with kvframe.attach(model, louiskv()):
        raise KeyboardInterrupt


def attach_twice(model: Any) -> None:
    """Fail to attach inside the block."""
    with kvframe.attach(model, louiskv()), kvframe.attach(model, louiskv()):
        raise AssertionError("attached twice")


def attach_in_vain(model: Any) -> None:
    """Fail to attach."""
    with kvframe.attach(model, louiskv(dense_layers=(99,))):
        raise AssertionError("attached with a layer that there is not")


WAYS = [
    (finish, None),
    (leave_unused, None),
    (raise_in_the_block, Stop),
    (raise_in_generate, Stop),
    (raise_in_a_layer, Stop),
    (interrupt, KeyboardInterrupt),
    (attach_twice, ConfigError),
    (attach_in_vain, ConfigError),
]
MODELS: dict[str, Callable[[], Any]] = {
    "sdpa": lambda: make_model("Llama"),
    "eager": lambda: make_model("Llama", attention="eager"),
    "by-name": lambda: make_model("Llama", attention=ATTENTION_NAME),
    "hybrid": lambda: make_model("Gemma3"),
    "vision": tiny_llava,
}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
@pytest.mark.parametrize("leave, error", WAYS, ids=lambda value: getattr(value, "__name__", None))
def test_as_it_was(make: Callable[[], Any], leave: Callable[[Any], None], error: type[BaseException] | None) -> None:
    """Configs, attributes, hooks and registered functions; and plain generate, bit for bit."""
    model = make()
    answer, before = generate(model), state(model)
    if error is None:
        leave(model)
    else:
        with pytest.raises(error):
            leave(model)

    assert state(model) == before
    assert "generate" not in vars(model)
    assert torch.equal(generate(model).logits, answer.logits)


def test_a_config_inside_a_config(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of the decoder's config that has no module of its own is switched with it, and back."""
    model, part = make_model("Llama"), make_config("Llama", attn_implementation="eager")
    model.config.part, part.part = part, None
    monkeypatch.setattr(type(model.config), "sub_configs", {"part": type(part)})
    names = []
    with kvframe.attach(model, louiskv()):
        names.append(model.config.part._attn_implementation)

    assert [*names, model.config.part._attn_implementation] == [ATTENTION_NAME, "eager"]


def test_a_generate_of_ones_own() -> None:
    """An instance's own `generate` is called, and stays."""
    model, calls = make_model("Llama"), []
    original = model.generate

    def own(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        return original(*args, **kwargs)

    model.generate = own
    with kvframe.attach(model, louiskv()) as run:
        generate(model)

    assert model.generate is own
    assert [call["past_key_values"] for call in calls] == [run.cache]


def test_a_second_attach_leaves_the_first() -> None:
    """Refused, whether on the model itself or on one that shares its config; the first goes on."""
    config = make_config("Llama", attn_implementation="sdpa")
    first, second = (type(make_model("Llama"))(config).eval() for _ in range(2))
    expected = generate(second).logits
    with kvframe.attach(first, louiskv()) as run:
        for model in (first, second):
            with (
                pytest.raises(ConfigError, match="attached already; leave that block first"),
                kvframe.attach(model, louiskv()),
            ):
                pass
        generate(first)
        # The config says "kvframe" to the other model as well, which delegates.
        assert torch.equal(generate(second).logits, expected)

    assert run.report().rows_recalled > 0


def test_one_after_the_other() -> None:
    """A model can be attached again, to another policy."""
    model = make_model("Llama")
    for name in ("full", "window", "louiskv"):
        with kvframe.attach(model, kvframe.policy(name)) as run:
            generate(model)
        assert run.report().policy["name"] == name


def test_the_report_outlives_the_block() -> None:
    """And so does the cache, which the model then no longer takes."""
    model = make_model("Llama")
    with kvframe.attach(model, louiskv()) as run:
        first = generate(model)
    length = run.cache.get_seq_length()
    assert run.report().num_decode_steps > 0

    ids = torch.cat([first.tokens, make_prompt(num_tokens=2, padding=0).input_ids], 1)
    with pytest.raises(NotAttachedError):
        model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=run.cache, max_new_tokens=2)
    assert run.cache.get_seq_length() == length


def test_nothing_happens_before_the_checks() -> None:
    """A policy that cannot be made is an error before there is anything to attach to."""
    model = make_model("Llama")
    with pytest.raises(SlotError), kvframe.attach(model, louiskv().swap(trigger=louiskv().scorer)):
        pass

    assert implementations(model) == ["sdpa", "sdpa"]
