"""`with kvframe.attach(model, policy) as run:` — a stock model under a policy, and as it was afterwards."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from kvframe.errors import ConfigError
from kvframe.hf.attention import ATTENTION_NAME, forget_previous, remember_previous
from kvframe.hf.cache import RetrievalCache
from kvframe.hf.generate import read_call
from kvframe.hf.support import check_model
from kvframe.policy import Policy
from kvframe.registry import Registry
from kvframe.report import Report
from kvframe.types import Execution


class Run:
    """An attached model: makes caches and reports on them."""

    def __init__(self, model: PreTrainedModel, policy: Policy, execution: Execution, registry: Registry | None) -> None:
        self.model = model
        self.policy = policy
        self.execution: Execution = execution
        self._registry = registry
        self._cache: RetrievalCache | None = None

    def new_cache(self, max_length: int | None = None) -> RetrievalCache:
        """A fresh cache; pass it as `past_key_values` where several calls share one."""
        self._cache = RetrievalCache(
            self.model, self.policy, execution=self.execution, max_length=max_length, registry=self._registry
        )
        return self._cache

    @property
    def cache(self) -> RetrievalCache:
        """The cache of the last call, for the next turn of a chat. Raises ConfigError before the first."""
        if self._cache is None:
            raise ConfigError("nothing has been generated yet, so there is no cache; call model.generate first")
        return self._cache

    def report(self) -> Report:
        """What happened in the last cache, over all the calls that used it."""
        return self.cache.report()

    def generate(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        """`model.generate` with a cache of ours."""
        call = read_call(self.model, args, kwargs)
        arguments = dict(call.arguments)
        cache = arguments.pop("past_key_values", None)
        if cache is None:
            cache = self.new_cache(call.max_length)
        self._cache = cache
        # A cache_implementation, even one from the checkpoint's generation_config.json, would clash with the given cache.
        arguments["cache_implementation"] = None
        cache.prompt_end = call.prompt_end
        if call.max_length is not None:
            cache.max_length = max(cache.max_length or 0, call.max_length)
        cache.timeline.call_begins()
        try:
            result = original(**arguments, past_key_values=cache)
            cache.check_finite()
        except BaseException:
            # Whatever went wrong, memory running out included: nothing half-filled stays behind.
            cache.release()
            raise
        cache.prompt_end = None
        cache.timeline.call_ends()
        return result


@contextmanager
def attach(
    model: PreTrainedModel,
    policy: Policy,
    *,
    execution: Execution = "offload",
    registry: Registry | None = None,
) -> Iterator[Run]:
    """Put a model's full-attention layers under a policy for the length of a `with` block.

    `model.generate` then works as always: greedy, sampling, `num_return_sequences`, batches with left padding, chunked
    prefill, prompt-lookup and assisted decoding, several turns on `run.cache`. On leaving, also after an exception, the model is as
    it was.

    execution: "offload" is the real thing; "dense" keeps all KV on the device and attends under a mask; "shadow" lets full attention
        drive and only watches the policy.
    registry: plugins other than the installed ones.

    Raises UnsupportedModelError for a model that cannot be served and ConfigError for a policy that does not fit it, before
    anything is changed.
    """
    check_model(model)
    if not isinstance(policy, Policy):
        raise ConfigError(f"expected a Policy, got {policy!r}; make one with kvframe.policy(name)")
    if model.config._attn_implementation == ATTENTION_NAME and "generate" in vars(model):
        raise ConfigError("the model is attached already; leave that block first")
    run = Run(model, policy, execution, registry)
    run.new_cache()  # finds everything that does not fit, while nothing is changed
    run._cache = None
    before = _implementations(model)
    original, was_own = model.generate, "generate" in vars(model)

    @functools.wraps(original)
    def generate(*args: Any, **kwargs: Any) -> Any:
        return run.generate(original, *args, **kwargs)

    try:
        for config, implementation in before:
            remember_previous(config, implementation)
        model.get_decoder().set_attn_implementation(ATTENTION_NAME)
        model.generate = generate  # type: ignore[method-assign]
        yield run
    finally:
        if was_own:
            model.generate = original  # type: ignore[method-assign]
        else:
            vars(model).pop("generate", None)
        for config, implementation in before:
            config._attn_implementation_internal = implementation
            forget_previous(config)


def _implementations(model: nn.Module) -> list[tuple[Any, str]]:
    """Every config in the model, once, and the attention implementation it names."""
    configs: dict[int, Any] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation_internal"):
            configs.setdefault(id(config), config)
    return [(config, config._attn_implementation_internal) for config in configs.values()]
