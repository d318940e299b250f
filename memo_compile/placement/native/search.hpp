// Complete search: can a capacity be met?
//
// Buffers are stacked from the bottom. r[i] is the lowest offset that i can still take, f[t] the least r over the
// buffers to come at moment t. Where all buffers with r = f[t] at t lie on level ground, either one of them comes next
// at exactly f[t], or none does and each of them rests on another that is still to come. The moment with the fewest
// such choices is taken: where the capacity leaves no waste this is nearly always one, wherever it lies in time, and
// unlike one global order by offset, what is decided early in time does not interleave with what is decided late.
//
// Only placements that are least under a potential (the sum of size² × offset) are looked for, so that
// - no buffer could lie lower (m[i], where placed buffers let it, is free),
// - of two buffers with one lifetime, one directly on the other, the larger lies below,
// - equal buffers lie in order of their index.

#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "problem.hpp"

namespace memo {

constexpr int MAX_DEPTH = 10000;  // of recursion: what the stack of a thread holds

class Search {
public:
    Search(const Problem& p, int moments, const int32_t* rank, int64_t capacity, int table_bits,
           const volatile int32_t* stop)
        : p_(p), rank_(rank), capacity_(capacity), stop_(stop), r_(p.n), m_(p.n), offset_(p.n), below_(p.n), twin_(p.n, -1),
          rests_on_(p.n, -1), in_the_way_(p.n, -1),
          placed_(p.n), priority_(p.n), near_(p.n), f_(moments), to_come_(moments), choices_(moments), uneven_(moments),
          weight_(moments, 1.0), failed_(size_t(1) << table_bits) {
        std::vector<int> all(p.n);
        std::iota(all.begin(), all.end(), 0);
        std::sort(all.begin(), all.end(),
                  [&](int x, int y) { return p.start[x] != p.start[y] ? p.start[x] < p.start[y] : x < y; });
        parts_ = split(all, -1);
        for (int x = 0; x < p.n; ++x)
            for (int y = x + 1; y < p.n && p.start[all[y]] < p.end[all[x]]; ++y) {
                near_[all[x]].push_back(all[y]);
                near_[all[y]].push_back(all[x]);
            }
        for (int i = 0; i < p.n; ++i)
            for (int j : near_[i])
                if (same_life(i, j) && p.size[i] == p.size[j] && p.fixed[i] < 0 && p.fixed[j] < 0 && rank[j] < rank[i] &&
                    (twin_[i] < 0 || rank[j] > rank[twin_[i]]))
                    twin_[i] = j;
    }

    // 1: found, 0: there is none, -1: not known. Restarts with growing budgets; failures so far guide the next start.
    int run(int64_t budget, uint64_t seed) {
        int64_t step = std::max(1000, p_.n * 5 / 4);
        for (int64_t start = 0;; ++start) {
            end_ = std::min(nodes_ + step, budget);
            disturb(seed, start);
            reset();
            if (all_parts()) return 1;
            if (!out_) return 0;
            if (nodes_ >= budget || *stop_) return -1;
            step += step / 5;
        }
    }

    int64_t nodes() const { return nodes_; }
    const std::vector<int64_t>& offsets() const { return offset_; }

private:
    using Part = std::vector<int>;  // buffers to come, by start, that no gap in time divides
    struct Change {
        int i;
        int64_t r, m;
        char below;
    };

    const Problem& p_;
    const int32_t* rank_;
    const int64_t capacity_;
    const volatile int32_t* stop_;
    std::vector<int64_t> r_, m_, offset_;
    std::vector<char> below_;  // a smaller buffer with the same life lies directly below: not here, but higher
    std::vector<int> twin_, rests_on_, in_the_way_;
    std::vector<char> placed_;
    std::vector<int64_t> priority_;
    std::vector<std::vector<int>> near_;
    std::vector<int64_t> f_, to_come_;
    std::vector<int> choices_, uneven_;
    std::vector<double> weight_;
    std::vector<uint64_t> failed_;
    std::vector<Part> parts_;
    std::vector<int> falling_;
    std::vector<Change> trail_;
    int64_t nodes_ = 0, end_ = 0;
    int depth_ = 0;
    bool out_ = false;
    uint64_t jitter_ = 0;

    bool same_life(int i, int j) const { return p_.start[i] == p_.start[j] && p_.end[i] == p_.end[j]; }

    // The first start follows the given order; each later one blurs it a little more, up to a limit.
    void disturb(uint64_t seed, int64_t start) {
        jitter_ = seed * 1000003 + start;
        for (int i = 0; i < p_.n; ++i)
            priority_[i] = int64_t(rank_[i]) * 4 + (start ? mix(mix(jitter_) + i) % (4 * (start % 16 + 1)) : 0);
    }

    void reset() {
        trail_.clear();
        out_ = false;
        depth_ = 0;
        std::fill(placed_.begin(), placed_.end(), 0);
        std::fill(below_.begin(), below_.end(), 0);
        for (int i = 0; i < p_.n; ++i) r_[i] = m_[i] = p_.fixed[i] >= 0 ? p_.fixed[i] : 0;
        for (int i = 0; i < p_.n; ++i)
            if (p_.fixed[i] < 0) r_[i] = m_[i] = past_fixed(i, 0);
    }

    bool all_parts() {
        for (const Part& part : parts_)
            if (!solve(part)) return false;
        return true;
    }

    std::vector<Part> split(const Part& part, int without) const {
        std::vector<Part> parts;
        int end = -1;
        for (int j : part) {
            if (j == without) continue;
            if (p_.start[j] >= end) parts.emplace_back();
            parts.back().push_back(j);
            end = std::max(end, int(p_.end[j]));
        }
        std::sort(parts.begin(), parts.end(), [](const Part& x, const Part& y) { return x.size() < y.size(); });
        return parts;
    }

    // The lowest offset from `low` at which i meets no fixed buffer that is still to come.
    int64_t past_fixed(int i, int64_t low) const {
        for (bool again = true; again;) {
            again = false;
            for (int j : near_[i])
                if (p_.fixed[j] >= 0 && !placed_[j] && low < p_.fixed[j] + p_.size[j] && p_.fixed[j] < low + p_.size[i]) {
                    low = p_.fixed[j] + p_.size[j];
                    again = true;
                }
        }
        return low;
    }

    void change(int i, int64_t r, int64_t m, bool below) {
        trail_.push_back({i, r_[i], m_[i], below_[i]});
        r_[i] = r;
        m_[i] = m;
        below_[i] = below;
    }

    void undo(size_t mark) {
        while (trail_.size() > mark) {
            const Change& c = trail_.back();
            r_[c.i] = c.r;
            m_[c.i] = c.m;
            below_[c.i] = c.below;
            trail_.pop_back();
        }
    }

    bool may_lie_at_r(int i) const { return r_[i] == m_[i] && !below_[i]; }

    bool solve(const Part& part) {
        if (++nodes_ >= end_ || depth_ >= MAX_DEPTH || *stop_) out_ = true;
        if (out_) return false;
        ++depth_;
        bool found = part.size() == 1 ? last(part[0]) : branch(part);
        --depth_;
        return found;
    }

    bool last(int i) {
        offset_[i] = r_[i];
        return may_lie_at_r(i) && r_[i] + p_.size[i] <= capacity_;
    }

    bool branch(const Part& part) {
        int lo = p_.start[part[0]], hi = lo;
        for (int i : part) hi = std::max(hi, int(p_.end[i]));
        if (!raise(part) || !room(part, lo, hi)) return false;
        const uint64_t state = digest(part);
        uint64_t& known = failed_[state & (failed_.size() - 1)];
        if (known == state) return false;
        const int t = fewest_choices(part, lo, hi);
        if (t < 0) return false;
        const int64_t level = f_[t];
        const bool waste = level + to_come_[t] < capacity_;
        std::vector<int> next;
        for (int i : part)
            if (p_.start[i] <= t && t < p_.end[i] && r_[i] == level) next.push_back(i);
        std::sort(next.begin(), next.end(), [&](int x, int y) { return priority_[x] < priority_[y]; });

        const size_t mark = trail_.size();
        for (int i : next) {
            if (!may_lie_at_r(i)) continue;
            if (put(i, part)) return true;
            undo(mark);
            placed_[i] = 0;
            if (out_) return false;
        }
        if (waste) {
            if (rest_on_others(next) && solve(part)) return true;
            undo(mark);
            if (out_) return false;
        }
        known = state;
        return false;
    }

    // A buffer that may not lie at m[i] rests on one that is still to come; equal ones lie in order.
    bool raise(const Part& part) {
        for (int i : part) {
            if (p_.fixed[i] >= 0) continue;
            int64_t r = r_[i];
            if (twin_[i] >= 0 && !placed_[twin_[i]]) {
                r = std::max(r, r_[twin_[i]] + p_.size[i]);
            } else if (!may_lie_at_r(i)) {
                // What was found before mostly still holds: something to rest on, something in the way further down.
                const int on = rests_on_[i], way = in_the_way_[i];
                const bool rests = on >= 0 && !placed_[on] && r_[on] + p_.size[on] <= r;
                const bool barred = r == m_[i] || (way >= 0 && !placed_[way] && r_[way] < m_[i] + p_.size[i]);
                if (rests && barred) continue;
                int64_t rest = NEVER, least = NEVER;
                for (int j : near_[i])
                    if (!placed_[j]) {
                        if (r_[j] + p_.size[j] < rest) rest = r_[j] + p_.size[j], rests_on_[i] = j;
                        if (r_[j] < least) least = r_[j], in_the_way_[i] = j;
                    }
                if (rest == NEVER || (r_[i] > m_[i] && least >= m_[i] + p_.size[i])) return false;  // could lie lower
                r = std::max(r, rest);
            }
            r = past_fixed(i, r);
            if (r + p_.size[i] > capacity_) return false;
            if (r > r_[i]) change(i, r, m_[i], below_[i]);
        }
        return true;
    }

    // At each moment, and from each height up: what can only lie there must fit there.
    bool room(const Part& part, int lo, int hi) {
        std::fill(f_.begin() + lo, f_.begin() + hi, NEVER);
        std::fill(to_come_.begin() + lo, to_come_.begin() + hi, 0);
        falling_.assign(part.begin(), part.end());
        std::sort(falling_.begin(), falling_.end(), [&](int x, int y) { return r_[x] > r_[y]; });
        for (int i : falling_) {
            const int64_t r = r_[i], size = p_.size[i];
            for (int t = p_.start[i]; t < p_.end[i]; ++t) {
                f_[t] = r;
                to_come_[t] += size;
                if (r + to_come_[t] > capacity_) {
                    weight_[t] += 1;
                    return false;
                }
            }
        }
        return true;
    }

    uint64_t digest(const Part& part) const {
        uint64_t h = 0;
        for (int i : part) h += mix(mix(mix(uint64_t(i) * 2 + below_[i]) ^ uint64_t(r_[i])) ^ uint64_t(m_[i]));
        return mix(h) | 1;
    }

    // Choices are weighed against the failures seen at a moment, so that the hard place comes first.
    int fewest_choices(const Part& part, int lo, int hi) {
        std::fill(choices_.begin() + lo, choices_.begin() + hi, 0);
        std::fill(uneven_.begin() + lo, uneven_.begin() + hi, 0);
        for (int i : part) {
            const int64_t r = r_[i];
            bool level = true;
            for (int t = p_.start[i]; t < p_.end[i] && level; ++t) level = f_[t] == r;
            std::vector<int>& count = level ? choices_ : uneven_;
            for (int t = p_.start[i]; t < p_.end[i]; ++t) count[t] += f_[t] == r;
        }
        int best = -1;
        double least = 1e300;
        for (int t = lo; t < hi; ++t) {
            if (!choices_[t] || uneven_[t]) continue;
            const bool waste = f_[t] + to_come_[t] < capacity_;
            const double blur = 1 + 0.1 * double(mix(jitter_ * 8191 + t) & 1023) / 1024;
            const double cost = (choices_[t] - 1 + (waste ? 0.5 : 0) + 1e-3) / weight_[t] * blur;
            if (cost < least) {
                least = cost;
                best = t;
            }
        }
        return best;
    }

    bool put(int i, const Part& part) {
        const int64_t top = r_[i] + p_.size[i];
        placed_[i] = 1;
        offset_[i] = r_[i];
        for (int j : near_[i]) {
            if (placed_[j] || p_.fixed[j] >= 0 || m_[j] >= top) continue;
            const bool smaller_below = same_life(i, j) && p_.size[j] > p_.size[i] && p_.fixed[i] < 0;
            const int64_t m = past_fixed(j, top);
            const int64_t r = std::max(r_[j], m);
            change(j, r, m, smaller_below && m == top);
            if (r + p_.size[j] > capacity_) return false;
        }
        const std::vector<Part> parts = split(part, i);
        for (const Part& rest : parts)
            if (!solve(rest)) {
                for (const Part& done : parts)
                    for (int j : done) placed_[j] = 0;
                return false;
            }
        for (const Part& done : parts)
            for (int j : done) placed_[j] = 1;
        return true;
    }

    bool rest_on_others(const std::vector<int>& next) {
        for (int i : next) {
            if (p_.fixed[i] >= 0) return false;
            int64_t rest = NEVER;
            for (int j : near_[i])
                if (!placed_[j]) rest = std::min(rest, r_[j] + p_.size[j]);
            if (rest == NEVER) return false;
            change(i, past_fixed(i, std::max(rest, r_[i])), m_[i], below_[i]);
        }
        return true;
    }
};

}  // namespace memo
