// Walsh-Hadamard transforms that are too long for one block and fit a cluster of blocks: each block holds a tile of the
// row in shared memory and transforms it there but for two bits of the index; these and the stages across tiles it does
// for its share of all tiles, which it reads from its neighbours' shared memory. So global memory is read once and
// written once, and shared memory twice each.
#include "hopper.cuh"

// Given when compiled: IO (float, Half or BFloat16) and LOG_N.
constexpr int LOG_TILE = 14, TILE = 1 << LOG_TILE, LOG_BLOCKS = LOG_N - LOG_TILE, BLOCKS = 1 << LOG_BLOCKS;
constexpr int LOG_HELD = 6, HELD = 1 << LOG_HELD, THREADS = TILE / HELD;
// A thread first holds the bits 0, 1 and 10 to 13 of its tile's index, then 2 to 7, then 8, 9 and those of the tile's
// number, of RUN neighbours.
constexpr int LOG_VECTOR = 2, VECTOR = 1 << LOG_VECTOR, TOP = LOG_TILE - (LOG_HELD - LOG_VECTOR);
constexpr int REST = LOG_VECTOR + LOG_HELD, LOG_ACROSS = LOG_BLOCKS + (TOP - REST), ACROSS = 1 << LOG_ACROSS;
constexpr int RUN = HELD / ACROSS;
static_assert(LOG_BLOCKS >= 1 && LOG_BLOCKS <= 4, "a cluster has 2 to 16 blocks");

struct Arguments {
    const unsigned char* x;
    unsigned char* y;
    float scale;
};

// 16 bytes more after every 2^REST elements keep a warp's accesses in different banks. For i and j without a common bit,
// place(i | j) is place(i) + place(j).
DEVICE constexpr uint32_t place(int i) { return 4 * (uint32_t)(i + ((i >> REST) << LOG_VECTOR)); }

template <class T>
struct Row {  // of 16-bit numbers
    static constexpr int BYTES = 2;
    DEVICE static void load(const unsigned char* x, float* v) {
        const Words2 words = *(const Words2*)x;
        v[0] = to_float<T>(words.x), v[1] = to_float<T>(words.x >> 16);
        v[2] = to_float<T>(words.y), v[3] = to_float<T>(words.y >> 16);
    }
    template <int COUNT>
    DEVICE static void store(unsigned char* y, const float (&v)[COUNT]) {
        if constexpr (COUNT == 1) *(uint16_t*)y = (uint16_t)pack2<T>(v[0], 0);
#pragma unroll
        for (int i = 0; i + 1 < COUNT; i += 2) *(uint32_t*)(y + 2 * i) = pack2<T>(v[i], v[i + 1]);
    }
};
template <>
struct Row<float> {
    static constexpr int BYTES = 4;
    DEVICE static void load(const unsigned char* x, float* v) {
        const Words4 words = load_constant4(x);
        v[0] = bits_to_float(words.x), v[1] = bits_to_float(words.y);
        v[2] = bits_to_float(words.z), v[3] = bits_to_float(words.w);
    }
    template <int COUNT>
    DEVICE static void store(unsigned char* y, const float (&v)[COUNT]) {
        if constexpr (COUNT == 1) *(float*)y = v[0];
        if constexpr (COUNT == 2) *(Words2*)y = Words2{float_to_bits(v[0]), float_to_bits(v[1])};
#pragma unroll
        for (int i = 0; i + 3 < COUNT; i += 4)
            *(Words4*)(y + 4 * i) = Words4{float_to_bits(v[i]), float_to_bits(v[i + 1]), float_to_bits(v[i + 2]),
                                           float_to_bits(v[i + 3])};
    }
};

// Stages for all bits of the register's number.
template <int COUNT>
DEVICE void butterflies(float (&v)[COUNT]) {
#pragma unroll
    for (int bit = 1; bit < COUNT; bit *= 2) {
#pragma unroll
        for (int r = 0; r < COUNT; ++r) {
            if ((r & bit) == 0) {
                const float a = v[r], b = v[r | bit];
                v[r] = a + b;
                v[r | bit] = a - b;
            }
        }
    }
}

DEVICE void load_bits0_1_10_to_13(const unsigned char* x, uint32_t tile, int thread) {
    float v[HELD];
#pragma unroll
    for (int j = 0; j < HELD / VECTOR; ++j)
        Row<IO>::load(x + ((j << TOP) + thread * VECTOR) * Row<IO>::BYTES, v + j * VECTOR);
    butterflies(v);
    const uint32_t at = tile + place(thread * VECTOR);
#pragma unroll
    for (int j = 0; j < HELD / VECTOR; ++j) {
        const float* w = v + j * VECTOR;
        store_shared4(at + place(j << TOP), Words4{float_to_bits(w[0]), float_to_bits(w[1]), float_to_bits(w[2]),
                                                   float_to_bits(w[3])});
    }
}

DEVICE void bits2_to_7(uint32_t tile, int thread) {
    const uint32_t at = tile + place((thread & (VECTOR - 1)) | (thread >> LOG_VECTOR) << REST);
    float v[HELD];
#pragma unroll
    for (int r = 0; r < HELD; ++r) v[r] = bits_to_float(load_shared(at + place(r << LOG_VECTOR)));
    butterflies(v);
#pragma unroll
    for (int r = 0; r < HELD; ++r) store_shared(at + place(r << LOG_VECTOR), float_to_bits(v[r]));
}

// RUN neighbours of another block's tile.
DEVICE void load_run(uint32_t address, float (&v)[RUN]) {
    if constexpr (RUN == 1) v[0] = bits_to_float(cluster_load(address));
    if constexpr (RUN == 2) {
        const Words2 words = cluster_load2(address);
        v[0] = bits_to_float(words.x), v[1] = bits_to_float(words.y);
    }
#pragma unroll
    for (int i = 0; i + 3 < RUN; i += 4) {
        const Words4 words = cluster_load4(address + 4 * i);
        v[i] = bits_to_float(words.x), v[i + 1] = bits_to_float(words.y);
        v[i + 2] = bits_to_float(words.z), v[i + 3] = bits_to_float(words.w);
    }
}

DEVICE void bits8_9_and_store(unsigned char* y, uint32_t tile, int thread, int rank, float scale) {
    // Where the bits 8 and 9 are left out, positions count 2^12; a block has its share of them in every tile.
    const int position = (rank * THREADS + thread) * RUN;
    const int i = (position & ((1 << REST) - 1)) | (position >> REST) << TOP;
    float v[RUN][ACROSS];
    // A block reads its own tile first and then the others in an order of its own, so that they don't all ask the same
    // one: v[t] is tile t ^ rank, which negates the results with an odd number of bits in t & rank.
#pragma unroll
    for (int t = 0; t < BLOCKS; ++t) {
        const uint32_t at = map_shared(tile + place(i), t ^ rank);
#pragma unroll
        for (int q = 0; q < ACROSS / BLOCKS; ++q) {
            float run[RUN];
            load_run(at + place(q << REST), run);
#pragma unroll
            for (int p = 0; p < RUN; ++p) v[p][t * (ACROSS / BLOCKS) + q] = run[p];
        }
    }
#pragma unroll
    for (int p = 0; p < RUN; ++p) butterflies(v[p]);
#pragma unroll
    for (int t = 0; t < BLOCKS; ++t) {
        const float signed_scale = count_bits(t & rank) & 1 ? -scale : scale;
#pragma unroll
        for (int q = 0; q < ACROSS / BLOCKS; ++q) {
            float run[RUN];
#pragma unroll
            for (int p = 0; p < RUN; ++p) run[p] = v[p][t * (ACROSS / BLOCKS) + q] * signed_scale;
            Row<IO>::store(y + (t * TILE + (q << REST) + i) * Row<IO>::BYTES, run);
        }
    }
}

KERNEL(hadamard_cluster, THREADS, 3, Arguments) {
    const int thread = thread_index(), rank = cluster_rank();
    const uint32_t tile = shared_memory();
    const int64_t row = ((int64_t)(block_index() / BLOCKS) << LOG_N) * Row<IO>::BYTES;
    load_bits0_1_10_to_13(arguments.x + row + rank * (TILE * Row<IO>::BYTES), tile, thread);
    synchronize();
    bits2_to_7(tile, thread);
    cluster_sync();
    bits8_9_and_store(arguments.y + row, tile, thread, rank, arguments.scale);
    cluster_sync();  // the others may still read this tile
}
