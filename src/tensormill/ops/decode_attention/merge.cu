// The second kernel of decode attention over a latent cache: adds up the partial results of latent.cu. A block has one
// (sequence, head, new token), a thread four channels of it; parts are added in order.
#include "work.cuh"

// Macros: QUERIES new tokens; VALUE_DIM channels, 256 or 512; TILE_TOKENS of a tile; OUTPUT_TYPE Half or BFloat16; SINKS 0
// none, 1 float32, 2 SINK_TYPE.
constexpr float LEAST = -3.0e38f;

struct Arguments {
    const float *partial, *statistics;
    const int32_t* lengths;
    const void* sinks;
    uint16_t* output;
    float* lse;
    int32_t batch, heads, span, programs;
};

KERNEL(merge, VALUE_DIM / 4, 8, Arguments) {
    const Arguments& a = arguments;
    const int lane = lane_index(), rows = a.heads * QUERIES;
    const int sequence = block_index() / rows, row = block_index() % rows;
    int begin, count;
    const int total = locate<TILE_TOKENS>(a.lengths, a.batch, 1, a.span, sequence, begin, count);
    const int each = total > 0 ? (total + a.programs - 1) / a.programs : 1;
    const int first = begin / each, parts = count > 0 ? (begin + count - 1) / each - first + 1 : 0;

    wait_for_previous_kernel();
    const int64_t slot = (int64_t)(first + sequence) * rows + row;
    float most = LEAST;
    for (int p = lane; p < parts; p += 32) most = fmaxf(most, a.statistics[2 * (slot + (int64_t)p * rows)]);
#pragma unroll
    for (int d = 1; d < 32; d *= 2) most = fmaxf(most, shuffle_xor(most, d));
    float sum = 0;
    if (SINKS) {
        float sink;
        if (SINKS == 1)
            sink = static_cast<const float*>(a.sinks)[row / QUERIES];
        else
            sink = to_float<SINK_TYPE>(static_cast<const uint16_t*>(a.sinks)[row / QUERIES]);
        sink *= 1.4426950408889634f;
        most = fmaxf(most, sink);
        sum = fast_exp2(sink - most);
    }
    float output[4] = {0, 0, 0, 0};
    const float* from = a.partial + 4 * thread_index();
#pragma unroll 8
    for (int p = 0; p < parts; p++) {
        const int64_t at = slot + (int64_t)p * rows;
        const Words2 statistics = *reinterpret_cast<const Words2*>(a.statistics + 2 * at);
        const Words4 words = *reinterpret_cast<const Words4*>(from + at * VALUE_DIM);
        const float weight = fast_exp2(bits_to_float(statistics.x) - most);
        sum += weight * bits_to_float(statistics.y);
        output[0] += weight * bits_to_float(words.x), output[1] += weight * bits_to_float(words.y);
        output[2] += weight * bits_to_float(words.z), output[3] += weight * bits_to_float(words.w);
    }
    const float scale = sum > 0 ? 1 / sum : 0.0f;
    uint16_t* to = a.output + (int64_t)block_index() * VALUE_DIM + 4 * thread_index();
    *reinterpret_cast<Words2*>(to) = Words2{pack2<OUTPUT_TYPE>(output[0] * scale, output[1] * scale),
                                            pack2<OUTPUT_TYPE>(output[2] * scale, output[3] * scale)};
    if (thread_index() == 0) a.lse[block_index()] = (most + fast_log2(sum)) * 0.6931471805599453f;
}
