// Rows of the pool into slots: the kernel behind `gather_kv(backend="cuda")`; see cuda_kernel.py for its launch.
//
// Everything is counted in vectors of 16 bytes, so that one kernel serves every dtype. All integers are 64 bits wide:
// the launcher passes a Python integer as that.

using i64 = long long;

// As in cuda_kernel.py.
constexpr int THREADS = 512;
constexpr int LANES = 32;
constexpr int WARPS = THREADS / LANES;
constexpr unsigned ALL_LANES = 0xffffffffu;

// Tiles of 32 slots that a warp looks at before it works on the first: their loads share one wait.
constexpr int AHEAD = 4;
// Vectors that a lane holds between the link and the slots. Each is a request of 512 bytes a warp, so that 16 warps on
// each of 12 SMs have 400 KB under way: more than the link's bandwidth times its latency.
constexpr int IN_FLIGHT = 4;

// One row to copy: where it lies, and the slots it goes to.
struct Move {
    const uint4* source;
    uint4* keys;
    uint4* values;
};

// The pool is not written while the kernel runs, and no row is read twice: past the first-level cache.
__device__ __forceinline__ uint4 load_once(const uint4* address) {
    uint4 held;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(held.x), "=r"(held.y), "=r"(held.z), "=r"(held.w)
                 : "l"(address));
    return held;
}

// A warp copies the rows of a list as one run of vectors, 32 at a time: lanes are busy whatever the width of a row, and
// rows that are neighbours in the pool become neighbouring requests.
__device__ __forceinline__ void copy_rows(
    const Move* moves, const int num_moves, const int lane, const int key_vectors, const int row_vectors
) {
    const int row_step = LANES / row_vectors;
    const int column_step = LANES % row_vectors;
    int row = lane / row_vectors;
    int column = lane % row_vectors;
    const int num_vectors = num_moves * row_vectors;
    for (int done = 0; done < num_vectors; done += LANES * IN_FLIGHT) {
        uint4 held[IN_FLIGHT];
        uint4* target[IN_FLIGHT];
#pragma unroll
        for (int step = 0; step < IN_FLIGHT; ++step) {
            target[step] = nullptr;
            if (row < num_moves) {
                const Move& move = moves[row];
                target[step] = column < key_vectors ? move.keys + column : move.values + (column - key_vectors);
                held[step] = load_once(move.source + column);
            }
            row += row_step;
            column += column_step;
            if (column >= row_vectors) {
                column -= row_vectors;
                ++row;
            }
        }
#pragma unroll
        for (int step = 0; step < IN_FLIGHT; ++step) {
            if (target[step] != nullptr) {
                *target[step] = held[step];
            }
        }
    }
}

// pool: [B, H, num_rows] rows of key_vectors + value_vectors, the rows from first_row on, in pinned host memory or on
// the device. incoming: [num_slots = B * H * capacity], the row for each slot; rows outside the slab are passed over.
// keys: [B, H, capacity] rows of key_vectors, values: [B, H, capacity] rows of value_vectors.
// *_batch, *_head: strides in vectors.
extern "C" __global__ void __launch_bounds__(THREADS) gather_kv(
    const uint4* pool, const i64* incoming, uint4* keys, uint4* values,
    const i64 first_row, const i64 num_rows, const i64 num_slots, const i64 capacity, const i64 num_heads,
    const i64 pool_batch, const i64 pool_head,
    const i64 key_batch, const i64 key_head,
    const i64 value_batch, const i64 value_head,
    const i64 key_vectors, const i64 value_vectors
) {
    // A list a warp: warps never wait for each other.
    __shared__ Move lists[WARPS][LANES];
    const int lane = static_cast<int>(threadIdx.x) % LANES;
    const int warp = static_cast<int>(threadIdx.x) / LANES;
    Move* moves = lists[warp];
    const i64 row_vectors = key_vectors + value_vectors;
    const i64 stop_row = first_row + num_rows;

    // Neighbouring tiles go to different blocks: missing slots often lie together, and every SM shall have some.
    const i64 stride = static_cast<i64>(gridDim.x) * (WARPS * LANES);
    const i64 start = (static_cast<i64>(warp) * gridDim.x + blockIdx.x) * LANES;
    for (i64 tile = start; tile < num_slots; tile += AHEAD * stride) {
        i64 rows[AHEAD];
#pragma unroll
        for (int step = 0; step < AHEAD; ++step) {
            const i64 slot = tile + step * stride + lane;
            rows[step] = slot < num_slots ? incoming[slot] : -1;
        }
#pragma unroll
        for (int step = 0; step < AHEAD; ++step) {
            // first_row is not negative, so that -1 is never due.
            const bool due = rows[step] >= first_row && rows[step] < stop_row;
            const unsigned mask = __ballot_sync(ALL_LANES, due);
            if (mask == 0) {
                continue;
            }
            if (due) {
                const i64 slot = tile + step * stride + lane;
                const i64 line = slot / capacity;
                const i64 place = slot - line * capacity;
                const i64 batch = line / num_heads;
                const i64 head = line - batch * num_heads;
                Move& move = moves[__popc(mask & ((1u << lane) - 1u))];
                move.source = pool + batch * pool_batch + head * pool_head + (rows[step] - first_row) * row_vectors;
                move.keys = keys + batch * key_batch + head * key_head + place * key_vectors;
                move.values = values + batch * value_batch + head * value_head + place * value_vectors;
            }
            __syncwarp();
            copy_rows(moves, __popc(mask), lane, static_cast<int>(key_vectors), static_cast<int>(row_vectors));
            // The list is read to its end before the next tile writes it.
            __syncwarp();
        }
    }
}
