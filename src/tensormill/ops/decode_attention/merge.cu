// The second kernel of decode attention over a latent cache: adds up the partial results of latent.cu, of sequences that
// more than one of its blocks had a part of. A block has one (sequence, head, new token), a thread four channels of every
// GROUPS-th part of it; parts, and then groups, are added in order.
#include "work.cuh"

// Macros: QUERIES new tokens; VALUE_DIM channels, 256 or 512; TILE_TOKENS of a tile; OUTPUT_TYPE Half or BFloat16; GROUPS;
// SINKS 0 none, 1 float32, 2 SINK_TYPE.
constexpr int THREADS = VALUE_DIM / 4, CHUNK = 4;  // of a group; parts that are loaded at once
constexpr float LEAST = -3.0e38f;

struct Arguments {
    const float *partial, *statistics;
    const int32_t* lengths;
    const void* sinks;
    uint16_t* output;
    float* lse;
    int32_t batch, heads, span, programs;
};

// A weighted sum, with weights relative to 2^most.
struct Sum {
    float most, weight, output[4];
};

// Adds another, rescaled to the larger maximum.
DEVICE void add(Sum& sum, float most, float weight, Words4 output) {
    const float next = fmaxf(sum.most, most), old = fast_exp2(sum.most - next), scale = fast_exp2(most - next);
    sum.most = next;
    sum.weight = old * sum.weight + scale * weight;
    const uint32_t words[4] = {output.x, output.y, output.z, output.w};
#pragma unroll
    for (int i = 0; i < 4; i++) sum.output[i] = old * sum.output[i] + scale * bits_to_float(words[i]);
}

KERNEL(merge, THREADS * GROUPS, GROUPS > 1 ? 1 : 12, Arguments) {
    const Arguments& a = arguments;
    const int rows = a.heads * QUERIES, group = thread_index() / THREADS, own = thread_index() % THREADS;
    const int sequence = block_index() / rows, row = block_index() % rows;
    int begin, count;
    const int total = locate<TILE_TOKENS>(a.lengths, a.batch, 1, a.span, sequence, begin, count);
    const int each = share(total, a.batch, a.programs);
    const int first = begin / each, parts = count > 0 ? (begin + count - 1) / each - first + 1 : 0;


    wait_for_previous_kernel();
    allow_next_kernel();
    if (!SINKS && parts == 1) return;  // latent.cu wrote the result
    const int64_t slot = (int64_t)(first + sequence) * rows + row;
    Sum sum = {LEAST, 0, {0, 0, 0, 0}};
    for (int p = group; p < parts; p += CHUNK * GROUPS) {
        Words2 statistics[CHUNK];
        Words4 output[CHUNK];
#pragma unroll
        for (int i = 0; i < CHUNK; i++) {
            const int64_t at = slot + (int64_t)smaller(p + i * GROUPS, parts - 1) * rows;
            statistics[i] = *reinterpret_cast<const Words2*>(a.statistics + 2 * at);
            output[i] = *reinterpret_cast<const Words4*>(a.partial + at * VALUE_DIM + 4 * own);
        }
#pragma unroll
        for (int i = 0; i < CHUNK; i++)
            if (p + i * GROUPS < parts)
                add(sum, bits_to_float(statistics[i].x), bits_to_float(statistics[i].y), output[i]);
    }
    if (GROUPS > 1) {
        const uint32_t outputs = shared_memory() + own * 16, statistics = shared_memory() + GROUPS * THREADS * 16;
        const Words4 output = {float_to_bits(sum.output[0]), float_to_bits(sum.output[1]),
                               float_to_bits(sum.output[2]), float_to_bits(sum.output[3])};
        store_shared4(outputs + group * THREADS * 16, output);
        if (own == 0) {
            store_shared(statistics + group * 8, float_to_bits(sum.most));
            store_shared(statistics + group * 8 + 4, float_to_bits(sum.weight));
        }
        synchronize();
        if (group > 0) return;
        for (int i = 1; i < GROUPS; i++) {
            const Words2 other = load_shared2(statistics + i * 8);
            add(sum, bits_to_float(other.x), bits_to_float(other.y), load_shared4(outputs + i * THREADS * 16));
        }
    }
    if (SINKS) {
        float sink;
        if (SINKS == 1)
            sink = static_cast<const float*>(a.sinks)[row / QUERIES];
        else
            sink = to_float<SINK_TYPE>(static_cast<const uint16_t*>(a.sinks)[row / QUERIES]);
        add(sum, sink * 1.4426950408889634f, 1, Words4{0, 0, 0, 0});
    }
    const float scale = sum.weight > 0 ? 1 / sum.weight : 0.0f;
    uint16_t* to = a.output + (int64_t)block_index() * VALUE_DIM + 4 * own;
    *reinterpret_cast<Words2*>(to) = Words2{pack2<OUTPUT_TYPE>(sum.output[0] * scale, sum.output[1] * scale),
                                            pack2<OUTPUT_TYPE>(sum.output[2] * scale, sum.output[3] * scale)};
    if (own == 0) a.lse[block_index()] = (sum.most + fast_log2(sum.weight)) * 0.6931471805599453f;
}
