// How many products of single bits Hopper's tensor cores do in a second: the same operands from shared memory again and
// again, sums in registers. A block multiplies 64 WARPGROUPS rows by 256 rows of 1024 bits, `repeats` times.
#include "bits.cuh"

constexpr int ROWS = 256, LENGTH_BYTES = 128;
constexpr int LEFT = 64 * WARPGROUPS;

struct Arguments {
    const Words4* bits;  // LEFT + ROWS rows of 1024 bits
    uint32_t* sums;      // of each thread of each block: (blocks, threads, 128)
    int repeats;
};

KERNEL(bit_rate, 128 * WARPGROUPS, 1, Arguments) {
    const uint32_t base = shared_memory();
    for (int i = thread_index(); i < (LEFT + ROWS) * 8; i += 128 * WARPGROUPS) {
        const int row = i / 8, piece = i % 8;
        store_shared4(base + row * LENGTH_BYTES + 16 * (piece ^ row % 8), arguments.bits[i]);  // 128-byte swizzle
    }
    fence_async_shared();
    synchronize();

    const uint64_t a = wgmma_descriptor(base + warp_index() / 4 * 64 * LENGTH_BYTES);
    const uint64_t b = wgmma_descriptor(base + LEFT * LENGTH_BYTES);
    uint32_t sum[ROWS / 2];
#pragma unroll
    for (int i = 0; i < ROWS / 2; i++) sum[i] = 0;
    for (int repeat = 0; repeat < arguments.repeats; repeat++) {
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < 4; step++) wgmma_bits<ROWS>(sum, a + 2 * step, b + 2 * step);  // of 256 bits
        wgmma_commit();
        wgmma_wait<1>();
    }
    wgmma_wait<0>();
    wgmma_settle(sum);

    uint32_t* out = arguments.sums + (block_index() * 128 * WARPGROUPS + thread_index()) * (ROWS / 2);
#pragma unroll
    for (int i = 0; i < ROWS / 2; i++) out[i] = sum[i];
}
