// What is to be placed, as all kernels see it.
//
// Times are indices of moments, buffers live over half-open ranges of them. Sizes and offsets are in one unit that the
// caller chooses. A buffer with fixed[i] >= 0 lies there and nowhere else.

#pragma once

#include <cstdint>
#include <limits>

namespace memo {

constexpr int64_t NEVER = std::numeric_limits<int64_t>::max() / 4;

inline uint64_t mix(uint64_t x) {  // splitmix64's finalizer
    x += 0x9e3779b97f4a7c15ull;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

struct Problem {
    int n;
    const int64_t* size;
    const int32_t* start;
    const int32_t* end;
    const int64_t* fixed;

    bool meet(int i, int j) const { return start[i] < end[j] && start[j] < end[i]; }
};

}  // namespace memo
