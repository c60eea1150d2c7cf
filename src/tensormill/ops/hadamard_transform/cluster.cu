// Walsh-Hadamard transforms that are too long for one block and fit a cluster of blocks: each block holds a tile of the
// row in shared memory, transforms it there, and reads the other tiles from its neighbours' shared memory for the last
// stages, so that global memory is read once and written once.
#include "device.cuh"

// Given when compiled: IO (float, Half, BFloat16 or double), DOUBLE (whether that is double), and LOG_N.
#if DOUBLE
typedef double Sum;
constexpr int LOG_VECTOR = 1, LOG_THREADS = 10;
#else
typedef float Sum;
constexpr int LOG_VECTOR = 2, LOG_THREADS = 9;
#endif
// A thread holds HELD elements of its block's tile.
constexpr int LOG_TILE = 14, LOG_HELD = LOG_TILE - LOG_THREADS, HELD = 1 << LOG_HELD, THREADS = 1 << LOG_THREADS;
constexpr int TILE = 1 << LOG_TILE, BLOCKS = 1 << (LOG_N - LOG_TILE), VECTOR = 1 << LOG_VECTOR;
// The bits that a thread's vectors are numbered by when it loads them: the highest of the tile.
constexpr int LOG_VECTORS = LOG_HELD - LOG_VECTOR, TOP = LOG_TILE - LOG_VECTORS;

struct Arguments {
    const void* x;
    void* y;
    float scale, scale_rest;
};

#if DOUBLE
DEVICE void load_sum(uint32_t address, double& v) { v = words_to_double(load_shared2(address)); }
DEVICE void store_sum(uint32_t address, double v) { store_shared2(address, double_to_words(v)); }
DEVICE void store_vector(uint32_t address, const double* v) {
    const Words2 a = double_to_words(v[0]), b = double_to_words(v[1]);
    store_shared4(address, Words4{a.x, a.y, b.x, b.y});
}
DEVICE void split(Words2 words, double& first, double&) { first = words_to_double(words); }
#else
DEVICE void load_sum(uint32_t address, float& v) { v = bits_to_float(load_shared(address)); }
DEVICE void store_sum(uint32_t address, float v) { store_shared(address, float_to_bits(v)); }
DEVICE void store_vector(uint32_t address, const float* v) {
    store_shared4(address, Words4{float_to_bits(v[0]), float_to_bits(v[1]), float_to_bits(v[2]), float_to_bits(v[3])});
}
DEVICE void split(Words2 words, float& first, float& second) {
    first = bits_to_float(words.x), second = bits_to_float(words.y);
}
#endif

DEVICE Sum scaled(const Arguments& arguments, int negated) {
    const Sum scale = DOUBLE ? (Sum)arguments.scale + (Sum)arguments.scale_rest : (Sum)arguments.scale;
    return negated ? -scale : scale;
}

// 16 bytes more after every 2^(LOG_VECTOR + LOG_HELD) elements keep a warp's accesses in different banks. For i and j without
// a common bit, place(i | j) is place(i) + place(j).
DEVICE uint32_t place(int i) {
    return (uint32_t)sizeof(Sum) * (uint32_t)(i + ((i >> (LOG_VECTOR + LOG_HELD)) << LOG_VECTOR));
}

// Stages for the bits FROM to TO - 1 of the register's number.
template <int FROM, int TO, int COUNT>
DEVICE void butterflies(Sum (&v)[COUNT]) {
#pragma unroll
    for (int bit = FROM; bit < TO; ++bit) {
#pragma unroll
        for (int r = 0; r < COUNT; ++r) {
            if ((r >> bit & 1) == 0) {
                const Sum a = v[r], b = v[r | 1 << bit];
                v[r] = a + b;
                v[r | 1 << bit] = a - b;
            }
        }
    }
}

// The stages of the bits DONE to LOW + LOG_HELD - 1 of the tile's index, where a thread holds the bits from LOW on.
template <int LOW, int DONE>
DEVICE void stages(uint32_t tile, int thread) {
    const int base = (thread & ((1 << LOW) - 1)) | (thread >> LOW) << (LOW + LOG_HELD);
    const uint32_t at = tile + place(base);
    Sum v[HELD];
#pragma unroll
    for (int r = 0; r < HELD; ++r) load_sum(at + place(r << LOW), v[r]);
    butterflies<DONE - LOW, LOG_HELD>(v);
#pragma unroll
    for (int r = 0; r < HELD; ++r) store_sum(at + place(r << LOW), v[r]);
}

// From bit DONE on, as many a time as a thread holds, up to TOP.
template <int DONE>
DEVICE void all_stages(uint32_t tile, int thread) {
    if constexpr (DONE < TOP) {
        constexpr int LOW = DONE + LOG_HELD <= TOP ? DONE : TOP - LOG_HELD;
        stages<LOW, DONE>(tile, thread);
        synchronize();
        all_stages<LOW + LOG_HELD>(tile, thread);
    }
}

// How a row's elements lie in memory: VECTOR of them are read at once, PAIR of them written.
constexpr int PAIR = 8 / (int)sizeof(Sum);

template <class T>
struct Row;

template <>
struct Row<float> {
    static constexpr int BYTES = 4;
    DEVICE static void load(const unsigned char* x, float* v) {
        const Words4 words = load_constant4(x);
        v[0] = bits_to_float(words.x), v[1] = bits_to_float(words.y);
        v[2] = bits_to_float(words.z), v[3] = bits_to_float(words.w);
    }
    DEVICE static void store(unsigned char* y, const float* v) {
        *(Words2*)y = Words2{float_to_bits(v[0]), float_to_bits(v[1])};
    }
};

template <class T>
struct Row {  // 16 bits
    static constexpr int BYTES = 2;
    DEVICE static void load(const unsigned char* x, float* v) {
        const Words2 words = *(const Words2*)x;
        v[0] = to_float<T>(words.x), v[1] = to_float<T>(words.x >> 16);
        v[2] = to_float<T>(words.y), v[3] = to_float<T>(words.y >> 16);
    }
    DEVICE static void store(unsigned char* y, const float* v) { *(uint32_t*)y = pack2<T>(v[0], v[1]); }
};

template <>
struct Row<double> {
    static constexpr int BYTES = 8;
    DEVICE static void load(const unsigned char* x, double* v) {
        const Words4 words = load_constant4(x);
        v[0] = words_to_double(Words2{words.x, words.y}), v[1] = words_to_double(Words2{words.z, words.w});
    }
    DEVICE static void store(unsigned char* y, const double* v) { *(double*)y = v[0]; }
};

KERNEL(hadamard_cluster, THREADS, DOUBLE ? 1 : 2, Arguments) {
    typedef Row<IO> R;
    const int thread = thread_index(), rank = BLOCKS > 1 ? cluster_rank() : 0;
    const uint32_t tile = shared_memory();
    const int64_t row = (int64_t)(block_index() / BLOCKS) << LOG_N;
    {
        const unsigned char* x =
            (const unsigned char*)arguments.x + (row + ((int64_t)rank << LOG_TILE) + thread * VECTOR) * R::BYTES;
        Sum v[HELD];
#pragma unroll
        for (int j = 0; j < HELD / VECTOR; ++j) R::load(x + ((int64_t)j << TOP) * R::BYTES, v + j * VECTOR);
        butterflies<0, LOG_HELD>(v);
#pragma unroll
        for (int j = 0; j < HELD / VECTOR; ++j) store_vector(tile + place(thread * VECTOR) + place(j << TOP), v + j * VECTOR);
    }
    synchronize();
    all_stages<LOG_VECTOR>(tile, thread);
    if (BLOCKS > 1) cluster_synchronize();
    // This block's share of every tile: the stages across tiles.
    constexpr int SHARE = TILE / BLOCKS;
    unsigned char* y = (unsigned char*)arguments.y + row * R::BYTES;
#pragma unroll 1
    for (int first = rank * SHARE; first < (rank + 1) * SHARE; first += THREADS * PAIR) {
        const int i = first + thread * PAIR;
        const uint32_t at = tile + place(i);
        Sum v[PAIR][BLOCKS];
        // Each block reads its own tile first and the others in an order of its own, so that they don't all ask the same
        // one: v[t] is tile t ^ rank, which negates the results u with an odd number of bits in t & rank.
#pragma unroll
        for (int t = 0; t < BLOCKS; ++t) {
            const Words2 words = BLOCKS > 1 ? load_cluster2(map_shared(at, t ^ rank)) : load_shared2(at);
            split(words, v[0][t], v[PAIR - 1][t]);
        }
#pragma unroll
        for (int p = 0; p < PAIR; ++p) butterflies<0, LOG_N - LOG_TILE>(v[p]);
#pragma unroll
        for (int t = 0; t < BLOCKS; ++t) {
            const Sum scale = scaled(arguments, count_bits(t & rank) & 1);
            const Sum pair[2] = {v[0][t] * scale, v[PAIR - 1][t] * scale};
            R::store(y + ((int64_t)t * TILE + i) * R::BYTES, pair);
        }
    }
    if (BLOCKS > 1) cluster_synchronize();  // the others may still read this tile
}
