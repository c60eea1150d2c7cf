// The second kernel of decode attention: adds up the partial results of attend.cu or latent.cu. A block takes up to 128
// channels of one (sequence, head, new token); its warps take partial results in turn, so that many are on their way at
// once, and their sums are added in order.
#include "work.cuh"

// Macros: GROUP query heads of a key-value head, QUERIES new tokens, VALUE_DIM channels, TILE_TOKENS of a tile; OUTPUT_TYPE
// Half or BFloat16; SINKS 0 none, 1 float32, 2 SINK_TYPE.
constexpr int ROWS = GROUP * QUERIES, WARPS = 4;
constexpr int CHANNELS = VALUE_DIM < 128 ? VALUE_DIM : 128, EACH = CHANNELS / 32;
constexpr float LEAST = -3.0e38f;

struct Arguments {
    const float *partial, *statistics;
    const int32_t* lengths;
    const void* sinks;
    uint16_t* output;
    float* lse;
    int32_t batch, kv_heads, span, programs;
};

KERNEL(merge, WARPS * 32, 8, Arguments) {
    const Arguments& a = arguments;
    const int lane = lane_index(), warp = warp_index();
    const int pair = block_index() / ROWS, row = block_index() % ROWS, head = pair % a.kv_heads;
    int begin, count;
    const int total = locate<TILE_TOKENS>(a.lengths, a.batch, a.kv_heads, a.span, pair / a.kv_heads, begin, count) * a.kv_heads;
    const int each = total > 0 ? (total + a.programs - 1) / a.programs : 1;
    begin += head * count;
    const int first = begin / each, last = count > 0 ? (begin + count - 1) / each : first - 1;

    wait_for_previous_kernel();
    const int64_t slot = (int64_t)pair * ROWS + row;  // of program 0
    float most = LEAST;
    for (int p = first + lane; p <= last; p += 32) most = fmaxf(most, a.statistics[2 * (slot + (int64_t)p * ROWS)]);
#pragma unroll
    for (int d = 1; d < 32; d *= 2) most = fmaxf(most, shuffle_xor(most, d));
    float sum = 0;
    if (SINKS) {
        const int at = head * GROUP + row / QUERIES;
        float sink;
        if (SINKS == 1)
            sink = static_cast<const float*>(a.sinks)[at];
        else
            sink = to_float<SINK_TYPE>(static_cast<const uint16_t*>(a.sinks)[at]);
        sink *= 1.4426950408889634f;
        most = fmaxf(most, sink);
        if (lane == 0) sum = fast_exp2(sink - most);
    }
    for (int p = first + lane; p <= last; p += 32) {
        const float* statistics = a.statistics + 2 * (slot + (int64_t)p * ROWS);
        sum += fast_exp2(statistics[0] - most) * statistics[1];
    }
#pragma unroll
    for (int d = 1; d < 32; d *= 2) sum += shuffle_xor(sum, d);

    float output[EACH];
#pragma unroll
    for (int i = 0; i < EACH; i++) output[i] = 0;
    const int channel = block_index_y() * CHANNELS + lane * EACH;
#pragma unroll 4
    for (int p = first + warp; p <= last; p += WARPS) {
        const int64_t at = slot + (int64_t)p * ROWS;
        const float weight = fast_exp2(a.statistics[2 * at] - most);
        const float* partial = a.partial + at * VALUE_DIM + channel;
        if constexpr (EACH == 4) {
            const Words4 words = *reinterpret_cast<const Words4*>(partial);
            output[0] += weight * bits_to_float(words.x), output[1] += weight * bits_to_float(words.y);
            output[2] += weight * bits_to_float(words.z), output[3] += weight * bits_to_float(words.w);
        } else {
#pragma unroll
            for (int i = 0; i < EACH; i++) output[i] += weight * partial[i];
        }
    }
#pragma unroll
    for (int i = 0; i < EACH; i++)
        store_shared(shared_memory() + 4 * ((warp * EACH + i) * 32 + lane), float_to_bits(output[i]));
    synchronize();
    if (warp > 0) return;
    const float scale = sum > 0 ? 1 / sum : 0.0f;
    uint32_t rounded[EACH / 2];
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        output[i] = 0;
#pragma unroll
        for (int w = 0; w < WARPS; w++)
            output[i] += bits_to_float(load_shared(shared_memory() + 4 * ((w * EACH + i) * 32 + lane)));
        output[i] *= scale;
        if (i % 2) rounded[i / 2] = pack2<OUTPUT_TYPE>(output[i - 1], output[i]);
    }
    uint32_t* to = reinterpret_cast<uint32_t*>(a.output + (int64_t)block_index() * VALUE_DIM + channel);
#pragma unroll
    for (int i = 0; i < EACH / 2; i++) to[i] = rounded[i];
    if (lane == 0 && block_index_y() == 0) a.lse[block_index()] = (most + fast_log2(sum)) * 0.6931471805599453f;
}
