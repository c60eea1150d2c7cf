// Walsh-Hadamard transforms that are too long for one block and fit a cluster of blocks: each block transforms a tile of
// the row in its shared memory, then does the stages across tiles for its share of all of them, which it reads from its
// neighbours' shared memory. So global memory is read once and written once. Two blocks a multiprocessor work in turn.
#include "hopper.cuh"

// Given when compiled: IO (float, Half or BFloat16) and LOG_N.
constexpr int LOG_TILE = 14, TILE = 1 << LOG_TILE, LOG_BLOCKS = LOG_N - LOG_TILE, BLOCKS = 1 << LOG_BLOCKS;
constexpr int LOG_HELD = 5, HELD = 1 << LOG_HELD, THREADS = TILE / HELD;
static_assert(LOG_BLOCKS >= 1 && LOG_BLOCKS <= 4, "a cluster has 2 to 16 blocks");
// A thread holds the bits 0, 1 and 11 to 13 of the tile's index, then 2 to 6, then 6 to 10, then those of the tile's number.
constexpr int LOG_VECTOR = 2, VECTOR = 1 << LOG_VECTOR, TOP = LOG_TILE - (LOG_HELD - LOG_VECTOR);
constexpr int PAIRS = HELD / BLOCKS / 2;

struct Arguments {
    const unsigned char* x;
    unsigned char* y;
    float scale;
};

// A tile has 16 bytes more after every 128 elements, so that a warp's accesses are in different banks.
// For i and j without a common bit, place(i | j) is place(i) + place(j).
DEVICE constexpr uint32_t place(int i) { return 4 * (uint32_t)(i + ((i >> 7) << LOG_VECTOR)); }

template <class T>
struct Row {  // of 16-bit numbers
    static constexpr int BYTES = 2;
    DEVICE static void load(const unsigned char* x, float* v) {
        const Words2 words = *(const Words2*)x;
        v[0] = to_float<T>(words.x), v[1] = to_float<T>(words.x >> 16);
        v[2] = to_float<T>(words.y), v[3] = to_float<T>(words.y >> 16);
    }
    DEVICE static void store(unsigned char* y, float a, float b) { *(uint32_t*)y = pack2<T>(a, b); }
};
template <>
struct Row<float> {
    static constexpr int BYTES = 4;
    DEVICE static void load(const unsigned char* x, float* v) {
        const Words4 words = load_constant4(x);
        v[0] = bits_to_float(words.x), v[1] = bits_to_float(words.y);
        v[2] = bits_to_float(words.z), v[3] = bits_to_float(words.w);
    }
    DEVICE static void store(unsigned char* y, float a, float b) {
        *(Words2*)y = Words2{float_to_bits(a), float_to_bits(b)};
    }
};

// Stages for the bits FROM and up of the register's number.
template <int FROM, int COUNT>
DEVICE void butterflies(float (&v)[COUNT]) {
#pragma unroll
    for (int bit = 1 << FROM; bit < COUNT; bit *= 2) {
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

// The stages of the bits DONE to LOW + LOG_HELD - 1, where a thread holds the bits from LOW on.
template <int LOW, int DONE>
DEVICE void stages(uint32_t work, int thread) {
    const uint32_t at = work + place((thread & ((1 << LOW) - 1)) | (thread >> LOW) << (LOW + LOG_HELD));
    float v[HELD];
#pragma unroll
    for (int r = 0; r < HELD; ++r) v[r] = bits_to_float(load_shared(at + place(r << LOW)));
    butterflies<DONE - LOW>(v);
#pragma unroll
    for (int r = 0; r < HELD; ++r) store_shared(at + place(r << LOW), float_to_bits(v[r]));
}

KERNEL(hadamard_cluster, THREADS, 2, Arguments) {
    const int thread = thread_index(), rank = (int)cluster_rank();
    const int64_t row = (int64_t)(block_index() / BLOCKS) << LOG_N;
    const uint32_t work = shared_memory();
    {
        const unsigned char* x = arguments.x + (row + rank * TILE + thread * VECTOR) * Row<IO>::BYTES;
        float v[HELD];
#pragma unroll
        for (int j = 0; j < HELD / VECTOR; ++j) Row<IO>::load(x + (j << TOP) * Row<IO>::BYTES, v + j * VECTOR);
        butterflies<0>(v);
        const uint32_t at = work + place(thread * VECTOR);
#pragma unroll
        for (int j = 0; j < HELD / VECTOR; ++j) {
            const float* w = v + j * VECTOR;
            store_shared4(at + place(j << TOP), Words4{float_to_bits(w[0]), float_to_bits(w[1]), float_to_bits(w[2]),
                                                       float_to_bits(w[3])});
        }
    }
    synchronize();
    stages<2, 2>(work, thread);
    synchronize();
    stages<6, 7>(work, thread);
    cluster_sync();
    // Of every tile the same share. A block reads its own tile first and then the others in an order of its own, so that
    // they don't all ask the same one: v[t] is tile t ^ rank, which negates the results with an odd number of bits in
    // t & rank.
    const int first = (rank * THREADS * PAIRS + thread) * 2;
    float v[PAIRS][2][BLOCKS];
#pragma unroll
    for (int t = 0; t < BLOCKS; ++t) {
        const uint32_t tile = map_shared(work, t ^ rank);
#pragma unroll
        for (int p = 0; p < PAIRS; ++p) {
            const Words2 words = cluster_load2(tile + place(first + p * 2 * THREADS));
            v[p][0][t] = bits_to_float(words.x), v[p][1][t] = bits_to_float(words.y);
        }
    }
    unsigned char* y = arguments.y + (row + first) * Row<IO>::BYTES;
#pragma unroll
    for (int p = 0; p < PAIRS; ++p) {
        butterflies<0>(v[p][0]);
        butterflies<0>(v[p][1]);
#pragma unroll
        for (int t = 0; t < BLOCKS; ++t) {
            const float scale = count_bits(t & rank) & 1 ? -arguments.scale : arguments.scale;
            Row<IO>::store(y + (t * TILE + p * 2 * THREADS) * Row<IO>::BYTES, v[p][0][t] * scale, v[p][1][t] * scale);
        }
    }
    cluster_sync();  // others may still read this block's tile
}
