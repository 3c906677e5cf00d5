"""`with kvframe.attach(model, policy) as run:` — a stock model under a policy, and as it was afterwards."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel

from kvframe.composition import Policy
from kvframe.errors import ConfigError, UnsupportedCallError
from kvframe.hf.attention import forget, is_remembered, remember
from kvframe.hf.cache import RetrievalCache
from kvframe.hf.capture import CapturedSteps
from kvframe.hf.compiled import compiled_step
from kvframe.hf.generate import read_call
from kvframe.hf.support import ATTENTION_NAME, decoder_config, decoder_of
from kvframe.registry import Registry
from kvframe.report import Report
from kvframe.types import Execution


class Run:
    """An attached model: makes caches and reports on them."""

    def __init__(self, model: PreTrainedModel, policy: Policy, execution: Execution, registry: Registry | None) -> None:
        self.model = model
        self.steps: CapturedSteps | None = None
        """Stands for the model's `forward` where decode steps are captured."""
        self.policy = policy
        self.execution: Execution = execution
        self._registry = registry
        self._cache: RetrievalCache | None = None

    def new_cache(self, max_length: int | None = None) -> RetrievalCache:
        """A fresh cache; pass it as `past_key_values` where several calls share one."""
        self._cache = self._make_cache(max_length)
        self._forget_recording()
        return self._cache

    def _forget_recording(self) -> None:
        if self.steps is not None:
            self.steps.forget()

    def check(self) -> None:
        """Raise whatever `new_cache` would."""
        self._make_cache(None)

    def _make_cache(self, max_length: int | None) -> RetrievalCache:
        return RetrievalCache(
            self.model, self.policy, execution=self.execution, max_length=max_length, registry=self._registry
        )

    @property
    def cache(self) -> RetrievalCache:
        """The cache of the last call, for the next turn of a chat. Raises ConfigError before the first."""
        if self._cache is None:
            raise ConfigError("nothing has been generated yet, so there is no cache; call model.generate first")
        return self._cache

    def report(self) -> Report:
        """What happened in the last cache, over all the calls that used it."""
        return self.cache.report()

    def generate(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """`model.generate` with a cache of ours."""
        call = read_call(self.model, args, kwargs)
        cache = call.cache if call.cache is not None else self._make_cache(call.max_length)
        with cache.one_call(call.prompt_end, call.max_length, call.batch_size):
            if cache is not self._cache:
                self._forget_recording()
            self._cache = cache  # what the one before held is free before this one allocates
            try:
                return original(**call.arguments, past_key_values=cache)
            finally:
                self._cache = cache  # again: a model that is its own assistant has generated meanwhile


@contextmanager
def attach(
    model: PreTrainedModel,
    policy: Policy,
    *,
    execution: Execution = "offload",
    capture: bool | None = None,
    compile: bool = False,
    registry: Registry | None = None,
) -> Iterator[Run]:
    """Put a model's full-attention layers under a policy for the length of a `with` block.

    `model.generate` then works as always: greedy, sampling, `num_return_sequences`, batches with left padding, chunked
    prefill, prompt-lookup and assisted decoding, several turns on `run.cache`. A forward pass without a cache, or with
    one of transformers' own, is what it was before. On leaving, also after an exception, the model is as it was.

    execution: "offload" is the real thing; "dense" keeps all KV on the device and attends under a mask; "shadow" lets
        full attention drive and only watches the policy.
    capture: replay every decode step as one CUDA graph. By default that is done on a CUDA device where nothing blocks
        it; `Report.capture_reason` says what does. False: never.
    compile: with `capture`, the model's own operations go through `torch.compile` first, which takes a minute or two
        once and makes steps faster; logits differ in rounding.
    registry: plugins other than the installed ones.

    Raises UnsupportedModelError for a model that cannot be served and ConfigError for a policy that does not fit it,
    before anything is changed.
    """
    _check_capture(model, execution, capture, compile)
    run = Run(model, policy, execution, registry)
    run.check()
    if not model.can_generate():
        raise ConfigError(
            f"{type(model).__name__} cannot generate; expected a language model with its head, such as "
            "AutoModelForCausalLM gives"
        )
    if is_remembered(decoder_config(model)):
        raise ConfigError("the model, or one that shares its config, is attached already; leave that block first")
    configs = configs_of(model)
    implementations = [config._attn_implementation_internal for config in configs]
    original: Any = model.generate
    was_own = "generate" in vars(model)

    @functools.wraps(original)
    def generate(*args: Any, **kwargs: Any) -> Any:
        return run.generate(original, *args, **kwargs)

    if capture is not False and execution == "offload" and model.device.type == "cuda":
        run.steps = CapturedSteps(model, model.forward, compiled_step(model) if compile else None)

    try:
        for config in configs:
            remember(config)
        decoder_of(model).set_attn_implementation(ATTENTION_NAME)
        vars(model)["generate"] = generate
        with _standing_in(model, run.steps), _handing_over_ids(model, policy):
            yield run
    finally:
        if was_own:
            vars(model)["generate"] = original
        else:
            vars(model).pop("generate", None)
        for config, implementation in zip(configs, implementations, strict=True):
            config._attn_implementation_internal = implementation
            forget(config)


@contextmanager
def _standing_in(model: PreTrainedModel, steps: CapturedSteps | None) -> Iterator[None]:
    """Within the block, `steps` is the model's `forward`."""
    if steps is None:
        yield
        return
    original: Any = model.forward
    was_own = "forward" in vars(model)

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return steps(*args, **kwargs)

    vars(model)["forward"] = forward
    try:
        yield
    finally:
        if was_own:
            vars(model)["forward"] = original
        else:
            vars(model).pop("forward", None)
        steps.close()


@contextmanager
def _handing_over_ids(model: PreTrainedModel, policy: Policy) -> Iterator[None]:
    """Within the block, caches of ours hear of the ids of tokens, where a stage of the policy asks for them."""
    if not policy.needs_token_ids:
        yield
        return

    def hand_over(module: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache, ids = kwargs.get("past_key_values"), kwargs.get("input_ids", args[0] if args else None)
        if isinstance(cache, RetrievalCache):
            if ids is None:
                raise UnsupportedCallError(
                    f"policy {policy.name!r} has a stage that asks for token ids, and the call brings inputs_embeds; "
                    "call with input_ids"
                )
            cache.take_token_ids(ids, kwargs.get("attention_mask"))

    handle = model.register_forward_pre_hook(hand_over, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _check_capture(model: PreTrainedModel, execution: Execution, capture: bool | None, compile: bool) -> None:
    """Raise ConfigError where a captured or compiled step was asked for that there cannot be."""
    if capture is True and model.device.type != "cuda":
        raise ConfigError(f"capture=True needs a model on a CUDA device, this one is on {model.device}; leave it out")
    if capture is True and execution != "offload":
        raise ConfigError(f"capture=True needs execution='offload', got {execution!r}; leave it out")
    if compile and (capture is False or execution != "offload" or model.device.type != "cuda"):
        raise ConfigError(
            "compile=True compiles the step that is captured, which needs a model on a CUDA device, "
            "execution='offload' and capture not False; leave it out"
        )


def configs_of(model: PreTrainedModel) -> list[Any]:
    """Every config in the model, those inside other configs included, once each."""
    found: dict[int, Any] = {}
    waiting: list[Any] = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    while waiting:
        config = waiting.pop()
        if id(config) not in found:
            found[id(config)] = config
            parts = (getattr(config, name, None) for name in config.sub_configs)
            waiting += [part for part in parts if hasattr(part, "_attn_implementation_internal")]
    return list(found.values())
