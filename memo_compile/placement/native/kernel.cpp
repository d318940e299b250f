// The kernels of placement, as they are called from Python: first fit, its improvement by blame, and two searches for a
// given capacity. All are deterministic; `stop` is read now and then and ends them early.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "first_fit.hpp"
#include "joins.hpp"
#include "problem.hpp"
#include "search.hpp"

using namespace memo;

extern "C" {

// First fit in a given order; -1 when stopped.
int64_t memo_first_fit(int32_t n, const int64_t* size, const int32_t* start, const int32_t* end, const int64_t* fixed,
                       const int32_t* order, const volatile int32_t* stop, int64_t* offsets) {
    return first_fit(Problem{n, size, start, end, fixed}, order, stop, offsets);
}

// First fit again and again; buffers that ended above `goal` come earlier in the next order. Returns the best peak.
int64_t memo_improve(int32_t n, const int64_t* size, const int32_t* start, const int32_t* end, const int64_t* fixed,
                     const int32_t* order, int64_t goal, int32_t rounds, uint64_t seed, const volatile int32_t* stop,
                     int64_t* offsets) {
    const Problem p{n, size, start, end, fixed};
    std::vector<int32_t> now(order, order + n);
    std::vector<double> key(n);
    std::vector<int64_t> trial(n);
    for (int k = 0; k < n; ++k) key[now[k]] = k;
    int64_t best = NEVER;
    for (int round = 0; round < rounds; ++round) {
        const int64_t peak = first_fit(p, now.data(), stop, trial.data());
        if (peak < 0) break;
        if (peak < best) {
            best = peak;
            std::copy(trial.begin(), trial.end(), offsets);
        }
        if (peak <= goal) break;
        for (int i = 0; i < n; ++i)
            if (trial[i] + size[i] > goal) key[i] *= 0.2 + 0.6 * double(mix(mix(seed + round) + i) & 1023) / 1024;
        std::stable_sort(now.begin(), now.end(), [&](int x, int y) { return key[x] < key[y]; });
        for (int k = 0; k < n; ++k) key[now[k]] = k;
    }
    return best;
}

// Is there a placement within `capacity`? 1: yes, in `offsets`; 0: no; -1: not known within the budget of nodes.
int32_t memo_search(int32_t n, const int64_t* size, const int32_t* start, const int32_t* end, const int64_t* fixed,
                    int32_t moments, const int32_t* rank, int64_t capacity, int64_t budget, int32_t table_bits,
                    uint64_t seed, const volatile int32_t* stop, int64_t* offsets, int64_t* nodes) {
    const Problem p{n, size, start, end, fixed};
    Search search(p, moments, rank, capacity, table_bits, stop);
    const int result = search.run(budget, seed);
    *nodes = search.nodes();
    if (result == 1) std::copy(search.offsets().begin(), search.offsets().end(), offsets);
    return result;
}

// The same among joined buffers. 1: found, in `offsets`; -1: not known.
int32_t memo_search_joined(int32_t n, const int64_t* size, const int32_t* start, const int32_t* end,
                           const int64_t* fixed, int32_t moments, int64_t capacity, int64_t budget, uint64_t seed,
                           const volatile int32_t* stop, int64_t* offsets, int64_t* nodes) {
    const Problem p{n, size, start, end, fixed};
    Joins joins(p, moments, capacity, stop);
    const int result = joins.run(budget, seed);
    *nodes = joins.nodes();
    if (result == 1) std::copy(joins.offsets().begin(), joins.offsets().end(), offsets);
    return result;
}

}  // extern "C"
