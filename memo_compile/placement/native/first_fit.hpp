// First fit: each buffer, in a given order, at the lowest offset that is free over its life.

#pragma once

#include <algorithm>
#include <vector>

#include "problem.hpp"

namespace memo {

// Placed buffers by offset, in chunks that know which moments they touch, so that most are passed over unread.
class Shelf {
public:
    void put(int64_t low, int64_t high, int32_t start, int32_t end) {
        if (chunks_.empty()) chunks_.emplace_back();
        size_t c = 0;
        while (c + 1 < chunks_.size() && chunks_[c + 1].items.front().low < low) ++c;
        Chunk& chunk = chunks_[c];
        Item item{low, high, start, end};
        auto at = std::upper_bound(chunk.items.begin(), chunk.items.end(), item,
                                   [](const Item& x, const Item& y) { return x.low < y.low; });
        chunk.items.insert(at, item);
        chunk.first = std::min(chunk.first, start);
        chunk.last = std::max(chunk.last, end);
        if (chunk.items.size() >= 2 * SIZE) split(c);
    }

    // The lowest offset at which `size` is free over [start, end).
    int64_t lowest_free(int64_t size, int32_t start, int32_t end) const {
        int64_t offset = 0;
        for (const Chunk& chunk : chunks_) {
            if (chunk.last <= start || chunk.first >= end) continue;
            for (const Item& x : chunk.items) {
                if (x.start >= end || x.end <= start) continue;
                if (x.low - offset >= size) return offset;
                offset = std::max(offset, x.high);
            }
        }
        return offset;
    }

private:
    static constexpr size_t SIZE = 128;
    struct Item {
        int64_t low, high;
        int32_t start, end;
    };
    struct Chunk {
        std::vector<Item> items;
        int32_t first = std::numeric_limits<int32_t>::max(), last = -1;
    };
    std::vector<Chunk> chunks_;

    void split(size_t c) {
        Chunk upper;
        upper.items.assign(chunks_[c].items.begin() + SIZE, chunks_[c].items.end());
        chunks_[c].items.resize(SIZE);
        for (Chunk* chunk : {&chunks_[c], &upper}) {
            chunk->first = std::numeric_limits<int32_t>::max();
            chunk->last = -1;
            for (const Item& x : chunk->items) {
                chunk->first = std::min(chunk->first, x.start);
                chunk->last = std::max(chunk->last, x.end);
            }
        }
        chunks_.insert(chunks_.begin() + c + 1, std::move(upper));
    }
};

inline int64_t first_fit(const Problem& p, const int32_t* order, const volatile int32_t* stop, int64_t* offsets) {
    Shelf shelf;
    int64_t peak = 0;
    for (int i = 0; i < p.n; ++i)
        if (p.fixed[i] >= 0) {
            offsets[i] = p.fixed[i];
            shelf.put(offsets[i], offsets[i] + p.size[i], p.start[i], p.end[i]);
            peak = std::max(peak, offsets[i] + p.size[i]);
        }
    for (int k = 0; k < p.n; ++k) {
        if ((k & 255) == 0 && *stop) return -1;
        int i = order[k];
        if (p.fixed[i] >= 0) continue;
        offsets[i] = shelf.lowest_free(p.size[i], p.start[i], p.end[i]);
        shelf.put(offsets[i], offsets[i] + p.size[i], p.start[i], p.end[i]);
        peak = std::max(peak, offsets[i] + p.size[i]);
    }
    return peak;
}

}  // namespace memo
