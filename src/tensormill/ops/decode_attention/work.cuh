// How attention's work is split over blocks: a line of tiles of all (sequence, key-value head) pairs, see triton.py.
#pragma once

#include "device.cuh"

DEVICE int smaller(int a, int b) { return a < b ? a : b; }

// Tiles of each program. Sequences of one length are left whole where that costs little: to go on to another, and to
// merge parts, takes as long as a few tiles.
DEVICE int share(int total, int batch, int programs) {
    const int each = (total + programs - 1) / programs, mean = (total + batch - 1) / batch;
    if (total == 0) return 1;
    const int whole = (each + mean - 1) / mean * mean;
    return whole - each <= smaller(4, each / 16) ? whole : each;
}

// Tiles of a sequence, and the first: not tile 0 if only the last `span` tokens are seen.
template <int TILE>
DEVICE int tiles_of(int length, int span, int& first) {
    const int before = length - span;
    first = before > 0 ? before / TILE : 0;
    return (length + TILE - 1) / TILE - first;
}

// Tiles of all sequences; if `position` is not negative, also which sequence is there: its first position and its tiles.
template <int TILE>
DEVICE int scan(const int32_t* lengths, int batch, int kv_heads, int span, int position, int& sequence, int& begin,
                int& count) {
    const int lane = lane_index();
    int total = 0;
    sequence = -1;
    if (batch == 1) {  // what is below, but faster
        int first;
        sequence = begin = 0, count = tiles_of<TILE>(lengths[0], span, first);
        return count;
    }
    for (int start = 0; start < batch; start += 32) {
        const int index = start + lane;
        int first, own = 0;
        if (index < batch) own = tiles_of<TILE>(lengths[index], span, first);
        int sum = own;  // inclusive
#pragma unroll
        for (int d = 1; d < 32; d *= 2) {
            const int other = (int)shuffle((uint32_t)sum, lane >= d ? lane - d : lane);
            if (lane >= d) sum += other;
        }
        if (position >= 0 && sequence < 0) {
            // sequences of these that end at or before the position
            uint32_t passed = (total + sum) * kv_heads <= position;
#pragma unroll
            for (int d = 1; d < 32; d *= 2) passed += shuffle_xor(passed, d);
            if (passed < 32) {
                sequence = start + passed;
                count = (int)shuffle((uint32_t)own, passed);
                begin = (total + (int)shuffle((uint32_t)sum, passed) - count) * kv_heads;
            }
        }
        total += (int)shuffle((uint32_t)sum, 31);
    }
    return total;
}

// Tiles of all sequences, and of one: its first position and its tiles.
template <int TILE>
DEVICE int locate(const int32_t* lengths, int batch, int kv_heads, int span, int sequence, int& begin, int& count) {
    int total = 0, before = 0, first;
    for (int index = lane_index(); index < batch; index += 32) {
        const int own = tiles_of<TILE>(lengths[index], span, first);
        total += own, before += index < sequence ? own : 0;
    }
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
        total += (int)shuffle_xor((uint32_t)total, d), before += (int)shuffle_xor((uint32_t)before, d);
    }
    count = tiles_of<TILE>(lengths[sequence], span, first);
    begin = before * kv_heads;
    return total;
}
