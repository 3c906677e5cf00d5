"""The kernels that write slots, the ledger and the pool, for a memory checker: each once more at awkward sizes.

    compute-sanitizer --tool memcheck --report-api-errors no --error-exitcode 1 python benchmarks/sanitized.py
    compute-sanitizer --tool racecheck --report-api-errors no --error-exitcode 1 python benchmarks/sanitized.py

`attend` runs attention as well, if it is asked for: racecheck then reports threads that write the same number to the
same place of shared memory, which Triton's sums over fewer numbers than threads do.

Every result is compared with the operation's reference, so that a checker that changes what runs is noticed. It needs a
CUDA device.
"""

import math
import sys

import torch
from torch import Tensor

from kvframe_kernels.append_token import NUM_COUNTS, Slots, append_token
from kvframe_kernels.gather_kv import gather_kv, store_token
from kvframe_kernels.key_sketch import Sketch, window_sketch
from kvframe_kernels.select_units import exchange_resident, select_runs, select_units
from kvframe_kernels.select_units.reference import NUM_TALLIES
from kvframe_kernels.slot_attention import make_arrivals, slot_attention
from kvframe_kernels.unattended_tokens import unattended_tokens

BATCH_SIZE, NUM_KV_HEADS, GROUP_SIZE, WIDTH, VALUE = 2, 3, 5, 80, 48
SINK_SIZE, WINDOW_SIZE, MIN_SIZE, MAX_SIZE, CAPACITY = 3, 21, 4, 13, 37
HEADS = (BATCH_SIZE, NUM_KV_HEADS)


def make_slots(dtype: torch.dtype, device: str) -> Slots:
    """Empty slots."""
    num_slots = SINK_SIZE + CAPACITY + WINDOW_SIZE + MAX_SIZE
    return Slots(
        keys=torch.zeros(*HEADS, num_slots, WIDTH, dtype=dtype, device=device),
        values=torch.zeros(*HEADS, num_slots, VALUE, dtype=dtype, device=device),
        bias=torch.full((*HEADS, num_slots), -math.inf, dtype=dtype, device=device),
        resident_rows=torch.full((*HEADS, CAPACITY), -1, dtype=torch.int64, device=device),
        sink_size=SINK_SIZE,
    )


def same(kernel: Tensor, reference: Tensor, what: str) -> None:
    """Raise RuntimeError unless the two are equal."""
    if not torch.equal(kernel.cpu(), reference.cpu()):
        raise RuntimeError(f"{what}: the kernel's result is not the reference's")


def append(num_steps: int) -> None:
    """Tokens one by one, units of random sizes leaving the window."""
    generator = torch.Generator().manual_seed(0)
    states = []
    for device in ("cuda", "cpu"):
        counts = torch.zeros(NUM_COUNTS, *HEADS, dtype=torch.int64, device=device)
        offsets = torch.full((*HEADS, num_steps // MIN_SIZE + 3), SINK_SIZE, dtype=torch.int32, device=device)
        states.append((counts, offsets, make_slots(torch.float16, device), torch.ones(HEADS, device=device) > 0))
    for _ in range(num_steps):
        cut = torch.rand(HEADS, generator=generator) < 0.2
        keys = torch.randn(*HEADS, WIDTH, generator=generator).half()
        values = torch.randn(*HEADS, VALUE, generator=generator).half()
        for counts, offsets, slots, finite in states:
            at = counts.device
            append_token(
                counts, offsets, cut.to(at), keys.to(at), values.to(at), slots, finite,
                window_size=WINDOW_SIZE, min_size=MIN_SIZE, max_size=MAX_SIZE,
            )  # fmt: skip
    (counts, offsets, slots, _), (ref_counts, ref_offsets, ref_slots, _) = states
    same(counts, ref_counts, "append_token, counters")
    same(offsets, ref_offsets, "append_token, offsets")
    same(slots.bias, ref_slots.bias, "append_token, bias")
    filled = ref_slots.bias == 0
    same(slots.keys[filled.cuda()], ref_slots.keys[filled], "append_token, keys")
    same(slots.values[filled.cuda()], ref_slots.values[filled], "append_token, values")


def select(num_units: int, num_selections: int) -> None:
    """Selections one after the other, and what of them is missing."""
    generator = torch.Generator().manual_seed(1)
    sizes = torch.randint(1, 7, (*HEADS, num_units), generator=generator)
    offsets = torch.cat([sizes.new_zeros(*HEADS, 1), sizes.cumsum(-1)], -1).int()
    num_rows = int(offsets.max()) + 1
    states = []
    for device in ("cuda", "cpu"):
        counts = torch.zeros(NUM_COUNTS, *HEADS, dtype=torch.int64, device=device)
        tallies = torch.zeros(NUM_TALLIES, *HEADS, dtype=torch.int64, device=device)
        marks = torch.zeros(*HEADS, -(-num_rows // 32), dtype=torch.int32, device=device)
        states.append((counts, tallies, marks, make_slots(torch.float16, device)))
    for _ in range(num_selections):
        scores = torch.randint(0, 40, (*HEADS, num_units), generator=generator).float()
        due = torch.rand(HEADS, generator=generator) < 0.7
        found = []
        for counts, tallies, marks, slots in states:
            at = counts.device
            rows, count = select_units(scores.to(at), offsets.to(at), CAPACITY, due=due.to(at))
            exchange_resident(slots, counts, rows, count, due.to(at), tallies, marks, num_rows)
            found.append((counts, tallies, slots.resident_rows.sort(-1).values))
        for kernel, reference in zip(*found, strict=True):
            same(kernel, reference, "select_units and exchange_resident")


def sketch(num_units: int, num_steps: int) -> None:
    """Units that leave the window one after the other, and tokens ranked by what was entered of them."""
    generator = torch.Generator().manual_seed(3)
    num_rows, ring_size = MAX_SIZE * num_steps, WINDOW_SIZE + MAX_SIZE
    codes = torch.zeros(*HEADS, num_rows, WIDTH // 2, dtype=torch.uint8)
    step = torch.zeros(*HEADS, num_rows, 1, dtype=torch.float16)
    kernel, reference = Sketch(codes.cuda(), step.cuda()), Sketch(codes, step)
    start = torch.zeros(HEADS, dtype=torch.int64)
    for _ in range(num_steps):
        # Sums of these numbers are exact in any order.
        keys = torch.randint(-99, 100, (*HEADS, ring_size, WIDTH), generator=generator).half() / 8
        leaves = torch.rand(HEADS, generator=generator) < 0.7
        size = torch.randint(1, MAX_SIZE + 1, HEADS, generator=generator)
        for entered in (kernel, reference):
            given = [part.to(entered.codes.device) for part in (leaves, start, size, keys)]
            window_sketch(entered, 4, *given, 0, ring_size, centred=True)
        start = start + size
    for name, one, other in zip(Sketch._fields, kernel, reference, strict=True):
        same(one, other, f"window_sketch, {name}")

    sizes = torch.randint(1, 7, (*HEADS, num_units), generator=generator)
    offsets = torch.cat([sizes.new_zeros(*HEADS, 1), sizes.cumsum(-1)], -1).int()
    units = torch.randint(0, num_units + 1, HEADS, generator=generator)
    resident = torch.rand(*HEADS, int(offsets.max()), generator=generator).argsort(-1)[..., :CAPACITY].contiguous()
    tables = (resident, offsets, units)
    expected = unattended_tokens(*tables, num_units)
    same(unattended_tokens(*(table.cuda() for table in tables), num_units), expected, "unattended_tokens")
    scores = torch.randint(0, 40, resident.shape, generator=generator) / 64
    ranked = (scores, resident.sort(-1).values, torch.randint(1, CAPACITY + 1, HEADS, generator=generator))
    rows, _ = select_runs(*(part.cuda() for part in ranked), 3, 11)
    same(rows.sort(-1).values, select_runs(*ranked, 3, 11)[0].sort(-1).values, "select_runs")


def gather(num_rows: int) -> None:
    """Rows out of page-locked memory and into it, by both kernels."""
    pool = torch.randn(*HEADS, num_rows, WIDTH + VALUE).half().pin_memory()
    generator = torch.Generator().manual_seed(2)
    for backend in ("cuda", "triton"):
        incoming = torch.randint(-1, num_rows, (*HEADS, CAPACITY), generator=generator)
        slots = make_slots(torch.float16, "cuda")
        resident = slice(SINK_SIZE, SINK_SIZE + CAPACITY)
        keys, values = slots.keys[:, :, resident], slots.values[:, :, resident]
        gather_kv(pool, incoming.cuda(), 0, keys, values, backend=backend)
        wanted = pool.gather(2, incoming.clamp(min=0)[..., None].expand(-1, -1, -1, WIDTH + VALUE))
        wanted.masked_fill_((incoming < 0)[..., None], 0)
        same(torch.cat([keys, values], -1), wanted, f"gather_kv, {backend}")
    rows = torch.tensor([[0, num_rows - 1, -1], [5, 6, 7]])
    before, token = pool.clone(), torch.full((*HEADS, WIDTH), 3.0).half().cuda()
    store_token(pool, rows.cuda(), 0, token, token[..., :VALUE])
    torch.cuda.synchronize()
    for batch, head in ((0, 0), (0, 1), (1, 0), (1, 1), (1, 2)):
        before[batch, head, rows[batch, head]] = 3.0
    same(pool, before, "store_token")


def attend(num_slots: int) -> None:
    """Splits of one head that finish in any order."""
    query = torch.randn(BATCH_SIZE, NUM_KV_HEADS * GROUP_SIZE, 1, WIDTH, device="cuda").half()
    keys = torch.randn(*HEADS, num_slots, WIDTH, device="cuda").half()
    values = torch.randn(*HEADS, num_slots, VALUE, device="cuda").half()
    arrivals = make_arrivals(*query.shape[:2], query.device)
    results = [slot_attention(query, keys, values, None, 0.1, arrivals=arrivals)[0] for _ in range(3)]
    for other in results[1:]:
        same(other, results[0], "slot_attention, again")
    expected, _ = slot_attention(query.double(), keys.double(), values.double(), None, 0.1, backend="reference")
    torch.testing.assert_close(results[0].double(), expected, atol=3e-3, rtol=3e-3)


def main() -> None:
    """Run those that are named, or all that write what outlives a step."""
    runs = {
        "append": lambda: append(120),
        "select": lambda: select(num_units=301, num_selections=6),
        "sketch": lambda: sketch(num_units=1301, num_steps=9),
        "gather": lambda: gather(num_rows=1001),
        "attend": lambda: attend(num_slots=1003),
    }
    for name in sys.argv[1:] or ("append", "select", "sketch", "gather"):
        runs[name]()
        torch.cuda.synchronize()
        print(f"{name}: equal to the references")


if __name__ == "__main__":
    main()
