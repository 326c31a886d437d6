// What is made of a request's tokens: runs that prompts share, and rows of features. The numpy ways beside it say what
// each number is: token_runs.py, thinning.py, embedding.py, token_surprise.py, common_tokens.py.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

namespace {

constexpr int RUN = 6, SHORT_RUN = 3, MINIMA = 12, PLACES = 15, WAYS = 4;
constexpr int64_t MOST_TOKENS = 8192, NUMBER = -1, EDGE = -2;
constexpr int MOST = 8, LATELY = 9, REMEMBERED = 16;
constexpr uint32_t BEFORE = 0xff00;
constexpr float ALIKE = 1.001f;
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

// The table of serve.drift.features.token_runs.SharedRuns.
struct SharedRuns {
    uint32_t* tags;
    float* counts;
    uint32_t* lately;
    uint8_t* fixed;
    const uint64_t *factors, *turns;  // (RUN), (MINIMA)
    const uint8_t* numbers;           // (vocabulary + 1) or none
    int64_t vocabulary;
};

static uint32_t tag_of(uint64_t run) { return static_cast<uint32_t>(run >> 16); }

// The first of the WAYS places where a run may lie.
static int64_t group_of(uint64_t run) { return static_cast<int64_t>(run >> (64 - PLACES)) / WAYS * WAYS; }

// Where a run lies, or -1.
static int64_t place_of(const SharedRuns& shared, uint64_t run) {
    const int64_t group = group_of(run);
    for (int64_t place = group; place < group + WAYS; ++place)
        if (shared.tags[place] == tag_of(run)) return place;
    return -1;
}

// The place of a group whose run counts least and is not fixed, or -1.
static int64_t least_of(const SharedRuns& shared, int64_t group) {
    int64_t least = -1;
    for (int64_t place = group; place < group + WAYS; ++place)
        if (!shared.fixed[place] && (least < 0 || shared.counts[place] < shared.counts[least])) least = place;
    return least;
}

// Which of the last REMEMBERED prompts held the run there: the newest one is the lowest bit.
static uint32_t held_lately(const SharedRuns& shared, int64_t place, int64_t raw) {
    const uint32_t word = shared.lately[place], ago = (static_cast<uint32_t>(raw & 0xffff) - word) & 0xffff;
    return ago < REMEMBERED ? (word >> 16) << ago & ((1u << REMEMBERED) - 1) : 0;
}

// A prompt's words: tokens (n), symbols (n), symbol_of (n), runs (n); it learns them, each at the weight `unit`, as those of
// the `raw`th prompt. At most MOST_TOKENS of n are looked at. counts (3): of tokens, symbols and runs.
void loradock_tokens_learn(
    const SharedRuns* shared, const int64_t* ids, int64_t n, float unit, int64_t raw, int32_t* tokens,
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
    std::vector<int64_t> places(count);
    std::vector<float> updated(count);
    std::vector<uint32_t> lately(count);
    const uint32_t now = 1u << 16 | static_cast<uint32_t>(raw & 0xffff);
    for (int64_t i = 0; i < count; ++i) {
        runs[i] = hashed(edged.data() + i, shared->factors, RUN);
        const int64_t place = places[i] = place_of(*shared, runs[i]);
        if (place < 0) continue;
        updated[i] = shared->counts[place] + unit;
        lately[i] = held_lately(*shared, place, raw) << 16 | now;
    }
    for (int64_t i = 0; i < count; ++i) {
        if (places[i] < 0) continue;
        shared->counts[places[i]] = updated[i];
        shared->lately[places[i]] = lately[i];
    }
    // A new one takes the place of one that was seen once.
    for (int64_t i = 0; i < count; ++i) {
        if (places[i] >= 0 || place_of(*shared, runs[i]) >= 0) continue;
        const int64_t place = least_of(*shared, group_of(runs[i]));
        if (place < 0 || shared->counts[place] >= unit) continue;
        shared->tags[place] = tag_of(runs[i]);
        shared->counts[place] = unit;
        shared->lately[place] = now;
    }
}

// What of a prompt is its own. What at least `least` prompts hold is shared where it is fixed, where most of the last ones
// do, or where the same ones hold runs that cover `stretch` symbols without a gap, but in a popular prompt; with `stretch`
// of one run it always is. own (tokens), shared_runs (runs): the tokens that lie in no shared run, and the runs that are
// shared. minima (MINIMA): of its own symbols. found (4): of own tokens, of shared runs, of own symbols; whether any of these
// is no number.
void loradock_tokens_own(
    const SharedRuns* shared, float least, int64_t raw, int64_t stretch, const int32_t* tokens, const int64_t* symbols,
    const int64_t* symbol_of, const uint64_t* runs, const int64_t* counts, int32_t* own, uint64_t* shared_runs,
    uint64_t* minima, int64_t* found) {
    const int64_t size = counts[1], runs_of_it = counts[2];
    const bool single = stretch == RUN;
    std::vector<uint8_t> is_shared(runs_of_it, 0);
    std::vector<std::pair<float, int64_t>> few;  // count and number of the others that many hold
    int64_t covered = 0;                         // symbols, edges included, without a gap from the first one on
    for (int64_t i = 0; i < runs_of_it; ++i) {
        const int64_t place = place_of(*shared, runs[i]);
        if (place < 0) continue;
        const bool fixed = shared->fixed[place];
        if (!(shared->counts[place] >= least || fixed)) continue;
        if (i <= covered) covered = i + RUN;
        const uint32_t lately = held_lately(*shared, place, raw);
        const bool newly = __builtin_popcount(lately & ((1u << LATELY) - 1)) >= MOST;
        if (single || fixed || newly || (lately & BEFORE) == BEFORE)
            is_shared[i] = 1;
        else
            few.push_back({shared->counts[place], i});
    }
    const bool popular = covered >= runs_of_it + RUN - 1;
    if (!popular && static_cast<int64_t>(few.size()) * RUN >= stretch) {
        std::sort(few.begin(), few.end());
        std::vector<int64_t> alike;
        for (size_t begin = 0, end; begin < few.size(); begin = end) {
            alike.clear();
            for (end = begin; end < few.size() && few[end].first <= few[begin].first * ALIKE; ++end)
                alike.push_back(few[end].second);
            std::sort(alike.begin(), alike.end());
            for (size_t first = 0, last; first < alike.size(); first = last) {
                for (last = first + 1; last < alike.size() && alike[last] - alike[last - 1] <= RUN;) ++last;
                if (alike[last - 1] - alike[first] + RUN < stretch) continue;
                for (size_t run = first; run < last; ++run) is_shared[alike[run]] = 1;
            }
        }
    }
    std::vector<int32_t> change(size + RUN + 3, 0);
    int64_t known = 0;
    for (int64_t i = 0; i < runs_of_it; ++i) {
        if (!is_shared[i]) continue;
        shared_runs[known++] = runs[i];
        ++change[i];
        --change[i + RUN];
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

// The tables of serve.drift.features.embedding.Embedding; narrow: none where it is not known.
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
