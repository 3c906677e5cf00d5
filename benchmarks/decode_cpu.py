"""What a policy costs and saves on a CPU, with a real model: three ratios, each from one run.

    python benchmarks/decode_cpu.py [--context 8192] [--steps 64] [--json]

1. `window` against transformers' DynamicCache at the same number of attended tokens: what the framework costs a step.
2. LouisKV against DynamicCache at a long context: decode steps of the same model in the same run, in turns.
3. Time in k-means against the whole float32 prefill of that context.
"""

import argparse
import json
import os
import pydoc_data.topics
from statistics import median
from time import perf_counter
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from attrs import field, frozen
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel

import kvframe
from kvframe.models import fetch_smollm2
from kvframe.stages import UnitBuilder
from kvframe.types import Decision, LayerLayout, StepInputs, Units


@frozen(kw_only=True)
class TimedUnits(UnitBuilder):
    """Another unit builder, with the seconds of each `build` written down."""

    name = "timed"
    inner: UnitBuilder
    seconds: list[float] = field(factory=list, eq=False)

    @property
    def unit_size(self) -> int:
        return self.inner.unit_size

    @property
    def min_size(self) -> int:
        return self.inner.min_size

    @property
    def max_size(self) -> int:
        return self.inner.max_size

    def build(self, keys: Tensor) -> Units:
        start = perf_counter()
        units = self.inner.build(keys)
        self.seconds.append(perf_counter() - start)
        return units

    def init(self, layout: LayerLayout) -> Any:
        return self.inner.init(layout)

    def boundary(self, inputs: StepInputs, decision: Decision, state: Any) -> Tensor | None:
        return self.inner.boundary(inputs, decision, state)


class Decoder:
    """One prompt in one cache, decoded a step at a time."""

    def __init__(self, model: PreTrainedModel, ids: Tensor, cache: Any) -> None:
        self.model, self.cache = model, cache
        start = perf_counter()
        self.next = self._forward(ids)
        self.prefill_seconds = perf_counter() - start
        self.step_seconds: list[float] = []

    @torch.inference_mode()
    def _forward(self, ids: Tensor) -> Tensor:
        logits = self.model(input_ids=ids, past_key_values=self.cache, logits_to_keep=1).logits
        return logits[:, -1:].argmax(-1)

    def step(self) -> None:
        """Decode one token greedily."""
        start = perf_counter()
        self.next = self._forward(self.next)
        self.step_seconds.append(perf_counter() - start)


def in_turns(model: PreTrainedModel, stock: Decoder, policy: kvframe.Policy, ours: Decoder, steps: int) -> float:
    """Median over steps of ours / stock, the two decoding in turns so that both see the same machine."""
    ratios = []
    for _ in range(steps):
        stock.step()
        with kvframe.attach(model, policy):
            ours.step()
        ratios.append(ours.step_seconds[-1] / stock.step_seconds[-1])
    return median(ratios[2:])


def prepare(model: PreTrainedModel, ids: Tensor, policy: kvframe.Policy, max_length: int) -> Decoder:
    """The prompt under a policy."""
    with kvframe.attach(model, policy):
        return Decoder(model, ids, kvframe.RetrievalCache(model, policy, max_length=max_length))


def measure_window(model: PreTrainedModel, ids: Tensor, attended: int, steps: int) -> dict[str, Any]:
    """`window` on a prompt twice as long as what it attends to, against DynamicCache holding just that."""
    policy = kvframe.policy("window", sink_size=64, window_size=attended - 64)
    stock = Decoder(model, ids[:, :attended], DynamicCache(config=model.config))
    ours = prepare(model, ids[:, : 2 * attended], policy, 2 * attended + steps + 1)
    ratio = in_turns(model, stock, policy, ours, steps)
    return {
        "attended_tokens": attended,
        "dynamic_cache_ms": 1e3 * median(stock.step_seconds[2:]),
        "window_ms": 1e3 * median(ours.step_seconds[2:]),
        "ratio": ratio,
    }


def measure_louiskv(model: PreTrainedModel, ids: Tensor, steps: int) -> dict[str, Any]:
    """LouisKV against DynamicCache on the same prompt."""
    policy = kvframe.policy("louiskv")
    timed = TimedUnits(inner=policy.units)
    policy = policy.swap(units=timed)
    context = ids.shape[1]
    stock = Decoder(model, ids, DynamicCache(config=model.config))
    ours = prepare(model, ids, policy, context + steps + 1)
    ratio = in_turns(model, stock, policy, ours, steps)
    report = ours.cache.report()
    return {
        "context": context,
        "dynamic_cache_ms": 1e3 * median(stock.step_seconds[2:]),
        "louiskv_ms": 1e3 * median(ours.step_seconds[2:]),
        "ratio": ratio,
        "attended_tokens": report.attended_total,
        "retrieval_rate": report.retrieval_rate,
        "prefill_seconds": stock.prefill_seconds,
        "louiskv_prefill_seconds": ours.prefill_seconds,
        "clustering_seconds": sum(timed.seconds),
        "clustering_over_prefill": sum(timed.seconds) / stock.prefill_seconds,
        "prefill_ratio": ours.prefill_seconds / stock.prefill_seconds,
    }


def main() -> None:
    """Run the three measurements and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=8128, help="prompt of the LouisKV measurement")
    parser.add_argument("--attended", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    path = fetch_smollm2()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    text = "\n".join(pydoc_data.topics.topics.values())
    needed = max(args.context, 2 * max(args.attended))
    ids = AutoTokenizer.from_pretrained(path)(text, return_tensors="pt").input_ids[:, :needed]
    result = {
        "model": "SmolLM2-135M-Instruct, float32",
        "threads": args.threads,
        "torch": torch.__version__,
        "window": [measure_window(model, ids, attended, args.steps) for attended in args.attended],
    }
    torch.set_num_threads(max(args.threads, os.cpu_count() or 1))
    if args.context:
        result["louiskv"] = measure_louiskv(model, ids[:, : args.context], args.steps)
    if args.json:
        print(json.dumps(result, indent=2))
        return
    print(f"{result['model']}, {args.threads} thread(s), torch {result['torch']}")
    for row in result["window"]:
        print(
            f"window / DynamicCache, {row['attended_tokens']} tokens attended: {row['ratio']:.3f} "
            f"({row['window_ms']:.1f} / {row['dynamic_cache_ms']:.1f} ms a step)"
        )
    if args.context:
        row = result["louiskv"]
        print(
            f"louiskv / DynamicCache, {row['context']} tokens: {row['ratio']:.3f} ({row['louiskv_ms']:.1f} / "
            f"{row['dynamic_cache_ms']:.1f} ms a step), {row['attended_tokens']:.0f} attended, "
            f"retrieval rate {row['retrieval_rate']:.1%}"
        )
        print(
            f"k-means / prefill: {row['clustering_over_prefill']:.3f} ({row['clustering_seconds']:.1f} / "
            f"{row['prefill_seconds']:.1f} s); louiskv's prefill / stock's: {row['prefill_ratio']:.3f}"
        )


if __name__ == "__main__":
    main()
