"""What `generate` can be asked for on an attached model, and the report of it."""

import copy
import functools
import gc
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hf.tiny import (
    NEW_TOKENS,
    PADDING,
    PROMPT_TOKENS,
    VERSION,
    Answer,
    Prompt,
    assert_same,
    generate,
    louiskv,
    make_model,
    make_prompt,
    model_of,
    tight,
    tiny_llava,
)
from torch import Tensor
from transformers import DynamicCache, GenerationConfig
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging as transformers_logging

import kvframe
from kvframe import LayerLayout, hookimpl
from kvframe.errors import ConfigError
from kvframe.hf import ATTENTION_NAME, RetrievalCache
from kvframe.plugins import create_plugin_manager
from kvframe.registry import Registry
from kvframe_kernels.slot_attention import slot_attention

HYBRIDS = {"Gemma3": [1, 3], "Qwen3Next": [1, 2], "Lfm2": [1, 2], "Jamba": [1]}


@functools.cache
def plain(family: str = "Llama") -> Answer:
    """The two-row prompt, answered by the model as it is."""
    return generate(model_of(family))


@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
def test_heads(num_kv_heads: int) -> None:
    """Multi-head, grouped-query and multi-query attention."""
    model = make_model("Llama", num_key_value_heads=num_kv_heads)
    expected = generate(model)

    with kvframe.attach(model, louiskv()):
        assert_same(generate(model), expected)


def test_sampling_several_sequences() -> None:
    """With the same seed the same sequences are drawn, three for every prompt."""
    # In float32 a difference in the last digit now and then draws another token.
    model = make_model("Llama", dtype=torch.float64)
    settings = {"do_sample": True, "num_return_sequences": 3, "temperature": 1.5}
    torch.manual_seed(3)
    expected = generate(model, **settings)
    torch.manual_seed(3)
    with kvframe.attach(model, louiskv()) as run:
        answer = generate(model, **settings)

    assert len({tuple(row) for row in answer.tokens.tolist()}) == 6
    assert_same(answer, expected)
    assert run.cache.batch_size == 6


class TestTurns:
    """Several calls on one cache."""

    @pytest.fixture
    def turns(self) -> list[Prompt]:
        """The prompts of three turns, each with what the model as it is answered to those before."""
        prompts = [make_prompt()]
        for seed in (1, 2):
            before = generate(model_of("Llama"), prompts[-1])
            text = make_prompt(num_tokens=7, padding=0, seed=seed)
            ids = torch.cat([before.tokens, text.input_ids], 1)
            mask = torch.ones_like(ids)
            mask[1, :PADDING] = 0
            prompts.append(Prompt(ids, mask))
        return prompts

    @pytest.mark.parametrize("only_new", [False, True], ids=["all-ids", "new-ids"])
    @pytest.mark.parametrize("execution", ["offload", "dense", "shadow"])
    def test_turns(self, turns: list[Prompt], only_new: bool, execution: Any) -> None:
        """All ids again, or those not yet cached with a mask over everything: as without a cache."""
        model = model_of("Llama")
        expected = [generate(model, prompt) for prompt in turns]
        with kvframe.attach(model, louiskv(), execution=execution) as run:
            answers = [generate(model, turns[0])]
            for prompt in turns[1:]:
                num_cached = run.cache.get_seq_length()
                ids = prompt.input_ids[:, num_cached:] if only_new else prompt.input_ids
                settings = {"past_key_values": run.cache}
                answers.append(generate(model, Prompt(ids, prompt.attention_mask), **settings))

        for answer, prompt, wanted in zip(answers, turns, expected):
            new = answer.tokens[:, -NEW_TOKENS:]
            assert_same(Answer(torch.cat([prompt.input_ids, new], 1), answer.logits), wanted)
        # The last token of a call is never cached; the text of a turn is attended in full and counts no step.
        assert run.cache.get_seq_length() == expected[-1].tokens.shape[1] - 1
        assert run.report().num_decode_steps == 3 * (NEW_TOKENS - 1)

    @pytest.mark.skipif(VERSION.release < (5, 23), reason="older transformers restart a warm chunked prefill; refused")
    def test_chunked_second_turn(self, turns: list[Prompt]) -> None:
        """A later turn may be read in chunks as well."""
        model = model_of("Llama")
        with kvframe.attach(model, louiskv()) as run:
            generate(model, turns[0], prefill_chunk_size=16)
            answer = generate(model, turns[1], prefill_chunk_size=3, past_key_values=run.cache)

        assert_same(answer, generate(model, turns[1]))

    def test_nothing_is_allocated_step_by_step(self, monkeypatch: pytest.MonkeyPatch, turns: list[Prompt]) -> None:
        """A turn makes room once, when it begins."""
        monkeypatch.setattr("kvframe.runtime.layer._SLAB_ROWS", 1)
        monkeypatch.setattr("kvframe.dense_layer._SLAB_ROWS", 1)
        model = model_of("Llama")
        with kvframe.attach(model, louiskv(dense_layers=(0,))) as run:
            generate(model, turns[0])
            sizes: list[int] = []
            stopping = [lambda ids, scores, **_: sizes.append(run.report().device_kv_bytes) or _never(ids)]
            generate(model, turns[1], past_key_values=run.cache, stopping_criteria=stopping)

        assert len(sizes) == NEW_TOKENS and len(set(sizes)) == 1


def _never(ids: Tensor) -> Tensor:
    return torch.zeros(ids.shape[0], dtype=torch.bool)


class TestProposedTokens:
    """Decoding that proposes tokens and takes some of them back with `crop`."""

    prompt = make_prompt(batch_size=1, num_tokens=12)
    repeated = Prompt(prompt.input_ids.repeat(1, 3), prompt.attention_mask.repeat(1, 3))

    @pytest.mark.parametrize("family", ["Llama", "Gemma3"])
    @pytest.mark.parametrize("execution", ["offload", "dense", "shadow"])
    def test_prompt_lookup(self, family: str, execution: Any) -> None:
        """Tokens proposed from the prompt change nothing."""
        model = model_of(family)
        expected = generate(model, self.repeated)
        with kvframe.attach(model, louiskv(), execution=execution) as run:
            answer = generate(model, self.repeated, prompt_lookup_num_tokens=4, max_matching_ngram_size=1)

        assert_same(answer, expected)
        assert run.cache.get_seq_length() == expected.tokens.shape[1] - 1

    @pytest.mark.parametrize("family", ["Llama", "Gemma3"])
    @pytest.mark.parametrize("good", [True, False], ids=["good-assistant", "bad-assistant"])
    def test_assistant(self, family: str, good: bool) -> None:
        """An assistant's tokens, nearly all of them right or nearly all of them wrong, change nothing."""
        model = model_of(family)
        assistant = make_model(family) if good else make_model("Llama", num_hidden_layers=1)
        expected = generate(model, self.prompt)
        with kvframe.attach(model, louiskv()) as run:
            answer = generate(model, self.prompt, assistant_model=assistant)

        assert_same(answer, expected)
        steps = run.report().num_decode_steps
        assert steps < NEW_TOKENS // 2 if good else steps > NEW_TOKENS // 2

    def test_its_own_assistant(self) -> None:
        """A model may propose to itself, over a cache of its own; the report is of the main one."""
        model = model_of("Llama")
        expected = generate(model, self.prompt)
        with kvframe.attach(model, louiskv()) as run:
            answer = generate(model, self.prompt, assistant_model=model)

        assert_same(answer, expected)
        assert run.cache.get_seq_length() == expected.tokens.shape[1] - 1

    def test_tight_budget(self) -> None:
        """Proposed tokens retrieve as decoding does, in `offload` just as in `dense`."""
        model = model_of("Llama")
        answers = []
        for execution in ("offload", "dense"):
            with kvframe.attach(model, tight(), execution=execution):
                answers.append(generate(model, self.repeated, prompt_lookup_num_tokens=4, max_matching_ngram_size=1))

        assert_same(answers[0], answers[1])

    def test_crop(self) -> None:
        """Zero removes nothing; older transformers pass the length to keep; more than there is is refused."""
        model = model_of("Llama")
        with kvframe.attach(model, louiskv()) as run, torch.no_grad():
            cache = run.new_cache()
            model(self.prompt.input_ids, past_key_values=cache)
            for argument, length in ((0, 12), (-2, 10), (7, 7)):
                cache.crop(argument)
                assert cache.get_seq_length() == length
            logits = model(self.prompt.input_ids[:, 7:], past_key_values=cache).logits
            with pytest.raises(ValueError, match="crop of 13 tokens asked for, but the shortest sequence has 12"):
                cache.crop(-13)
            assert cache.get_seq_length() == 12

        torch.testing.assert_close(logits, model(self.prompt.input_ids).logits[:, 7:], atol=1e-4, rtol=0)


class TestHybrids:
    """Models in which some layers slide, or have a state of their own."""

    @pytest.mark.parametrize("prefill", [None, 7], ids=["one-shot", "chunked"])
    @pytest.mark.parametrize("family", HYBRIDS)
    def test_generate(self, family: str, prefill: int | None) -> None:
        """They give what they gave, twice on one cache."""
        model = model_of(family)
        # In chunks too, because Jamba's state-space layers give something else then.
        expected = generate(model, prefill_chunk_size=prefill)
        with kvframe.attach(model, louiskv()) as run:
            first = generate(model, prefill_chunk_size=prefill)
            run.cache.reset()
            second = generate(model, prefill_chunk_size=prefill, past_key_values=run.cache)

        assert_same(first, expected)
        assert torch.equal(first.logits, second.logits)

    @pytest.mark.parametrize("family", HYBRIDS)
    def test_other_layers_stay_stock(self, family: str) -> None:
        """Only layers with a full KV cache follow the policy."""
        model = model_of(family)
        stock = DynamicCache(config=model.config).layers
        cache = RetrievalCache(model, louiskv())

        assert [layer.layer_idx for layer in cache.managed_layers] == HYBRIDS[family]
        for layer_idx, layer in enumerate(cache.layers):
            assert (type(layer) is type(stock[layer_idx])) == (layer_idx not in HYBRIDS[family])


class TestChunkedPrefill:
    """A prompt that is read in chunks."""

    # Of 40 tokens, chunks of 13 and 39 leave one alone, and chunks of 1 leave them all alone.
    @pytest.mark.parametrize("chunk_size", [1, 7, 13, 39, 40, 64])
    def test_chunks(self, chunk_size: int) -> None:
        """As in one go, with padding that ends in any chunk; a token alone is prompt, not a decode step."""
        model = model_of("Llama")
        with kvframe.attach(model, louiskv()) as run:
            answer = generate(model, prefill_chunk_size=chunk_size)

        assert_same(answer, plain())
        assert run.report().num_decode_steps == NEW_TOKENS - 1

    @pytest.mark.parametrize("dtype", [torch.long, torch.bool])
    @pytest.mark.parametrize("chunk_size", [1, 7])
    def test_one_mask_for_all_chunks(self, chunk_size: int, dtype: torch.dtype) -> None:
        """A mask may cover tokens that are still to come, and be the same for every forward pass."""
        model, prompt = model_of("Llama"), make_prompt()
        mask, ids = prompt.attention_mask.to(dtype), prompt.input_ids
        positions = (prompt.attention_mask.cumsum(1) - 1).clamp(min=0)
        expected = model(ids, attention_mask=mask, position_ids=positions).logits
        logits = []
        with kvframe.attach(model, louiskv()) as run, torch.no_grad():
            cache = run.new_cache()
            cache.prompt_end = PROMPT_TOKENS
            for part in torch.arange(PROMPT_TOKENS).split(chunk_size):
                inputs = {"attention_mask": mask, "position_ids": positions[:, part], "past_key_values": cache}
                logits.append(model(ids[:, part], **inputs).logits)

        real = prompt.attention_mask.bool()
        torch.testing.assert_close(torch.cat(logits, 1)[real], expected[real], atol=1e-4, rtol=0)

    @pytest.mark.parametrize("chunk_size", [1, 13])
    def test_executions_agree(self, chunk_size: int) -> None:
        """Under a tight budget `offload` gives what `dense` gives."""
        answers = []
        for execution in ("offload", "dense"):
            with kvframe.attach(model_of("Llama"), tight(), execution=execution):
                answers.append(generate(model_of("Llama"), prefill_chunk_size=chunk_size))

        assert_same(answers[0], answers[1])


@contextmanager
def transformers_log(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """What transformers logs inside goes to `caplog`, also what it says once only."""
    transformers_logging.warning_once.cache_clear()
    transformers_logging.enable_propagation()
    try:
        yield
    finally:
        transformers_logging.disable_propagation()


class TestSettings:
    """Ways to pass arguments."""

    def test_cache_implementation(self) -> None:
        """One that a checkpoint, a config or the call asks for gives way to ours."""
        model = make_model("Llama")
        model.generation_config.cache_implementation = "static"
        config = GenerationConfig(cache_implementation="static", max_new_tokens=NEW_TOKENS, do_sample=False)
        with kvframe.attach(model, louiskv()) as run:
            for settings in ({}, {"cache_implementation": "dynamic"}):
                assert_same(generate(model, **settings), plain())
                assert run.report().num_decode_steps == NEW_TOKENS - 1
            model.generation_config.cache_implementation = None
            prompt = make_prompt()
            tokens = model.generate(prompt.input_ids, config, attention_mask=prompt.attention_mask)

        assert tokens.tolist() == plain().tokens.tolist()
        assert run.report().num_decode_steps == NEW_TOKENS - 1

    def test_nothing_is_added_to_a_generation_config(self, caplog: pytest.LogCaptureFixture) -> None:
        """transformers warns where one comes with further settings, so none of ours come with it."""
        config = GenerationConfig(max_new_tokens=2, do_sample=False)
        prompt = make_prompt()
        with kvframe.attach(model_of("Llama"), louiskv()), transformers_log(caplog):
            model_of("Llama").generate(**prompt._asdict(), generation_config=config)
        assert caplog.text == ""

        with transformers_log(caplog):
            model_of("Llama").generate(**prompt._asdict(), generation_config=config, max_new_tokens=3)
        assert "Passing `generation_config` together with" in caplog.text

    def test_streamer(self) -> None:
        """Tokens are streamed as they come."""

        class Collector(BaseStreamer):
            def __init__(self) -> None:
                self.tokens: list[int] = []
                self.ended = False

            def put(self, value: Tensor) -> None:
                self.tokens += value.flatten().tolist()

            def end(self) -> None:
                self.ended = True

        collector, prompt = Collector(), make_prompt(batch_size=1)
        with kvframe.attach(model_of("Llama"), louiskv()):
            answer = generate(model_of("Llama"), prompt, streamer=collector)

        assert collector.tokens == answer.tokens[0].tolist()
        assert collector.ended

    def test_embeddings(self) -> None:
        """A prompt of embeddings is as good as one of ids."""
        model, prompt = model_of("Llama"), make_prompt()
        embeddings = model.get_input_embeddings()(prompt.input_ids)
        settings = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "attention_mask": prompt.attention_mask}
        with kvframe.attach(model, louiskv()) as run:
            first = model.generate(inputs_embeds=embeddings, **settings)
            ids = torch.cat([prompt.input_ids, first, make_prompt(num_tokens=3, padding=0).input_ids], 1)
            mask = torch.ones_like(ids)
            mask[1, :PADDING] = 0
            settings |= {"attention_mask": mask, "past_key_values": run.cache}
            second = model.generate(inputs_embeds=model.get_input_embeddings()(ids), **settings)

        assert first.tolist() == plain().tokens[:, PROMPT_TOKENS:].tolist()
        assert second.tolist() == generate(model, Prompt(ids, mask)).tokens[:, ids.shape[1] :].tolist()

    def test_inferred_padding(self) -> None:
        """Without a mask transformers reads the padding from the ids."""
        with kvframe.attach(model_of("Llama"), louiskv()):
            tokens = model_of("Llama").generate(make_prompt().input_ids, do_sample=False, max_new_tokens=NEW_TOKENS)

        assert tokens.tolist() == plain().tokens.tolist()

    def test_no_cache_before_the_first_call(self) -> None:
        """There is nothing to report then, and that is said."""
        with (
            kvframe.attach(model_of("Llama"), louiskv()) as run,
            pytest.raises(ConfigError, match="call model.generate"),
        ):
            run.report()


class TestCaches:
    """Caches by themselves."""

    @pytest.mark.parametrize("execution", ["offload", "dense", "shadow"])
    @pytest.mark.parametrize("family", ["Llama", "Gemma3"])
    def test_prefix_reuse(self, family: str, execution: Any) -> None:
        """A copy of a filled cache serves another text with the same beginning; the original stays as it was."""
        model, prompt = model_of(family), make_prompt(padding=0)
        texts = [make_prompt(num_tokens=5, padding=0, seed=seed).input_ids for seed in (1, 2, 3)]
        prompts = [make_full(torch.cat([prompt.input_ids, text], 1)) for text in texts]
        expected = [generate(model, full) for full in prompts]
        with kvframe.attach(model, louiskv(), execution=execution) as run:
            prefix = run.new_cache()
            with torch.no_grad():
                model(prompt.input_ids, past_key_values=prefix)
            copies = [copy.deepcopy(prefix) for _ in prompts[:2]]
            answers = [generate(model, full, past_key_values=cache) for full, cache in zip(prompts, [*copies, prefix])]

        for answer, wanted in zip(answers, expected):
            assert_same(answer, wanted)

    def test_copies_share_what_is_not_text(self) -> None:
        """Neither the model's config nor the policy nor the plugins are copied."""
        cache = RetrievalCache(model_of("Llama"), louiskv())
        twin = copy.deepcopy(cache)

        assert twin.config is cache.config and twin.policy is cache.policy
        assert {id(layer.cache) for layer in twin.managed_layers} == {id(twin)}

    def test_reset(self) -> None:
        """A second run on a reset cache equals the first, in what comes out and in what is counted."""
        model = model_of("Llama")
        with kvframe.attach(model, tight()) as run:
            first, report = generate(model), run.report().to_dict()
            runtimes = [layer.runtime for layer in run.cache.managed_layers]
            run.cache.reset()
            assert run.cache.get_seq_length() == 0
            second = generate(model, past_key_values=run.cache)

        assert torch.equal(first.logits, second.logits)
        assert [layer.runtime for layer in run.cache.managed_layers] == runtimes
        again = run.report().to_dict()
        timed = {"seconds_to_first_token", "tokens_per_second"}
        assert {k: v for k, v in again.items() if k not in timed} == {k: v for k, v in report.items() if k not in timed}

    def test_reset_for_another_batch(self) -> None:
        """A cache that holds nothing takes any batch, also by a plain forward pass."""
        model, one = model_of("Llama"), make_prompt(batch_size=1)
        with kvframe.attach(model, louiskv()) as run:
            generate(model)
            run.cache.reset()
            assert_same(generate(model, one, past_key_values=run.cache), generate(model, one))
            run.cache.reset()
            with torch.no_grad():
                model(**make_prompt()._asdict(), past_key_values=run.cache)

        assert run.cache.batch_size == 2

    def test_memory_goes_with_the_cache(self) -> None:
        """Nothing waits for the garbage collector."""
        model = model_of("Llama")
        gc.collect()
        gc.disable()
        try:
            with kvframe.attach(model, louiskv()) as run:
                generate(model)
                runtimes = [weakref.ref(layer.runtime) for layer in run.cache.managed_layers]
            del run
            assert [runtime() for runtime in runtimes] == [None, None]
        finally:
            gc.enable()

    def test_unplanned_length(self) -> None:
        """A cache that was told to expect less grows."""
        model, prompt = model_of("Llama"), make_prompt()
        cache = RetrievalCache(model, louiskv(dense_layers=(0,)), max_length=4)
        with kvframe.attach(model, louiskv()), torch.no_grad():
            positions = (prompt.attention_mask.cumsum(1) - 1).clamp(min=0)
            logits = [model(**prompt._asdict(), position_ids=positions, past_key_values=cache).logits[:, -1]]
            for column in range(NEW_TOKENS - 1):
                ids = plain().tokens[:, PROMPT_TOKENS + column, None]
                positions = prompt.attention_mask.sum(1, keepdim=True) + column
                logits.append(model(ids, position_ids=positions, past_key_values=cache).logits[:, -1])

        torch.testing.assert_close(torch.stack(logits, 1), plain().logits, atol=1e-4, rtol=0)

    @pytest.mark.parametrize("extend, num_steps", [("full", 0), ("retrieve", 1)])
    def test_extend(self, extend: Any, num_steps: int) -> None:
        """Several tokens on a filled cache are more prompt, or proposed tokens: as the cache was told."""
        model, prompt = model_of("Llama"), make_prompt(padding=0)
        ids = prompt.input_ids
        with kvframe.attach(model, louiskv()), torch.no_grad():
            cache = RetrievalCache(model, louiskv(), extend=extend)
            model(ids[:, :30], past_key_values=cache)
            logits = model(ids[:, 30:], past_key_values=cache).logits

        torch.testing.assert_close(logits, model(ids).logits[:, 30:], atol=1e-4, rtol=0)
        assert cache.report().num_decode_steps == num_steps


def make_full(ids: Tensor) -> Prompt:
    """Ids without padding."""
    return Prompt(ids, torch.ones_like(ids))


class TestLoadedByName:
    """A model made with attn_implementation="kvframe", which needs no attach."""

    @pytest.fixture
    def model(self) -> Any:
        """The same weights as the shared model has."""
        return make_model("Llama", attention=ATTENTION_NAME)

    def test_generate(self, model: Any) -> None:
        """The cache is all it takes."""
        cache = RetrievalCache(model, louiskv())

        assert_same(generate(model, past_key_values=cache), plain())
        assert cache.report().rows_recalled > 0

    def test_without_our_cache(self, model: Any) -> None:
        """Otherwise it is a stock model with sdpa attention."""
        assert torch.equal(generate(model).logits, plain().logits)

    def test_attach(self, model: Any) -> None:
        """It can be attached all the same, and keeps its name afterwards."""
        with kvframe.attach(model, louiskv()) as run:
            assert_same(generate(model), plain())
            with torch.no_grad():
                inputs = make_prompt()._asdict()
                assert torch.equal(model(**inputs).logits, model_of("Llama")(**inputs).logits)

        assert run.report().rows_recalled > 0
        assert model.config._attn_implementation == ATTENTION_NAME
        assert torch.equal(generate(model).logits, plain().logits)

    def test_alternating_caches(self, model: Any) -> None:
        """Two texts, step by step in turns, do not disturb each other."""
        prompts = [make_prompt(padding=0, seed=seed) for seed in (0, 1)]
        expected = [generate(model_of("Llama"), prompt) for prompt in prompts]
        caches = [RetrievalCache(model, louiskv()) for _ in prompts]
        logits: list[list[Tensor]] = [[], []]
        with torch.no_grad():
            for step in range(NEW_TOKENS):
                for number, (cache, answer) in enumerate(zip(caches, expected)):
                    start = 0 if step == 0 else PROMPT_TOKENS + step - 1
                    ids = answer.tokens[:, start : PROMPT_TOKENS + step]
                    logits[number].append(model(ids, past_key_values=cache).logits[:, -1])

        for number, answer in enumerate(expected):
            torch.testing.assert_close(torch.stack(logits[number], 1), answer.logits, atol=1e-4, rtol=0)

    def test_threads(self, model: Any) -> None:
        """Two threads, each with a cache, on one model."""
        prompts = [make_prompt(seed=seed) for seed in (0, 1)]
        expected = [generate(model_of("Llama"), prompt) for prompt in prompts]
        answers: dict[int, Answer] = {}

        def work(number: int) -> None:
            answers[number] = generate(model, prompts[number], past_key_values=RetrievalCache(model, louiskv()))

        threads = [threading.Thread(target=work, args=(number,)) for number in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

        for number, answer in enumerate(expected):
            assert_same(answers[number], answer)


class TestExecutions:
    """`dense`, `offload` and `shadow` on a whole model."""

    def test_dense_is_offload(self) -> None:
        """Under a tight budget the two agree, though only one moves anything."""
        answers, reports = {}, {}
        for execution in ("offload", "dense"):
            with kvframe.attach(model_of("Llama"), tight(), execution=execution) as run:
                answers[execution] = generate(model_of("Llama"))
            reports[execution] = run.report()

        assert_same(answers["offload"], answers["dense"])
        assert reports["offload"].rows_recalled == reports["dense"].rows_recalled > 0
        assert reports["offload"].bytes_to_device > reports["dense"].bytes_to_device == 0
        assert reports["dense"].captured_mass is None

    def test_shadow_changes_nothing(self) -> None:
        """Full attention drives, however tight the budget; the policy is seen to miss some of it."""
        with kvframe.attach(model_of("Llama"), tight(), execution="shadow") as run:
            answer = generate(model_of("Llama"))
        report = run.report()

        assert_same(answer, plain())
        for layer in report.layers:
            assert layer.captured_mass is not None and 0 < layer.captured_mass < 1
            assert layer.oracle_recall is not None and 0 < layer.oracle_recall < 1

    def test_shadow_of_a_full_budget(self) -> None:
        """What attends to everything misses nothing."""
        with kvframe.attach(model_of("Llama"), louiskv(), execution="shadow") as run:
            generate(model_of("Llama"))
        report = run.report()

        assert report.captured_mass == pytest.approx(1.0, abs=1e-5)
        assert report.oracle_recall == 1.0

    def test_the_oracle_recalls_everything(self) -> None:
        """Exact scores choose what the full softmax weighs most, among what is neither sink nor window."""
        masses = {}
        for name in ("oracle_topk", "window"):
            budget = {"token_budget": 10} if name == "oracle_topk" else {}
            policy = kvframe.policy(name, sink_size=2, window_size=8, dense_layers=(), **budget)
            with kvframe.attach(model_of("Llama"), policy, execution="shadow") as run:
                generate(model_of("Llama"))
            masses[name] = run.report().captured_mass

        assert masses["window"] < masses["oracle_topk"] <= 1


class Plugin(SimpleNamespace):
    """A plugin in one object."""

    KVFRAME_API_VERSION = 1

    def __init__(self) -> None:
        super().__init__(layouts=[], calls=0, lengths=[])

    @hookimpl
    def kvframe_attention_backend(self, layout: LayerLayout) -> Any:
        """Kernels for all layers but the first."""
        if layout.layer_idx == 0:
            return None
        self.layouts.append(layout)

        def attend(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return slot_attention(*args, **kwargs)

        return attend

    @hookimpl
    def kvframe_step_finished(self, stats: RetrievalCache) -> None:
        """The text grows by a token a step, and all layers have it."""
        self.lengths.append(stats.get_seq_length())


class TestPlugins:
    """Plugins of a registry that was passed."""

    @pytest.fixture
    def plugin(self) -> Plugin:
        """A fresh one."""
        return Plugin()

    @pytest.fixture
    def registry(self, plugin: Plugin) -> Registry:
        """The installed plugins and this one."""
        return Registry(create_plugin_manager(plugins=[plugin]))

    def test_attention_backend(self, plugin: Plugin, registry: Registry) -> None:
        """Asked once a layer, and used at every step where it did not decline."""
        with kvframe.attach(model_of("Llama"), louiskv(), registry=registry):
            answer = generate(model_of("Llama"))

        assert_same(answer, plain())
        assert [layout.layer_idx for layout in plugin.layouts] == [1]
        assert plugin.calls == NEW_TOKENS - 1

    @pytest.mark.parametrize("chunk_size", [None, 13])
    def test_observer(self, plugin: Plugin, registry: Registry, chunk_size: int | None) -> None:
        """Called once a decode step, and not for the prompt."""
        with kvframe.attach(model_of("Llama"), louiskv(), registry=registry):
            generate(model_of("Llama"), prefill_chunk_size=chunk_size)

        assert plugin.lengths == list(range(PROMPT_TOKENS + 1, PROMPT_TOKENS + NEW_TOKENS))


class TestModes:
    """Autograd modes and precisions."""

    def test_inference_mode(self) -> None:
        """What was allocated in inference mode serves a turn outside of it, and what came before serves one inside."""
        model = model_of("Llama")
        for inside in ((True, False), (False, True)):
            with kvframe.attach(model, louiskv(dense_layers=(0,))) as run:
                with torch.inference_mode(inside[0]):
                    first = generate(model)
                ids = torch.cat([first.tokens.clone(), make_prompt(num_tokens=3, padding=0).input_ids], 1)
                mask = torch.ones_like(ids)
                mask[1, :PADDING] = 0
                with torch.inference_mode(inside[1]):
                    second = generate(model, Prompt(ids, mask), past_key_values=run.cache)
                run.cache.reset()
            assert_same(first, plain())
            assert_same(second, generate(model, Prompt(ids, mask)))

    # Of the largest logit: what rounding to 8 or 11 bits does to a model of two layers.
    @pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
    def test_half_precision(self, dtype: torch.dtype, tolerance: float) -> None:
        """In half precision logits stay within its rounding of the stock model's, over the same tokens."""
        model, prompt, tokens = make_model("Llama", dtype=dtype), make_prompt(padding=0), plain().tokens

        @torch.no_grad()
        def logits(cache: Any) -> Tensor:
            parts = [model(prompt.input_ids, past_key_values=cache).logits[:, -1]]
            for column in range(PROMPT_TOKENS, PROMPT_TOKENS + 8):
                parts.append(model(tokens[:, column, None], past_key_values=cache).logits[:, -1])
            return torch.stack(parts).float()

        expected = logits(DynamicCache(config=model.config))
        with kvframe.attach(model, louiskv()) as run:
            actual = logits(run.new_cache())
            assert generate(model).tokens.shape == plain().tokens.shape

        assert float((actual - expected).abs().max()) <= tolerance * float(expected.abs().max())


def test_vision_language_model() -> None:
    """Of a model that sees, the text tower alone is switched, and a text prompt gives what it gave."""
    model = tiny_llava()
    prompt = make_prompt()
    expected = generate(model, prompt)
    with kvframe.attach(model, louiskv()) as run:
        names = [model.config, model.config.vision_config, model.config.text_config]
        assert [config._attn_implementation for config in names] == ["sdpa", "sdpa", ATTENTION_NAME]
        assert_same(generate(model, prompt), expected)

    assert run.report().rows_recalled > 0
    assert model.config.text_config._attn_implementation == "sdpa"
