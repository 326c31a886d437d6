// What is made of a request's tokens: runs that prompts share, and rows of features. The numpy ways beside it say what
// each number is: token_runs.py, thinning.py, embedding.py, token_surprise.py, common_tokens.py.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int RUN = 6, SHORT_RUN = 3, MINIMA = 12, PLACES = 15;
constexpr int64_t MOST_TOKENS = 8192, NUMBER = -1, EDGE = -2;
constexpr float MAJORITY = 0.5f;
constexpr int SAMPLED = 64, MEAN_TOKENS = 256, NOTHING = 16;
constexpr uint64_t MIX = 0x9E3779B97F4A7C15, MIX_PAIRS = 0xD6E8FEB86659FD93;

inline uint64_t hashed(const int64_t* symbols, const uint64_t* factors, int64_t length) {
    uint64_t sum = 0;
    for (int64_t i = 0; i < length; ++i) sum += static_cast<uint64_t>(symbols[i]) * factors[i];
    return sum;
}

float half(uint16_t bits) {
    const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16, exponent = bits >> 10 & 31, fraction = bits & 0x3ff;
    if (!exponent) return std::ldexp(static_cast<float>(fraction), -24) * (sign ? -1.0f : 1.0f);
    const uint32_t whole = sign | (exponent == 31 ? 255u : exponent + 112) << 23 | fraction << 13;
    float value;
    std::memcpy(&value, &whole, sizeof(value));
    return value;
}

double distinct(std::vector<uint64_t>& values) {
    const size_t n = values.size();
    size_t places = 16;
    while (places < 2 * n) places *= 2;
    std::vector<uint64_t> table(places);
    std::vector<uint8_t> taken(places, 0);
    size_t count = 0;
    for (const uint64_t value : values) {
        size_t at = (value * MIX >> 20) & (places - 1);
        while (taken[at] && table[at] != value) at = (at + 1) & (places - 1);
        count += !taken[at];
        taken[at] = 1;
        table[at] = value;
    }
    return static_cast<double>(count) / static_cast<double>(n);
}

}  // namespace

extern "C" {

// The table of serve.drift.token_runs.SharedRuns.
struct SharedRuns {
    uint32_t* tags;
    float *counts, *before;
    const uint64_t *factors, *turns;  // (RUN), (MINIMA)
    const uint8_t* numbers;           // (vocabulary + 1) or none
    int64_t vocabulary;
};

// A prompt's words: tokens (n), symbols (n), symbol_of (n), runs (n); it learns them, each at the weight `unit`, and
// `before_it` is that of all prompts before it. At most MOST_TOKENS of n are looked at. counts (3): of tokens, symbols and
// runs.
void loradock_tokens_learn(
    const SharedRuns* shared, const int64_t* ids, int64_t n, float unit, float before_it, int32_t* tokens,
    int64_t* symbols, int64_t* symbol_of, uint64_t* runs, int64_t* counts) {
    const int64_t beyond = std::max<int64_t>(0, n - MOST_TOKENS), kept = n - beyond;
    std::vector<int64_t> edged(kept + 2);
    edged[0] = EDGE;
    int64_t size = 0;
    bool before = false;
    for (int64_t i = 0; i < kept; ++i) {
        const int64_t id = ids[i < kept / 2 || !beyond ? i : i + beyond];
        tokens[i] = static_cast<int32_t>(id);
        const uint64_t last = static_cast<uint64_t>(shared->vocabulary);
        const bool digits = shared->numbers && shared->numbers[std::min(static_cast<uint64_t>(id), last)];
        if (!(digits && before)) {
            symbols[size] = edged[size + 1] = digits ? NUMBER : id;
            ++size;
        }
        symbol_of[i] = size - 1;
        before = digits;
    }
    edged[size + 1] = EDGE;
    const int64_t count = std::max<int64_t>(0, size + 3 - RUN);
    counts[0] = kept;
    counts[1] = size;
    counts[2] = count;
    // All are looked up before any is written: a run that a prompt holds twice counts once.
    std::vector<float> updated(count), since(count);
    for (int64_t i = 0; i < count; ++i) {
        const uint64_t run = runs[i] = hashed(edged.data() + i, shared->factors, RUN);
        const uint64_t place = run >> (64 - PLACES);
        const bool same = shared->tags[place] == static_cast<uint32_t>(run >> 16);
        const bool fresh = shared->counts[place] < unit && !std::isinf(shared->before[place]);
        updated[i] = same || fresh ? (same ? shared->counts[place] : 0.0f) + unit : -1.0f;
        since[i] = fresh ? before_it : shared->before[place];
    }
    for (int64_t i = 0; i < count; ++i) {
        if (updated[i] < 0) continue;
        const uint64_t place = runs[i] >> (64 - PLACES);
        shared->tags[place] = static_cast<uint32_t>(runs[i] >> 16);
        shared->counts[place] = updated[i];
        shared->before[place] = since[i];
    }
}

// What of a prompt is its own. What at least `least` prompts hold is shared where most of `total` do since it came, where it
// is fixed, or where such runs cover `stretch` symbols besides without a gap, but for all of a popular prompt; with `stretch`
// of one run it always is. own (tokens), shared_runs (runs): the tokens that lie in no shared run, and the runs that are
// shared. minima (MINIMA): of its own symbols. found (4): of own tokens, of shared runs, of own symbols; whether any of these
// is no number.
void loradock_tokens_own(
    const SharedRuns* shared, float least, float total, int64_t stretch, const int32_t* tokens, const int64_t* symbols,
    const int64_t* symbol_of, const uint64_t* runs, const int64_t* counts, int32_t* own, uint64_t* shared_runs,
    uint64_t* minima, int64_t* found) {
    const int64_t size = counts[1], runs_of_it = counts[2], symbols_of_it = runs_of_it + RUN - 1;
    // Runs that are held by many, and those that most hold; and how many of either a symbol lies in, edges included.
    std::vector<uint8_t> held(runs_of_it, 0), shared_by_most(runs_of_it, 0);
    std::vector<int32_t> in_held(symbols_of_it + 1, 0), in_most(symbols_of_it + 1, 0);
    auto mark = [](std::vector<int32_t>& change, int64_t i) { ++change[i], --change[i + RUN]; };
    for (int64_t i = 0; i < runs_of_it; ++i) {
        const uint64_t place = runs[i] >> (64 - PLACES);
        const float count = shared->counts[place], before = shared->before[place];
        if (shared->tags[place] != static_cast<uint32_t>(runs[i] >> 16) || !(count >= least || std::isinf(before))) continue;
        held[i] = 1;
        mark(in_held, i);
        if (count >= MAJORITY * (total - before)) shared_by_most[i] = 1, mark(in_most, i);
    }
    const bool single = stretch == RUN;
    std::vector<uint8_t> is_shared = single ? held : shared_by_most;
    bool popular = !single && runs_of_it > 0;
    for (int64_t i = 0, begun = 0, few = 0, a = 0, m = 0; !single && runs_of_it && i <= symbols_of_it; ++i) {
        a += in_held[i], m += in_most[i];
        if (a > 0) {
            few += m == 0;
            continue;
        }
        const bool cut = few >= stretch;
        for (int64_t run = begun; cut && run + RUN <= i; ++run) is_shared[run] = held[run];
        if (i < symbols_of_it) popular = false;  // a symbol that no run of many covers
        begun = i + 1, few = 0;
    }
    if (popular) {  // whether all symbols are covered by what is shared
        int64_t upto = 0;
        for (int64_t i = 0; i < runs_of_it; ++i)
            if (is_shared[i] && i <= upto) upto = i + RUN;
        if (upto >= symbols_of_it) is_shared = shared_by_most;
    }
    std::vector<int32_t> change(symbols_of_it + 1, 0);
    int64_t known = 0;
    for (int64_t i = 0; i < runs_of_it; ++i) {
        if (!is_shared[i]) continue;
        shared_runs[known++] = runs[i];
        mark(change, i);
    }
    std::vector<int64_t> rest;
    rest.reserve(size);
    std::vector<uint8_t> is_own(size);
    int32_t within = change[0];
    bool words = false;
    for (int64_t i = 0; i < size; ++i) {
        within += change[i + 1];
        is_own[i] = within == 0;
        if (!is_own[i]) continue;
        rest.push_back(symbols[i]);
        words |= symbols[i] != NUMBER;
    }
    int64_t taken = 0;
    for (int64_t i = 0; i < counts[0]; ++i) {
        if (is_own[symbol_of[i]]) own[taken++] = tokens[i];
    }
    const int64_t left = static_cast<int64_t>(rest.size()), length = std::min<int64_t>(SHORT_RUN, left);
    std::fill(minima, minima + MINIMA, ~0ull);
    for (int64_t i = 0; left && i + length <= left; ++i) {
        const uint64_t run = hashed(rest.data() + i, shared->factors, length), mixed = run ^ run >> 31;
        for (int m = 0; m < MINIMA; ++m) minima[m] = std::min(minima[m], mixed * shared->turns[m]);
    }
    for (int m = 0; m < MINIMA; ++m) minima[m] >>= 16;
    found[0] = taken;
    found[1] = known;
    found[2] = left;
    found[3] = words;
}

// The tables of serve.drift.embedding.Embedding; narrow: none where it is not known.
struct Embedding {
    const float *table, *weights;
    const int8_t* narrow;
    int64_t vocabulary, dimensions, width;
};

// Features of n tokens: vector (dimensions), sketch (2 SAMPLED), mean (width), shares (2) of distinct tokens and pairs.
// Where `mean` or `shares` is none, it is left out.
void loradock_tokens_features(
    const Embedding* embedding, const int64_t* ids, int64_t n, double* vector, double* sketch, double* mean,
    double* shares) {
    const int64_t dimensions = embedding->dimensions;
    const uint64_t vocabulary = static_cast<uint64_t>(embedding->vocabulary);
    std::vector<float> sum(dimensions, 0.0f);
    float weight = 0;
    for (int64_t i = 0; i < n; ++i) {
        const uint64_t id = static_cast<uint64_t>(ids[i]);
        if (id >= vocabulary) continue;
        const float by = embedding->weights[id], *row = embedding->table + id * dimensions;
        weight += by;
        for (int64_t c = 0; c < dimensions; ++c) sum[c] += by * row[c];
    }
    for (int64_t c = 0; c < dimensions; ++c) vector[c] = weight > 0 ? sum[c] / weight : 0.0f;
    const bool all = n <= SAMPLED;
    for (int64_t i = 0; i < SAMPLED; ++i) {
        const int64_t at = all ? i : i * n / SAMPLED;
        const uint64_t first = at < n ? static_cast<uint64_t>(ids[at]) : 0;
        sketch[i] = at < n ? static_cast<double>((first + 1) * MIX >> 50) : -1.0;
        const bool pair = at + 1 < n;
        const uint64_t second = pair ? static_cast<uint64_t>(ids[at + 1]) : 0;
        sketch[SAMPLED + i] = pair ? static_cast<double>((first * MIX + second) * MIX_PAIRS >> 49) : -1.0;
    }
    if (mean) {
        const int64_t width = embedding->width, looked = std::min<int64_t>(n, MEAN_TOKENS);
        std::vector<int16_t> total(width, 0);
        int64_t known = 0;
        for (int64_t i = 0; i < looked; ++i) {
            const uint64_t id = static_cast<uint64_t>(ids[n > MEAN_TOKENS ? i * n / MEAN_TOKENS : i]);
            if (id >= vocabulary) continue;
            ++known;
            const int8_t* row = embedding->narrow + id * width;
            for (int64_t c = 0; c < width; ++c) total[c] = static_cast<int16_t>(total[c] + row[c]);
        }
        const float by = static_cast<float>(known + NOTHING);
        for (int64_t c = 0; c < width; ++c) mean[c] = static_cast<float>(total[c]) / by;
    }
    if (shares) {
        std::vector<uint64_t> values(ids, ids + n);
        shares[0] = distinct(values);
        for (int64_t i = 0; i + 1 < n; ++i) values[i] = static_cast<uint64_t>(ids[i]) << 32 | static_cast<uint64_t>(ids[i + 1]);
        values.resize(std::max<int64_t>(n - 1, 0));
        shares[1] = n > 1 ? distinct(values) : 1.0;
    }
}

// Scores of tokens: two surprises, and `common` counts of frequent ones where there are any, into rows of `out`, which
// are `out_stride` apart. parts: sketches, `stride` apart. tokens, pairs: float16, with a 0 behind the last.
void loradock_tokens_scores(
    const float* parts, int64_t stride, int64_t count, const uint16_t* tokens, int64_t buckets, const uint16_t* pairs,
    int64_t pair_buckets, const float* spread, const uint8_t* place, const float* shares, int64_t common, float* out,
    int64_t out_stride) {
    std::vector<int32_t> counts(common + 1);
    for (int64_t i = 0; i < count; ++i) {
        const float* part = parts + i * stride;
        float* into = out + i * out_stride;
        const uint16_t* tables[2] = {tokens, pairs};
        const int64_t sizes[2] = {buckets, pair_buckets};
        int64_t there[2] = {};
        for (int kind = 0; kind < 2; ++kind) {
            float sum = 0;
            for (int64_t j = 0; j < SAMPLED; ++j) {
                const int64_t id = static_cast<int64_t>(part[kind * SAMPLED + j]);
                there[kind] += id >= 0;
                sum += half(tables[kind][id >= 0 ? id : sizes[kind]]);
            }
            const double length = static_cast<double>(std::max<int64_t>(there[kind], 1));
            into[kind] = static_cast<float>(sum / (spread[kind] * std::sqrt(length)));
        }
        if (!common) continue;
        std::fill(counts.begin(), counts.end(), 0);
        for (int64_t j = 0; j < SAMPLED; ++j) {
            const int64_t id = static_cast<int64_t>(part[j]);
            ++counts[place[id >= 0 ? id : buckets]];
        }
        const float length = std::max(static_cast<float>(there[0]), 1e-6f);
        for (int64_t c = 0; c < common; ++c) {
            const float expected = shares[c] * length;
            const double above = static_cast<double>(counts[c]) - static_cast<double>(expected);
            into[2 + c] = static_cast<float>(above / static_cast<double>(std::sqrt(expected)));
        }
    }
}

}  // extern "C"
