"""A context whose KV does not fit on the card, generated with a stock model: KV retrieval beside the full cache.

The process is held to `--gpu-memory` of the device. The model has the shape of Llama-3.1-8B and random weights, because
only memory and time are looked at. Run it on a machine with a CUDA device:

    python benchmarks/long_context.py --context 130816 --new-tokens 256 --gpu-memory 24
"""

import argparse
import threading
import time
from collections.abc import Callable
from typing import Any

import torch

import kvframe
from kvframe.bench.model import config_of, make_model
from kvframe.hf.shape import model_shape
from kvframe.memory.pinned import pinned_memory
from kvframe.planner import Device, plan

GIB = 2**30


class Watch:
    """The most device memory in use, by all of the device, looked at every few milliseconds."""

    def __init__(self) -> None:
        self.peak = 0
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def _look(self) -> None:
        while not self._is_over.wait(0.005):
            free, total = torch.cuda.mem_get_info()
            self.peak = max(self.peak, total - free)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()


def run(name: str, generate: Callable[[], Any]) -> None:
    """One way to generate; says what came of it."""
    torch.cuda.empty_cache()
    torch.cuda.synchronize()
    with Watch() as watch:
        start = time.perf_counter()
        try:
            generate()
            torch.cuda.synchronize()
            outcome = f"completed in {time.perf_counter() - start:.1f} s"
        except torch.cuda.OutOfMemoryError as error:
            outcome = f"failed after {time.perf_counter() - start:.1f} s: {str(error).splitlines()[0][:120]}"
    print(f"{name:<14} {outcome}; peak in use on the device {watch.peak / GIB:.2f} GiB", flush=True)


def main() -> None:
    """Parse the command line, and run both ways."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=130816, help="tokens of the prompt")
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--gpu-memory", type=float, default=24.0, help="GiB that the process is held to")
    parser.add_argument("--model-shape", default="llama-3.1-8b")
    arguments = parser.parse_args()

    device = torch.device("cuda")
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.init()
    free, _ = torch.cuda.mem_get_info()
    context = total - free  # the CUDA context of this process, and whatever else uses the device
    torch.cuda.set_per_process_memory_fraction((arguments.gpu_memory * GIB - context) / total)
    policy = kvframe.policy("louiskv", token_budget=1024)
    shape = model_shape(config_of(arguments.model_shape), torch.bfloat16)
    planned = plan(
        shape, policy, Device(gpu_memory=int(arguments.gpu_memory * GIB)), context=arguments.context,
        max_new_tokens=arguments.new_tokens,
    )  # fmt: skip
    chunk = planned.chunk
    print(
        f"held to {arguments.gpu_memory:.1f} GiB; planned {planned.memory.gpu_bytes / GIB:.2f} GiB, chunks of {chunk}"
    )
    model: Any = make_model(arguments.model_shape, device)
    print(f"weights {sum(p.nbytes for p in model.parameters()) / GIB:.2f} GiB", flush=True)
    ids = torch.randint(3, model.config.vocab_size, (1, arguments.context), device=device)
    options = {
        "attention_mask": torch.ones_like(ids), "max_new_tokens": arguments.new_tokens, "do_sample": False,
        "min_new_tokens": arguments.new_tokens, "prefill_chunk_size": chunk, "pad_token_id": 0,
    }  # fmt: skip

    run("full cache", lambda: model.generate(ids, **options))
    with kvframe.attach(model, policy) as attached:
        run("louiskv", lambda: model.generate(ids, **options))
        report = attached.report()
        print(report)
        print(f"pinned {pinned_memory().held_bytes / GIB:.2f} GiB in {pinned_memory().pinning_seconds:.1f} s")


if __name__ == "__main__":
    main()
