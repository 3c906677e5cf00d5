"""Bad input is refused early, with what was expected, what came and the way out, and with nothing half-changed."""

import functools
import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from hf.tiny import (
    NEW_TOKENS,
    PROMPT_TOKENS,
    VERSION,
    Answer,
    Prompt,
    assert_same,
    generate,
    implementations,
    louiskv,
    make_config,
    make_model,
    make_prompt,
    model_of,
)
from torch import Tensor
from transformers import DynamicCache, GenerationConfig

import kvframe
from kvframe import hookimpl
from kvframe.errors import (
    CacheMismatchError,
    ConfigError,
    HostMemoryError,
    KvframeError,
    NonFiniteError,
    NotAttachedError,
    PaddingError,
    PluginError,
    UnsupportedCallError,
    UnsupportedModelError,
)
from kvframe.hf import RetrievalCache, memory_needs
from kvframe.hf import cache as cache_module
from kvframe.hf.families import build_model
from kvframe.memory.pool import RowPool
from kvframe.plugins import create_plugin_manager
from kvframe.registry import Registry


@functools.cache
def plain(family: str = "Llama") -> Answer:
    """The two-row prompt, answered by the model as it is."""
    return generate(model_of(family))


@contextmanager
def refused(error: type[KvframeError], *words: str) -> Iterator[None]:
    """The block raises just this error, whose text has all the words."""
    with pytest.raises(error) as caught:
        yield
    assert type(caught.value) is error
    for word in words:
        assert word in str(caught.value)


def assert_untouched(model: Any) -> None:
    """The model is not attached, and generates."""
    assert "kvframe" not in implementations(model)
    assert "generate" not in vars(model)
    assert torch.equal(generate(model).logits, generate(model).logits)


def assert_usable(run: Any, cache: RetrievalCache | None = None) -> None:
    """The attached model generates, on a new cache and on an emptied one."""
    assert_same(generate(run.model), plain())
    if cache is not None:
        assert_same(generate(run.model, past_key_values=cache), plain())


class TestModels:
    """Models that cannot be served, told before anything is changed."""

    @pytest.mark.parametrize(
        "family, words",
        [
            ("deepseek_v3", ("multi-head latent attention (MLA)", "latents")),
            ("gemma2", ("caps attention logits", "attn_logit_softcapping=")),
            ("gpt_oss", ("learned sinks", "self_attn.sinks")),
            ("gemma3n_text", ("layers share each other's keys and values",)),
            ("bloom", ("does not go through transformers' attention interface",)),
            ("minimax", ("a cache of its own making",)),
            ("mamba", ("no layer keeps a full KV cache", "nothing to retrieve")),
            ("doge", ("makes a mask of its own",)),
        ],
    )
    def test_families(self, family: str, words: tuple[str, ...]) -> None:
        """Named with the reason, by `attach` and by the cache alike."""
        model = build_model(family)
        for make in (attach_once, RetrievalCache):
            with refused(UnsupportedModelError, type(model).__name__, *words):
                make(model, louiskv())
        assert "kvframe" not in implementations(model)

    def test_all_layers_sliding(self) -> None:
        """Where every layer slides there is nothing to retrieve."""
        with refused(UnsupportedModelError, "MistralForCausalLM", "all are sliding", "nothing to retrieve"):
            attach_once(make_model("Mistral"), louiskv())

    def test_encoder_decoder(self) -> None:
        """A decoder that also reads an encoder is not served."""
        sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 32}
        model = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes))
        with refused(UnsupportedModelError, "encoder-decoder; expected a decoder-only language model"):
            attach_once(model, louiskv())

    def test_bidirectional(self) -> None:
        """Attention to what comes later is not served."""
        model = make_model("Llama", is_causal=False)
        with refused(UnsupportedModelError, "bidirectional; expected a causal"):
            attach_once(model, louiskv())

    def test_without_a_head(self) -> None:
        """What cannot generate cannot be attached."""
        with refused(ConfigError, "LlamaModel cannot generate; expected a language model with its head"):
            attach_once(make_model("Llama").model, louiskv())

    def test_keys_changed_behind_the_cache(self) -> None:
        """A model that caches other keys or values than it attends to is found out at run time."""
        for family in ("diffllama", "jetmoe"):
            model = build_model(family)
            expected = generate(model).logits
            with kvframe.attach(model, louiskv()):
                for prompt in (make_prompt(), make_prompt(padding=0)):
                    with refused(UnsupportedModelError, "changes keys or values after Cache.update"):
                        generate(model, prompt)
            assert torch.equal(generate(model).logits, expected)

    def test_values_changed_after_update(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Named with the layer, and nothing is taken in."""
        update = RetrievalCache.update

        def changing(self: Any, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
            keys, values = update(self, keys, values, layer_idx, *args, **kwargs)
            return keys, values * 1

        with kvframe.attach(model_of("Llama"), louiskv()) as run, torch.no_grad():
            cache = run.new_cache()
            with monkeypatch.context() as patch:
                patch.setattr(RetrievalCache, "update", changing)
                with refused(UnsupportedModelError, "layer 0: the model changes keys or values"):
                    run.model(make_prompt().input_ids, past_key_values=cache)
            assert cache.get_seq_length() == 0
            assert_usable(run, cache)

    def test_keys_changed_in_the_last_layer(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Found out even where no further layer comes to notice."""
        update = RetrievalCache.update

        def changing(self: Any, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
            keys, values = update(self, keys, values, layer_idx, *args, **kwargs)
            return (keys * 1, values) if layer_idx == 1 else (keys, values)

        with kvframe.attach(model_of("Llama"), louiskv()) as run:
            with monkeypatch.context() as patch:
                patch.setattr(RetrievalCache, "update", changing)
                with refused(UnsupportedModelError, "layer 1: the model changes keys or values"):
                    generate(run.model, make_prompt(padding=0), max_new_tokens=1)
            assert_usable(run, run.cache)


def attach_once(model: Any, policy: Any, **settings: Any) -> None:
    """Attach and leave."""
    with kvframe.attach(model, policy, **settings):
        pass


class TestArguments:
    """Arguments of `attach` and of the cache."""

    @pytest.mark.parametrize(
        "settings, words",
        [
            ({"policy": "louiskv"}, ("expected a Policy, got 'louiskv'", "kvframe.policy(name)")),
            ({"policy": None}, ("expected a Policy, got None",)),
            ({"model": "HuggingFaceTB/SmolLM2-135M"}, ("expected a PreTrainedModel", "got str", "from_pretrained")),
            ({"model": torch.nn.Linear(2, 2)}, ("expected a PreTrainedModel", "got Linear")),
            ({"execution": "fast"}, ("execution must be 'offload', 'dense' or 'shadow', got 'fast'",)),
            ({"policy": louiskv(dense_layers=(0, 2))}, ("dense_layers names layer 2, the model has layers 0 to 1",)),
            ({"policy": louiskv(tau=(0.5, 0.5, 0.5))}, ("tau has 3 values, the model has 2 layers",)),
        ],
        ids=["policy-name", "no-policy", "model-name", "module", "execution", "dense-layer", "layers-of-tau"],
    )
    def test_attach(self, settings: dict[str, Any], words: tuple[str, ...]) -> None:
        """Refused by `attach` and by the cache alike."""
        arguments = {"model": model_of("Llama"), "policy": louiskv()} | settings
        for make in (attach_once, RetrievalCache):
            with refused(ConfigError, *words):
                make(**arguments)
        assert_untouched(model_of("Llama"))

    @pytest.mark.parametrize(
        "settings, words",
        [
            ({"max_length": 0}, ("max_length must be a whole number >= 1 or None, got 0",)),
            ({"max_length": 10.0}, ("max_length", "got 10.0")),
            ({"extend": "part"}, ("extend must be 'full' or 'retrieve', got 'part'",)),
        ],
    )
    def test_cache(self, settings: dict[str, Any], words: tuple[str, ...]) -> None:
        """What only the cache takes."""
        with refused(ConfigError, *words):
            RetrievalCache(model_of("Llama"), louiskv(), **settings)

    def test_layer_that_is_not_managed(self) -> None:
        """Positions are asked of a layer that has some."""
        with kvframe.attach(model_of("Gemma3"), louiskv()) as run:
            generate(model_of("Gemma3"))
            with refused(ConfigError, "layer 0 holds nothing under the policy", "[1, 3]"):
                run.cache.attended_positions(0)


class TestCalls:
    """Calls of `generate` that are not served, told before the prompt is read."""

    @pytest.fixture
    def run(self) -> Iterator[Any]:
        """An attached model on which nothing has been generated."""
        with kvframe.attach(model_of("Llama"), louiskv()) as run:
            yield run

    @pytest.mark.parametrize(
        "settings, words",
        [
            ({"num_beams": 2}, ("num_beams=2", "use num_beams=1")),
            ({"generation_config": GenerationConfig(num_beams=3)}, ("num_beams=3", "use num_beams=1")),
            ({"use_cache": False}, ("use_cache=False leaves nothing for a policy to manage", "detach the model")),
            ({"generation_config": GenerationConfig(use_cache=False)}, ("use_cache=False",)),
            ({"output_attentions": True}, ("output_attentions", "detach the model")),
            ({"cache_implementation": "paged"}, ("continuous batching", "leave it out")),
            ({"assistant_early_exit": 1}, ("assistant_early_exit", "use an assistant_model")),
            ({"use_mtp": True}, ("use_mtp", "use an assistant_model")),
        ],
        ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
    )
    def test_settings(self, run: Any, settings: dict[str, Any], words: tuple[str, ...]) -> None:
        """As an argument and in a generation config."""
        prompt = make_prompt()
        with never_forward(run.model), refused(UnsupportedCallError, *words):
            run.model.generate(**prompt._asdict(), **settings)
        assert_usable(run)

    @pytest.mark.parametrize("name, value", [("num_beams", 2), ("use_cache", False)])
    def test_settings_of_the_model(self, name: str, value: Any) -> None:
        """In the model's own generation config."""
        model = make_model("Llama")
        setattr(model.generation_config, name, value)
        prompt = make_prompt()
        with kvframe.attach(model, louiskv()), never_forward(model), refused(UnsupportedCallError, f"{name}={value}"):
            model.generate(**prompt._asdict(), max_new_tokens=2)

    def test_output_attentions_of_the_config(self) -> None:
        """Set on the model, for `generate` and for a forward pass."""
        model = make_model("Llama", attention="eager", output_attentions=True)
        with kvframe.attach(model, louiskv()) as run, torch.no_grad():
            with never_forward(model), refused(UnsupportedCallError, "output_attentions"):
                model.generate(**make_prompt()._asdict(), max_new_tokens=2)
            with refused(UnsupportedCallError, "output_attentions"):
                model(make_prompt().input_ids, past_key_values=run.new_cache())
            assert run.cache.get_seq_length() == 0

    def test_output_attentions_of_a_forward_pass(self, run: Any) -> None:
        """Refused at the first layer."""
        cache = run.new_cache()
        with torch.no_grad(), refused(UnsupportedCallError, "output_attentions"):
            run.model(make_prompt().input_ids, past_key_values=cache, output_attentions=True)
        assert_usable(run, cache)

    def test_another_kind_of_cache(self, run: Any) -> None:
        """`generate` of an attached model takes none of transformers' own."""
        with never_forward(run.model), refused(CacheMismatchError, "is a DynamicCache; expected the RetrievalCache"):
            generate(run.model, past_key_values=DynamicCache(config=run.model.config))
        assert_usable(run)

    def test_beams_without_attach(self) -> None:
        """Refused where the beams are first permuted."""
        model = make_model("Llama", attention="kvframe")
        cache = RetrievalCache(model, louiskv())
        with refused(UnsupportedCallError, "use num_beams=1"):
            generate(model, past_key_values=cache, num_beams=2)

    def test_changing_the_batch(self, run: Any) -> None:
        """The batch of a filled cache is fixed; an empty one does not mind."""
        run.new_cache().batch_repeat_interleave(2)
        generate(run.model)
        with refused(UnsupportedCallError, "cannot be repeated", "expand the inputs"):
            run.cache.batch_repeat_interleave(2)
        with refused(UnsupportedCallError, "cannot be selected from"):
            run.cache.batch_select_indices(torch.tensor([0]))

    def test_training(self, run: Any) -> None:
        """Neither gradients nor dropout go through a retrieval cache."""
        cache, ids = run.new_cache(), make_prompt().input_ids
        with refused(UnsupportedCallError, "gradients do not flow", "torch.no_grad()"):
            run.model(ids, past_key_values=cache)
        assert_usable(run, cache)

        model = make_model("Llama", attention_dropout=0.1).train()
        cache = RetrievalCache(model, louiskv())
        words = "layer 0: attention dropout of 0.1 came", "model.eval()"
        with kvframe.attach(model, louiskv()), torch.no_grad(), refused(UnsupportedCallError, *words):
            model(ids, past_key_values=cache)

    def test_arguments_of_transformers(self, run: Any) -> None:
        """What transformers refuses it goes on refusing, and a filled cache survives that."""
        first = generate(run.model)
        length = run.cache.get_seq_length()
        with pytest.raises(ValueError, match="max_new_token"):
            run.model.generate(first.tokens, past_key_values=run.cache, max_new_token=3)

        assert run.cache.get_seq_length() == length


@contextmanager
def never_forward(model: Any) -> Iterator[None]:
    """Fails if the model computes anything inside."""

    def fail(module: Any, args: Any) -> None:
        raise AssertionError("the model was called")

    hook = model.register_forward_pre_hook(fail)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def hooked(module: Any, hook: Any) -> Iterator[None]:
    """A forward hook for the length of a block."""
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


class TestMasks:
    """Masks that are not left padding."""

    RIGHT = torch.tensor([[1] * 40, [1] * 35 + [0] * 5])
    HOLE = torch.tensor([[1] * 40, [0] * 5 + [1] * 5 + [0] + [1] * 29])

    @pytest.mark.parametrize("mask", [RIGHT, HOLE], ids=["right", "hole"])
    def test_generate(self, mask: Tensor) -> None:
        """Refused before the prompt is read, with the row."""
        prompt = make_prompt()._replace(attention_mask=mask)
        with kvframe.attach(model_of("Llama"), louiskv()) as run:
            with never_forward(run.model), refused(PaddingError, "row 1", "0...01...1", "padding_side = 'left'"):
                generate(run.model, prompt)
            assert_usable(run)

    @pytest.mark.parametrize("family", ["Llama", "Gemma3"])
    @pytest.mark.parametrize("mask", [RIGHT, HOLE], ids=["right", "hole"])
    def test_forward(self, family: str, mask: Tensor) -> None:
        """Refused in a forward pass, after which the cache is empty and works."""
        model, prompt = model_of(family), make_prompt()
        with kvframe.attach(model, louiskv()) as run, torch.no_grad():
            cache = run.new_cache()
            with refused(PaddingError, "row 1", "0...01...1"):
                model(prompt.input_ids, attention_mask=mask, past_key_values=cache)
            assert cache.get_seq_length() == 0
            assert_same(generate(model, past_key_values=cache), plain(family))

    @pytest.mark.parametrize("num_new", [1, 3], ids=["token", "text"])
    @pytest.mark.parametrize(
        "change, words",
        [
            ((slice(None), slice(-1, None)), ("row 0", "right padding or a hole")),
            ((1, 20), ("row 1", "right padding or a hole")),
            ((1, slice(0, 12)), ("row 1 has 12 tokens of padding", "filled with 9", "appended to the right")),
            ((0, slice(0, 2)), ("row 0 has 2 tokens of padding", "filled with 0")),
        ],
        ids=["right", "hole", "more", "other-row"],
    )
    def test_later(self, num_new: int, change: Any, words: tuple[str, ...]) -> None:
        """A later mask has to continue the first one; otherwise the cache stays as it was."""
        model, prompt = model_of("Llama"), make_prompt()
        ids = make_prompt(num_tokens=num_new, padding=0).input_ids
        mask = torch.cat([prompt.attention_mask, torch.ones_like(ids)], 1)
        wrong = mask.clone()
        wrong[change] = 0
        with kvframe.attach(model, louiskv()) as run, torch.no_grad():
            cache, other = run.new_cache(), run.new_cache()
            for each in (cache, other):
                model(**prompt._asdict(), past_key_values=each)
            with refused(PaddingError, *words):
                model(ids, attention_mask=wrong, past_key_values=cache)
            if num_new > 1 and words[0] != "row 0":
                with never_forward(model), refused(PaddingError, *words):
                    generate(model, Prompt(ids, wrong), past_key_values=cache)
            assert cache.get_seq_length() == PROMPT_TOKENS
            logits = [model(ids, attention_mask=mask, past_key_values=each).logits for each in (cache, other)]

        assert torch.equal(*logits)

    def test_short_mask(self) -> None:
        """A mask covers what is cached as well."""
        model, ids = model_of("Llama"), make_prompt(num_tokens=3, padding=0).input_ids
        with kvframe.attach(model, louiskv()) as run, torch.no_grad():
            model(**make_prompt()._asdict(), past_key_values=run.new_cache())
            with refused(PaddingError, "attention_mask has 3 columns, but there are 43 tokens"):
                model(ids, attention_mask=torch.ones_like(ids), past_key_values=run.cache)

    def test_mask_of_another_batch(self) -> None:
        """A mask has a row for every sequence."""
        model, prompt = model_of("Llama"), make_prompt()
        cache, words = RetrievalCache(model, louiskv()), "attention_mask has 1 rows for a batch of 2"
        with kvframe.attach(model, louiskv()), torch.no_grad(), refused(PaddingError, words):
            model(prompt.input_ids, attention_mask=prompt.attention_mask[:1], past_key_values=cache)

    def test_custom_mask(self) -> None:
        """Only padding is served, not just any pattern."""
        model, prompt = model_of("Llama"), make_prompt()
        mask = torch.zeros(2, 1, PROMPT_TOKENS, PROMPT_TOKENS)
        with kvframe.attach(model, louiskv()) as run, torch.no_grad():
            with refused(UnsupportedCallError, "a custom 4D attention mask came; expected the 2D padding mask"):
                model(prompt.input_ids, attention_mask=mask, past_key_values=run.new_cache())
            assert_usable(run, run.cache)

    def test_tokens_that_see_each_other(self) -> None:
        """Images attend to themselves in both directions, which is not served."""
        from transformers.masking_utils import create_causal_mask

        model = model_of("Llama")
        with kvframe.attach(model, louiskv()) as run, refused(UnsupportedCallError, "not plainly causal"):
            create_causal_mask(
                config=model.config,
                inputs_embeds=torch.zeros(1, 3, 4),
                attention_mask=None,
                past_key_values=run.new_cache(),
                or_mask_function=lambda batch, head, query, key: key >= 0,
            )


class TestMismatch:
    """A cache used for something else than what filled it; it stays as it was."""

    @pytest.fixture
    def run(self) -> Iterator[Any]:
        """An attached model with a filled cache."""
        with kvframe.attach(model_of("Llama"), louiskv()) as run:
            generate(model_of("Llama"))
            yield run

    def test_batch(self, run: Any) -> None:
        """A batch of another size, in `generate` and in a forward pass."""
        length = run.cache.get_seq_length()
        one = Prompt(*(part[:1] for part in make_prompt(num_tokens=length + 1, padding=0)))
        with never_forward(run.model), refused(CacheMismatchError, "a batch of 1 sequences", "the cache holds 2"):
            generate(run.model, one, past_key_values=run.cache)
        with torch.no_grad(), refused(CacheMismatchError, "layer 0", "batch_size 1, expected 2", "new RetrievalCache"):
            run.model(one.input_ids[:, -1:], past_key_values=run.cache)
        with never_forward(run.model), refused(CacheMismatchError, "a batch of 4 sequences"):
            two = make_prompt(num_tokens=length + 1, padding=0)
            generate(run.model, two, past_key_values=run.cache, num_return_sequences=2, do_sample=True)
        assert run.cache.get_seq_length() == length

    def test_model(self, run: Any) -> None:
        """Another model, even one of the same shape."""
        length, prompt = run.cache.get_seq_length(), make_prompt(num_tokens=PROMPT_TOKENS + NEW_TOKENS)
        for other in (make_model("Llama"), make_model("Llama", num_key_value_heads=4)):
            with kvframe.attach(other, louiskv()):
                with never_forward(other), refused(CacheMismatchError, "made for another model"):
                    generate(other, prompt, past_key_values=run.cache)
                with torch.no_grad(), refused(CacheMismatchError, "layer 0", "by another model or batch"):
                    other(prompt.input_ids[:, -1:], past_key_values=run.cache)
        assert run.cache.get_seq_length() == length

    def test_dtype(self) -> None:
        """A model that was converted in the meantime."""
        model = make_model("Llama")
        with kvframe.attach(model, louiskv()) as run, torch.no_grad():
            model(make_prompt().input_ids, past_key_values=run.new_cache())
            model.double()
            with refused(CacheMismatchError, "dtype torch.float64, expected torch.float32"):
                model(make_prompt().input_ids[:, :1], past_key_values=run.cache)

    @pytest.mark.parametrize(
        "num_inputs, num_masked",
        [(40, 40), (63, 63), (3, 3), (3, 67), (5, 66)],
        ids=["old-text", "nothing-new", "no-full-mask", "token-left-out", "token-twice"],
    )
    def test_text_that_does_not_continue(self, run: Any, num_inputs: int, num_masked: int) -> None:
        """Of 64 tokens 63 are cached: expected are all and more, or the 64th and more with a mask over all."""
        assert run.cache.get_seq_length() == 63
        prompt = Prompt(
            make_prompt(num_tokens=num_inputs, padding=0).input_ids, make_prompt(num_tokens=num_masked).attention_mask
        )
        words = f"{num_inputs} tokens and", f"mask over {num_masked}", "cache of 63", "last token"
        with never_forward(run.model), refused(CacheMismatchError, *words):
            generate(run.model, prompt, past_key_values=run.cache)
        assert run.cache.get_seq_length() == 63

    def test_embeddings_of_new_tokens(self, run: Any) -> None:
        """Embeddings are always those of the whole text."""
        embeddings, mask = torch.zeros(2, 3, 32), make_prompt(num_tokens=66).attention_mask
        with never_forward(run.model), refused(CacheMismatchError, "inputs_embeds of 3 tokens", "mask over 66"):
            run.model.generate(inputs_embeds=embeddings, attention_mask=mask, past_key_values=run.cache)
        assert run.cache.get_seq_length() == 63

    @pytest.mark.skipif(VERSION.release >= (5, 23), reason="transformers 5.23 continues a warm chunked prefill")
    def test_warm_chunked_prefill(self, run: Any) -> None:
        """Older transformers would read the prompt again from its start."""
        prompt = make_prompt(num_tokens=70)
        with never_forward(run.model), refused(UnsupportedCallError, "prefill_chunk_size", "5.23.0 or later"):
            generate(run.model, prompt, past_key_values=run.cache, prefill_chunk_size=4)

    @pytest.mark.parametrize("family", ["Llama", "Gemma3"])
    def test_not_attached(self, family: str) -> None:
        """A model whose attention does not reach ours is found out at the second layer; the cache is still good."""
        model, prompt = model_of(family), make_prompt()
        cache = RetrievalCache(model, louiskv())
        with refused(NotAttachedError, "never reached kvframe's attention", "kvframe.attach", "attn_implementation"):
            generate(model, past_key_values=cache)
        assert cache.get_seq_length() == 0
        with kvframe.attach(model, louiskv()):
            assert_same(generate(model, prompt, past_key_values=cache), plain(family))

    @pytest.mark.parametrize("layer_idx", [0, 1])
    def test_broken_off(self, layer_idx: int) -> None:
        """A forward pass that something else ended is noticed by the next one, whichever layer it had come to."""

        class Stop(Exception):
            pass

        def stop(module: Any, args: Any, output: Any) -> None:
            raise Stop

        model, prompt = model_of("Llama"), make_prompt()
        with kvframe.attach(model, louiskv()) as run, torch.no_grad():
            cache = run.new_cache()
            with hooked(model.model.layers[layer_idx].mlp, stop), pytest.raises(Stop):
                model(**prompt._asdict(), past_key_values=cache)
            if layer_idx == 0:
                with refused(CacheMismatchError, "layer 0 came where layer 1 was expected", "start again"):
                    model(**prompt._asdict(), past_key_values=cache)
                assert cache.get_seq_length() == 0
                assert_usable(run, cache)
            else:  # every layer has the tokens, as it would in a cache of transformers
                assert cache.get_seq_length() == PROMPT_TOKENS


class TestMemory:
    """Contexts that the host cannot hold."""

    def test_cache(self) -> None:
        """Told when the cache is made, with the figures."""
        words = r"10000000000 tokens x 1 sequences in 2 layers takes \d{4}\.\d\d GiB of host memory, \d+\.\d\d GiB are"
        with pytest.raises(HostMemoryError, match=words):
            RetrievalCache(model_of("Llama"), louiskv(), max_length=10**10)

    @pytest.mark.parametrize("policy", ["louiskv", "full"])
    @pytest.mark.parametrize("execution", ["offload", "dense", "shadow"])
    def test_generate(self, policy: str, execution: Any) -> None:
        """Told before the prompt is read; on a CPU dense layers count as well."""
        with kvframe.attach(model_of("Llama"), kvframe.policy(policy), execution=execution) as run:
            with never_forward(run.model), refused(HostMemoryError, "10000000040 tokens", "max_new_tokens counts"):
                generate(run.model, max_new_tokens=10**10)
            assert_usable(run)

    def test_batch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Every sequence counts, and what comes back in a second turn does not count twice."""
        token_bytes = 2 * 2 * 2 * 8 * 4  # layers, KV heads, K and V, head_dim, float32
        enough_for_three = 3 * (PROMPT_TOKENS + NEW_TOKENS) * token_bytes
        with kvframe.attach(model_of("Llama"), louiskv()) as run:
            monkeypatch.setattr(memory_needs, "available_host_memory", lambda: enough_for_three)
            with never_forward(run.model), refused(HostMemoryError, "64 tokens x 4 sequences"):
                generate(run.model, num_return_sequences=2, do_sample=True)
            first = generate(run.model)
            monkeypatch.setattr(memory_needs, "available_host_memory", lambda: 0)
            with never_forward(run.model), refused(HostMemoryError, "0.00 GiB are available"):
                generate(run.model, Prompt(first.tokens, grown(first)), past_key_values=run.cache, max_new_tokens=999)
            run.cache.crop(-2)
            shorter = Prompt(first.tokens[:, :-1], grown(first)[:, :-1])
            generate(run.model, shorter, past_key_values=run.cache, max_new_tokens=1)

    def test_exact_shape(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where the config says too little, the first keys tell, before any of them is taken in."""
        model = make_model("Llama")
        monkeypatch.setattr(cache_module, "kv_shape", lambda config: (1, 1))
        monkeypatch.setattr(memory_needs, "available_host_memory", lambda: 10_000)
        with kvframe.attach(model, louiskv()) as run:
            with refused(HostMemoryError, "64 tokens x 2 sequences"):
                generate(model)
            assert run.cache.get_seq_length() == 0
            monkeypatch.undo()
            assert_usable(run, run.cache)

    @pytest.mark.parametrize("available", [None, 10**9])
    def test_enough(self, monkeypatch: pytest.MonkeyPatch, available: int | None) -> None:
        """A system that does not say how much there is, is trusted."""
        monkeypatch.setattr(memory_needs, "available_host_memory", lambda: available)
        with kvframe.attach(model_of("Llama"), louiskv()) as run:
            assert_usable(run)

    @pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError])
    @pytest.mark.parametrize("when", ["prompt", "decoding", "elsewhere"])
    def test_out_of_memory(self, monkeypatch: pytest.MonkeyPatch, error: type[BaseException], when: str) -> None:
        """What was taken is free again, and the model goes on."""
        held: list[weakref.ref[Any]] = []
        calls = {"allocate": 0, "append": 0}
        allocate, append = RowPool._allocate, RowPool.append

        def failing_allocate(self: RowPool, num_rows: int) -> Tensor:
            calls["allocate"] += 1
            if when == "prompt" and calls["allocate"] == 2:
                raise error("no more")
            held.append(weakref.ref(self))
            return allocate(self, num_rows)

        def failing_append(self: RowPool, *args: Any) -> None:
            calls["append"] += 1
            if when == "decoding" and calls["append"] == 7:
                raise error("no more")
            append(self, *args)

        def fail(module: Any, args: Any, output: Any) -> None:
            if when == "elsewhere" and output.shape[1] == 1:
                raise error("no more")

        model = model_of("Llama")
        with kvframe.attach(model, louiskv()) as run:
            with monkeypatch.context() as patch, hooked(model.model.layers[1].mlp, fail):
                patch.setattr(RowPool, "_allocate", failing_allocate)
                patch.setattr(RowPool, "append", failing_append)
                with pytest.raises(error, match="no more"):
                    generate(model)
            assert held
            assert run.cache.get_seq_length() == 0
            assert run.report().host_kv_bytes == run.report().device_kv_bytes == 0
            gc.collect()
            assert [pool() for pool in held] == [None] * len(held)
            assert_usable(run, run.cache)

    def test_out_of_memory_in_a_forward_pass(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The same without `generate`: the cache empties itself."""
        model, prompt = model_of("Llama"), make_prompt()
        with kvframe.attach(model, louiskv()) as run, torch.no_grad():
            cache = run.new_cache()
            model(**prompt._asdict(), past_key_values=cache)
            with monkeypatch.context() as patch:
                patch.setattr(RowPool, "append", _raise_memory_error)
                with pytest.raises(MemoryError):
                    model(prompt.input_ids[:, :1], past_key_values=cache)
            assert cache.get_seq_length() == 0 and cache.report().host_kv_bytes == 0
            assert_usable(run, cache)


def _raise_memory_error(*args: Any) -> None:
    raise MemoryError


def grown(answer: Answer) -> Tensor:
    """The mask over prompt and answer."""
    mask = make_prompt().attention_mask
    return torch.cat([mask, torch.ones_like(answer.tokens[:, PROMPT_TOKENS:])], 1)


class TestNonFinite:
    """NaN and infinity in keys and values."""

    @pytest.mark.parametrize("dense_layers", [(), (0, 1)], ids=["retrieval", "dense"])
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    @pytest.mark.parametrize("num_tokens", [PROMPT_TOKENS, 1], ids=["prompt", "decoding"])
    def test_named(self, dense_layers: tuple[int, ...], value: float, num_tokens: int) -> None:
        """With layer and head, wherever they come; afterwards cache and model work."""

        def spoil(module: Any, args: Any, output: Tensor) -> Tensor:
            if output.shape[1] == num_tokens:
                output = output.clone()
                output[0, -1, 8:] = value  # the second KV head
            return output

        model = make_model("Llama")
        with kvframe.attach(model, louiskv(dense_layers=dense_layers)) as run:
            words = "layer 1, KV head 1, batch row 0", "expected finite keys and values"
            with hooked(model.model.layers[1].self_attn.v_proj, spoil), refused(NonFiniteError, *words):
                generate(model)
            assert run.cache.get_seq_length() == 0
            assert_usable(run, run.cache)

    def test_told_at_the_end(self) -> None:
        """A device is not asked at every step: what it has noticed by the end of a call is told then."""
        with kvframe.attach(model_of("Llama"), louiskv()) as run:
            cache = run.new_cache()

            def notice(ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
                runtime = cache.managed_layers[1].runtime
                assert runtime is not None
                runtime._finite[1, 0] = False
                return torch.zeros(2, dtype=torch.bool)

            with refused(NonFiniteError, "layer 1, KV head 0, batch row 1"):
                generate(run.model, past_key_values=cache, stopping_criteria=[notice])
            assert cache.get_seq_length() == 0
            assert_usable(run, cache)

    @pytest.mark.parametrize("dense_layers", [(), (0, 1)], ids=["retrieval", "dense"])
    def test_padding_does_not_count(self, dense_layers: tuple[int, ...]) -> None:
        """What padding holds is nobody's business."""

        def spoil(module: Any, args: Any, output: Tensor) -> Tensor:
            if output.shape[1] == PROMPT_TOKENS:
                output = output.clone()
                output[1, :9] = float("nan")
            return output

        model = make_model("Llama")
        for layer in model.model.layers:
            layer.self_attn.k_proj.register_forward_hook(spoil)
        with kvframe.attach(model, louiskv(dense_layers=dense_layers)):
            answer = generate(model)

        assert_same(answer, plain())


class BadPlugin(SimpleNamespace):
    """A plugin that fails where it is told to."""

    KVFRAME_API_VERSION = 1

    @hookimpl
    def kvframe_check_policy(self, policy: Any, layout: Any) -> list[str] | None:
        """Two problems, or a failure."""
        if self.fails == "check":
            raise RuntimeError("broken")
        if self.fails != "problems":
            return None
        return [f"{policy.name} is not liked", f"{layout.num_layers} are too many"]

    @hookimpl
    def kvframe_attention_backend(self, layout: Any) -> Any:
        """A failure."""
        if self.fails == "backend":
            raise RuntimeError("broken")

    @hookimpl
    def kvframe_step_finished(self, stats: Any) -> None:
        """A failure at the third step."""
        if self.fails == "observer" and stats.get_seq_length() == PROMPT_TOKENS + 3:
            raise RuntimeError("broken")


class TestPlugins:
    """Plugins that find fault, or fail."""

    def registry(self, fails: str) -> Registry:
        """The installed plugins, and one that fails."""
        return Registry(create_plugin_manager(plugins=[BadPlugin(fails=fails)]))

    def test_problems(self) -> None:
        """All problems at once, each with the plugin that sees it; the model is not attached."""
        with refused(
            ConfigError, "the policy does not fit", "- louiskv is not liked (says", "BadPlugin", "- 2 are too many"
        ):
            attach_once(model_of("Llama"), louiskv(), registry=self.registry("problems"))
        assert_untouched(model_of("Llama"))

    def test_failing_check(self) -> None:
        """Told with the plugin's name."""
        with refused(PluginError, "BadPlugin", "kvframe_check_policy failed: RuntimeError: broken"):
            attach_once(model_of("Llama"), louiskv(), registry=self.registry("check"))
        assert_untouched(model_of("Llama"))

    @pytest.mark.parametrize("fails", ["backend", "observer"])
    def test_failing_in_a_call(self, fails: str) -> None:
        """The call fails, the cache is empty, and the model works without the plugin."""
        model = model_of("Llama")
        with kvframe.attach(model, louiskv(), registry=self.registry(fails)) as run:
            with pytest.raises(Exception, match="broken"):
                generate(model)
            assert run.cache.get_seq_length() == 0
        with kvframe.attach(model, louiskv()) as run:
            assert_usable(run)


def test_a_config_shared_by_two_models_in_bad_order() -> None:
    """A failed attach does not free a config that another block holds."""
    config = make_config("Llama", attn_implementation="sdpa")
    first, second = (transformers.LlamaForCausalLM(config).eval() for _ in range(2))
    with kvframe.attach(first, louiskv()) as run:
        with refused(ConfigError, "attached already"):
            attach_once(second, louiskv())
        generate(first)

    assert run.report().rows_recalled > 0
    assert config._attn_implementation == "sdpa"
