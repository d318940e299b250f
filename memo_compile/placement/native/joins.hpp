// Search among joined buffers, where nothing may be wasted.
//
// Where two moments that follow each other are both full, the buffers that end between them and those that start there
// fall into groups of equal sums, each in one piece. So buffers of one life that end there, and buffers of one life that
// start there, that add up to the same, are taken for one buffer over both lives; and so on with what comes of it. Each
// such join is a guess. Those whose sums are least likely to be equal by chance are taken first, and the search has only
// to place what is left. A guess may be wrong, so what is found is a placement, and what is not found proves nothing.

#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <map>
#include <numeric>
#include <queue>
#include <vector>

#include "problem.hpp"
#include "search.hpp"

namespace memo {

class Joins {
public:
    Joins(const Problem& p, int moments, int64_t capacity, const volatile int32_t* stop)
        : p_(p), moments_(moments), capacity_(capacity), stop_(stop), full_(moments + 1), offset_(p.n) {
        std::vector<int64_t> live(moments);
        for (int i = 0; i < p.n; ++i)
            for (int t = p.start[i]; t < p.end[i]; ++t) live[t] += p.size[i];
        for (int t = 1; t < moments; ++t) full_[t] = live[t - 1] == capacity && live[t] == capacity;
        mean_ = double(std::accumulate(p.size, p.size + p.n, int64_t(0))) / std::max(1, p.n);
    }

    // 1: found, -1: not known. Each attempt joins a little differently: more, or less, or by other chances.
    int run(int64_t budget, uint64_t seed) {
        for (int64_t attempt = 0; nodes_ < budget && !*stop_; ++attempt) {
            const uint64_t luck = mix(mix(seed) + attempt);
            const bool first = seed + attempt == 0;
            noise_ = first ? 0 : NOISE * double(attempt % 8);
            const double limit = first || attempt % 4 == 0 ? 1e300 : -SURE * unit(mix(luck));
            join(luck, limit);
            if (int(blocks_.size()) == p_.n && limit == 1e300) return -1;  // nothing to join
            if (search_rest(luck, budget)) return 1;
        }
        return -1;
    }

    int64_t nodes() const { return nodes_; }
    const std::vector<int64_t>& offsets() const { return offset_; }

private:
    static constexpr double NOISE = 0.3;  // times up to 7: what is added to a logarithm
    static constexpr double SURE = 6;     // of the most that an attempt may ask of a join, a logarithm, too
    static constexpr int NODES = 20;      // of search for each buffer that is left
    static constexpr int TABLE_BITS = 14;
    static constexpr size_t MOST = 8;     // buffers in a join
    static constexpr size_t SETS = 300;  // of buffers that are tried on one side

    struct Block {  // a buffer, or a join: some stacked `before` a moment, others `after` it, at one offset
        int32_t start, end;
        int64_t size, fixed;
        std::vector<int> before, after;
    };
    struct Join {
        double chance;  // logarithm of how often its sums would be equal by chance
        int at, version;
        std::vector<int> before, after;
        bool operator<(const Join& other) const { return chance > other.chance; }  // the least on top of the heap
    };
    struct Set {
        int64_t sum;
        std::vector<int> blocks;
    };
    using Groups = std::map<int, std::vector<int>>;

    const Problem& p_;
    const int moments_;
    const int64_t capacity_;
    const volatile int32_t* stop_;
    std::vector<char> full_;
    std::vector<int64_t> offset_;
    double mean_ = 0, noise_ = 0;
    int64_t nodes_ = 0;
    std::vector<Block> blocks_;
    std::vector<char> joined_;  // into another
    std::vector<std::vector<int>> ends_, starts_;
    std::vector<int> version_;
    std::priority_queue<Join> joins_;

    static double unit(uint64_t x) { return double(x >> 11) / 9007199254740992.0; }

    void join(uint64_t luck, double limit) {
        reset();
        for (int t = 1; t < moments_; ++t) look(t, luck);
        while (!joins_.empty() && !*stop_) {
            const Join best = joins_.top();
            joins_.pop();
            if (best.version != version_[best.at]) continue;
            if (best.chance > limit) break;
            unite(best);
            ++nodes_;
            for (int t : {best.at, int(blocks_.back().start), int(blocks_.back().end)}) {
                ++version_[t];
                look(t, luck);
            }
        }
    }

    void reset() {
        blocks_.clear();
        ends_.assign(moments_ + 1, {});
        starts_.assign(moments_ + 1, {});
        version_.assign(moments_ + 1, 0);
        joined_.assign(p_.n, 0);
        joins_ = {};
        for (int i = 0; i < p_.n; ++i) add({p_.start[i], p_.end[i], p_.size[i], p_.fixed[i], {}, {}});
    }

    void add(Block block) {
        if (block.fixed < 0) {  // a fixed buffer stays as it is
            starts_[block.start].push_back(int(blocks_.size()));
            ends_[block.end].push_back(int(blocks_.size()));
        }
        blocks_.push_back(std::move(block));
    }

    void unite(const Join& join) {
        Block all{blocks_[join.before[0]].start, blocks_[join.after[0]].end, 0, -1, join.before, join.after};
        for (int i : join.before) all.size += blocks_[i].size;
        for (const std::vector<int>* side : {&join.before, &join.after})
            for (int i : *side) {
                joined_[i] = 1;
                std::vector<int>&starts = starts_[blocks_[i].start], &ends = ends_[blocks_[i].end];
                starts.erase(std::find(starts.begin(), starts.end(), i));
                ends.erase(std::find(ends.begin(), ends.end(), i));
            }
        joined_.push_back(0);
        add(std::move(all));
    }

    // All joins at a moment, as things are.
    void look(int t, uint64_t luck) {
        if (t <= 0 || t >= moments_ || !full_[t]) return;
        Groups before, after;
        for (int i : ends_[t]) before[blocks_[i].start].push_back(i);
        for (int i : starts_[t]) after[blocks_[i].end].push_back(i);
        if (before.size() == 1 && after.size() == 1 && ends_[t].size() + starts_[t].size() > MOST) {
            const Set all = all_of(ends_[t]), others = all_of(starts_[t]);
            if (all.sum == others.sum) push(t, all, others, luck);  // they differ where a fixed buffer is beside them
        }
        std::vector<std::vector<Set>> sets;
        for (const auto& [end, group] : after) sets.push_back(sets_of(group));
        for (const auto& [start, group] : before) {
            const std::vector<Set> mine = sets_of(group);
            for (const std::vector<Set>& other : sets) match(t, mine, other, luck);
        }
    }

    Set all_of(const std::vector<int>& group) const {
        Set all{0, group};
        for (int i : group) all.sum += blocks_[i].size;
        return all;
    }

    // Of one, two or three blocks, by sum.
    std::vector<Set> sets_of(const std::vector<int>& group) const {
        std::vector<Set> sets;
        for (int i : group) sets.push_back({blocks_[i].size, {i}});
        for (size_t from = 0, more = 1; more < MOST - 1; ++more) {
            const size_t to = sets.size();
            for (size_t s = from; s < to; ++s)
                for (int i : group)
                    if (i > sets[s].blocks.back()) {
                        if (sets.size() >= SETS) break;
                        Set larger = sets[s];
                        larger.sum += blocks_[i].size;
                        larger.blocks.push_back(i);
                        sets.push_back(std::move(larger));
                    }
            from = to;
        }
        std::stable_sort(sets.begin(), sets.end(), [](const Set& x, const Set& y) { return x.sum < y.sum; });
        return sets;
    }

    void match(int t, const std::vector<Set>& before, const std::vector<Set>& after, uint64_t luck) {
        for (size_t x = 0, y = 0; x < before.size(); ++x) {
            while (y < after.size() && after[y].sum < before[x].sum) ++y;
            for (size_t z = y; z < after.size() && after[z].sum == before[x].sum; ++z)
                if (before[x].blocks.size() + after[z].blocks.size() <= MOST) push(t, before[x], after[z], luck);
        }
    }

    // Sizes are about exponentially distributed, so that large sums are rarer; and a block is rather cut in two than in
    // four.
    void push(int t, const Set& before, const Set& after, uint64_t luck) {
        const size_t a = before.blocks.size(), b = after.blocks.size(), p = ends_[t].size(), q = starts_[t].size();
        double chance =
            ways(p, a) + ways(q, b) - std::log(mean_) - std::min(8.0, double(before.sum) / mean_) + double(a + b - 2);
        if (a == p && b == q && (a == 1 || b == 1)) chance = -1e6;  // all there are: no chance about it
        uint64_t draw = luck;
        for (int i : before.blocks) draw = mix(draw ^ uint64_t(i));
        for (int i : after.blocks) draw = mix(draw ^ uint64_t(i));
        chance -= noise_ * std::log(1e-9 + unit(draw));
        joins_.push({chance, t, version_[t], before.blocks, after.blocks});
    }

    // Logarithm of the number of ways to take k of n.
    static double ways(size_t n, size_t k) {
        double all = 0;
        for (size_t i = 0; i < k; ++i) all += std::log(double(n - i) / double(i + 1));
        return all;
    }

    bool search_rest(uint64_t luck, int64_t budget) {
        std::vector<int> rest;
        for (int i = 0; i < int(blocks_.size()); ++i)
            if (!joined_[i]) rest.push_back(i);
        const int n = int(rest.size());
        std::vector<int64_t> size, fixed;
        std::vector<int32_t> start, end, order(n), rank(n);
        for (int i : rest) {
            size.push_back(blocks_[i].size);
            start.push_back(blocks_[i].start);
            end.push_back(blocks_[i].end);
            fixed.push_back(blocks_[i].fixed);
        }
        const auto area = [&](int k) { return double(size[k]) * double(end[k] - start[k]); };
        std::iota(order.begin(), order.end(), 0);
        std::stable_sort(order.begin(), order.end(), [&](int x, int y) { return area(x) > area(y); });
        for (int k = 0; k < n; ++k) rank[order[k]] = k;
        const Problem problem{n, size.data(), start.data(), end.data(), fixed.data()};
        Search search(problem, moments_, rank.data(), capacity_, TABLE_BITS, stop_);
        const int result = search.run(std::min(int64_t(NODES) * n, std::max<int64_t>(2 * n, budget - nodes_)), luck);
        nodes_ += search.nodes();
        if (result != 1) return false;
        for (int k = 0; k < n; ++k) lay(rest[k], search.offsets()[k]);
        return true;
    }

    void lay(int block, int64_t offset) {
        std::vector<std::pair<int, int64_t>> todo{{block, offset}};
        while (!todo.empty()) {
            const auto [i, at] = todo.back();
            todo.pop_back();
            if (i < p_.n) offset_[i] = at;
            for (const std::vector<int>* side : {&blocks_[i].before, &blocks_[i].after}) {
                int64_t low = at;
                for (int j : *side) {
                    todo.push_back({j, low});
                    low += blocks_[j].size;
                }
            }
        }
    }
};

}  // namespace memo
