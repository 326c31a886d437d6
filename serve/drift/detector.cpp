// The detector's inner loops (serve/drift/detector/detector.py and what it uses) for some requests in one call.
//
// Every number is computed as numpy does it there, in the same order where that is defined: p-values and bets on scores
// are the same to the bit. Sums over many numbers (products with directions, the evidence) round otherwise.
#include "detector.h"
#include "products.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

namespace drift {

constexpr double MOST = 1e290, SMALLEST_UNIT = 1e-100, PRIOR = 10.0, UNIFORM = 0.1;
constexpr double SHRINKAGE = 0.7, TEACHES = 0.9;
constexpr float FARTHEST = 4.0f, SAME = 2e-5f;
constexpr double FARTHER = 1.5, FOREIGN = 0.2;

// As Generator.integers(most + 1) draws it: Lemire's way, of 32 bits.
static int64_t draw(BitGenerator* lots, uint32_t most) {
    if (most == 0) return 0;
    const uint32_t range = most + 1;
    uint64_t product = static_cast<uint64_t>(lots->next_uint32(lots->state)) * range;
    uint32_t left = static_cast<uint32_t>(product);
    if (left < range) {
        const uint32_t threshold = (UINT32_MAX - most) % range;
        while (left < threshold) {
            product = static_cast<uint64_t>(lots->next_uint32(lots->state)) * range;
            left = static_cast<uint32_t>(product);
        }
    }
    return static_cast<int64_t>(product >> 32);
}

static inline int64_t cell(double p) { return std::min<int64_t>(static_cast<int64_t>(p * CELLS), CELLS - 1); }

// Insert a score at its place into a sorted bag of `size`. Of a full one entry `out`, counted with it, leaves: -1 of none.
static void insert(float* bag, int64_t size, int64_t place, float score, int64_t out) {
    if (out < 0) out = size + 1;
    if (out > place) {
        std::memmove(bag + place + 1, bag + place, (out - 1 - place) * sizeof(float));
        bag[place] = score;
    } else if (out < place) {
        std::memmove(bag + out, bag + out + 1, (place - 1 - out) * sizeof(float));
        bag[place - 1] = score;
    }
}

struct Ranks {
    std::vector<double> p, least, most, ties;
    std::vector<int64_t> out;
};

// The p-values of a row's scores; the bags take it in.
static void rank_scores(Detector& d, const float* row, Ranks& ranks) {
    const int64_t k = d.scores, m = d.bags_size, stride = d.capacity + 1;
    const bool full = m >= d.capacity;
    for (int64_t i = 0; i < k; ++i) ranks.ties[i] = d.lots->next_double(d.lots->state);
    for (int64_t i = 0; i < k; ++i) ranks.out[i] = full ? draw(d.lots, static_cast<uint32_t>(d.capacity)) : -1;
    const double size = static_cast<double>(m + 1);
    for (int64_t i = 0; i < k; ++i) {
        float *bag = d.bags + i * stride, score = row[i];
        const int64_t less = std::lower_bound(bag, bag + m, score) - bag;
        int64_t upto = less;
        if (less < m && bag[less] == score) upto = std::upper_bound(bag + less, bag + m, score) - bag;
        ranks.p[i] = (static_cast<double>(less) + ranks.ties[i] * static_cast<double>(upto - less + 1)) / size;
        ranks.least[i] = ranks.most[i] = ranks.p[i];
        if (d.margin && d.margin[i] != 0) {
            const float low = score - d.margin[i], high = score + d.margin[i];
            ranks.least[i] = static_cast<double>(std::lower_bound(bag, bag + m, low) - bag) / size;
            ranks.most[i] = static_cast<double>(std::upper_bound(bag, bag + m, high) - bag + 1) / size;
        }
        insert(bag, m, upto, score, ranks.out[i]);
    }
    if (!full) ++d.bags_size;
}

// What is bet on the scores, into bets; the histograms learn them.
static void bet_on_scores(Detector& d, const Ranks& ranks, double* bets) {
    const int64_t k = d.scores;
    int64_t first = 0;
    double* fixed = bets + k * HISTOGRAMS;
    for (int64_t i = 0; i < k; ++i) {
        const double p = ranks.p[i];
        const bool bounded = d.margin && d.margin[i] != 0;
        for (int h = 0; h < HISTOGRAMS; ++h) {
            const int64_t at = i * HISTOGRAMS + h, bins = d.bins[h];
            const int64_t bin = first + std::min<int64_t>(static_cast<int64_t>(p * static_cast<double>(bins)), bins - 1);
            const double unit = d.unit[at], held = d.learned[bin], next = unit * d.fades[h];
            d.learned[bin] = held + 1 / next;
            double e = held * static_cast<double>(bins);
            e *= unit;
            e += PRIOR;
            e /= d.weight[at] + PRIOR;
            e *= 1 - UNIFORM;
            e += UNIFORM;
            bets[at] = bounded ? 1 : e;
            d.unit[at] = next;
            d.weight[at] = d.weight[at] * d.fades[h] + 1;
            first += bins;
        }
        const double *low = d.score_bets + cell(ranks.least[i]) * FIXED, *high = d.score_bets + cell(ranks.most[i]) * FIXED;
        for (int f = 0; f < FIXED / 2; ++f) fixed[i * FIXED + f] = low[f];
        for (int f = FIXED / 2; f < FIXED; ++f) fixed[i * FIXED + f] = high[f];
    }
    if (k && d.unit[0] < SMALLEST_UNIT) {
        double* bin = d.learned;
        for (int64_t at = 0; at < k * HISTOGRAMS; ++at) {
            for (int64_t b = 0; b < d.bins[at % HISTOGRAMS]; ++b) *bin++ *= d.unit[at];
        }
        std::fill(d.unit, d.unit + k * HISTOGRAMS, 1.0);
    }
}

// The weighted sum of all R.
extern "C" double loradock_drift_evidence(const double* r, const double* share, int64_t count) {
    double total = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < count; ++i) total += r[i] * share[i];
    return total;
}

// Place the bets; by how much that multiplied the evidence.
static double place_bets(Detector& d, const double* bets, int64_t count) {
    const double before = d.evidence;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
        const double r = std::min((d.r[i] + 1) * bets[i], MOST), page = std::min(std::max(d.page[i], 1.0) * bets[i], MOST);
        d.r[i] = r;
        d.page[i] = page;
        d.start[i] = page <= 1 ? d.updates : d.start[i];
    }
    d.evidence = loradock_drift_evidence(d.r, d.share, count);
    return d.evidence / (before + 1);
}

// How many of `size` numbers lie below `low`, and how many not above `high`.
static void count(const float* along, int64_t size, float low, float high, int64_t& less, int64_t& upto) {
    int32_t below = 0, within = 0;
#pragma omp simd reduction(+ : below, within)
    for (int64_t j = 0; j < size; ++j) {
        below += along[j] < low;
        within += along[j] <= high;
    }
    less = below;
    upto = within;
}

// Ranks along the directions, into cells; the bag takes the row in. Its random numbers come first.
static void rank_along(Detector& d, const float* row, const double* ties, int64_t place, int64_t* cells) {
    const int64_t m = d.size, columns = d.scores + d.silent, stride = d.bag_capacity + 1;
    float own[DIRECTIONS];
    for (int i = 0; i < DIRECTIONS; ++i) {
        float* along = d.along + i * stride;
        own[i] = dot(d.towards + i * columns, row, columns);
        along[m] = own[i];
        const float ranked = d.margin ? own[i] - d.allowed[i] : own[i];
        int64_t less, upto;
        count(along, m + 1, ranked - SAME, ranked + SAME, less, upto);
        const double p = (static_cast<double>(less) + ties[i] * static_cast<double>(upto - less)) / static_cast<double>(m + 1);
        cells[i] = cell(p);
    }
    if (place == m && m < d.bag_capacity) {
        ++d.size;
    } else {
        for (int i = 0; i < DIRECTIONS; ++i) d.along[i * stride + place] = own[i];
    }
    for (int64_t c = 0; c < columns; ++c) d.bag[c * stride + place] = row[c];
    if (d.silent) {
        for (int i = 0; i < DIRECTIONS; ++i) d.pull[i * stride + place] = 0;
    }
}

// Turn the directions to what was learned.
static void point(Detector& d) {
    const int64_t columns = d.scores + d.silent, stride = d.bag_capacity + 1;
    double lengths[DIRECTIONS];
    std::vector<double> kept(columns);
    for (int i = 0; i < DIRECTIONS; ++i) {
        const double* learned = d.taught + i * columns;
        const double noise = SHRINKAGE * std::sqrt(d.squares[i]);
        double squares = 0;
        for (int64_t c = 0; c < columns; ++c) {
            kept[c] = std::max(std::fabs(learned[c]) - noise, 0.0);
            squares += kept[c] * kept[c];
        }
        if (squares != 0) {
            for (int64_t c = 0; c < columns; ++c) kept[c] = std::copysign(kept[c], learned[c]);
        } else {  // of a direction that is nothing but noise all is kept
            for (int64_t c = 0; c < columns; ++c) {
                kept[c] = learned[c];
                squares += kept[c] * kept[c];
            }
        }
        lengths[i] = std::max(std::sqrt(squares), 1e-12);
        float allowed = 0;
        for (int64_t c = 0; c < columns; ++c) {
            const float towards = static_cast<float>(kept[c] / lengths[i]);
            d.towards[i * columns + c] = towards;
            if (d.margin) allowed += std::fabs(towards) * d.margin[c];
            if (c >= d.scores) d.silent_part[i * d.silent + c - d.scores] = towards != 0;
        }
        if (d.margin) d.allowed[i] = allowed;
    }
    project(d.bag, d.size, columns, stride, d.towards, d.along);
    d.placed = 0;
    if (!d.silent) return;
    for (int i = 0; i < DIRECTIONS; ++i) {
        double *pull = d.pull + i * stride, faded = d.faded[i];
        float* along = d.along + i * stride;
        for (int64_t j = 0; j <= d.bag_capacity; ++j) pull[j] *= faded;
        for (int64_t j = 0; j < d.size; ++j) along[j] = static_cast<float>(along[j] - pull[j] / lengths[i]);
        d.faded[i] = 1;
    }
}

// Learn from a row's p-values, which multiplied the evidence by `multiple`, and from its silent scores. place: in the bag.
static void teach(Detector& d, const float* row, const Ranks& ranks, double multiple, int64_t place) {
    const int64_t columns = d.scores + d.silent, stride = d.bag_capacity + 1;
    const double share = multiple > 0 ? std::min(std::max(1 - TEACHES / multiple, 0.0), 1.0) : 0.0;
    for (int i = 0; i < DIRECTIONS; ++i) {
        const bool last = i == DIRECTIONS - 1;
        const double weight = last ? share : 1.0;
        double fade = d.direction_fades[i];
        if (last) fade = share != 0 ? std::pow(fade, share) : 1.0;
        double* learned = d.taught + i * columns;
        for (int64_t c = 0; c < d.scores; ++c) {
            learned[c] = learned[c] * fade + weight * d.normal[cell(ranks.p[c])];
        }
        if (d.silent) {
            float pull = 0;
            const float *silent = row + d.scores, *part = d.silent_part + i * d.silent;
            for (int64_t c = 0; c < d.silent; ++c) {
                const float taught = std::min(std::max(silent[c], -FARTHEST), FARTHEST);
                learned[d.scores + c] = learned[d.scores + c] * fade + weight * static_cast<double>(taught);
                pull += part[c] * (taught * silent[c]);
            }
            d.pull[i * stride + place] = weight * static_cast<double>(pull) / (d.faded[i] * fade);
            d.faded[i] *= fade;
        }
        d.squares[i] = d.squares[i] * (fade * fade) + weight * weight;
    }
    if (++d.age % d.turn == 0) point(d);
}

// What rows taught: the sum of them. In float32 for some rows, then in float64.
struct Learned {
    std::vector<double> sums;   // (MANY, width)
    std::vector<float> latest;  // (MANY, width)
    double mass[MANY] = {};
    int64_t width, rows = 0;

    explicit Learned(int64_t width) : sums(MANY * width, 0.0), latest(MANY * width, 0.0f), width(width) {}

    void add(const float* row, const float* taught) {
        add_row(latest.data(), row, width, taught);
        for (int i = 0; i < MANY; ++i) mass[i] += static_cast<double>(taught[i]);
        if (++rows % 64 == 0) flush();
    }

    void flush() {
        for (size_t c = 0; c < sums.size(); ++c) sums[c] += static_cast<double>(latest[c]);
        std::fill(latest.begin(), latest.end(), 0.0f);
    }
};

// The directions of what rows taught; of what length those sums were.
static void aim(MeanRows& m, Learned& learned, double* lengths) {
    learned.flush();
    for (int i = 0; i < MANY; ++i) {
        const double* sums = learned.sums.data() + i * m.width;
        double squares = 0;
        for (int64_t c = 0; c < m.width; ++c) squares += sums[c] * sums[c];
        lengths[i] = std::max(std::sqrt(squares), 1e-12);
        for (int64_t c = 0; c < m.width; ++c) m.towards[i * m.width + c] = static_cast<float>(sums[c] / lengths[i]);
        m.mean_part[i] = learned.mass[i] / lengths[i];
    }
}

// Where the reference lies along the directions: its mean and spread.
static void spread(const MeanRows& m, double* centre, double* deviation) {
    double sum[MANY] = {}, squares[MANY] = {};
    for (int64_t j = 0; j < m.known; ++j) {
        float along[MANY];
        dots(m.reference + j * m.width, m.towards, m.width, along);
        const double leverage = m.known_leverage[j];
        for (int i = 0; i < MANY; ++i) {
            const double at = (along[i] + m.mean_part[i] * leverage) / (1 - leverage);
            sum[i] += at;
            squares[i] += at * at;
        }
    }
    const double n = static_cast<double>(m.known);
    for (int i = 0; i < MANY; ++i) {
        centre[i] = sum[i] / n;
        deviation[i] = std::max(std::sqrt(std::max(squares[i] / n - centre[i] * centre[i], 0.0)), 1e-12);
    }
}

// Learn from the rows that wait, and rank along what was learned (MeanRows._turn).
static void turn_means(MeanRows& m) {
    const int64_t width = m.width, stride = m.capacity + 1, waiting = m.waiting;
    std::vector<float> rows(waiting * width);
    multiply(m.waiting_rows, waiting, m.whiten, width, rows.data());
    for (int64_t i = 0; i < waiting; ++i) {  // of two rows in one place the later one stays
        const int64_t place = m.waiting_places[i];
        const float *row = rows.data() + i * width, squares = dot(row, row, width);
        std::memcpy(m.bag + place * width, row, width * sizeof(float));
        m.times[place] = static_cast<double>(m.ranked + i);
        m.teaching[place] = static_cast<float>(std::min(m.farthest / std::max<double>(std::sqrt(squares), 1e-12), 1.0));
        m.pull[place] = static_cast<double>(m.teaching[place] * squares);
        m.leverage[place] = 0;
    }
    m.ranked += waiting;
    m.waiting = 0;
    const int64_t size = m.size;
    // What each live row weighs: as old as it is.
    std::vector<double> weights(MANY * size, 0.0);
    Learned first(width), second(width);
    double lengths[MANY], centre[MANY], deviation[MANY];
    for (int64_t j = 0; j < size; ++j) {
        if (m.teaching[j] == 0) continue;
        const int64_t age = m.ranked - 1 - static_cast<int64_t>(m.times[j]);
        float taught[MANY];
        for (int i = 0; i < MANY; ++i) {
            const double* faded = m.faded + i * m.ages;
            weights[i * size + j] = age < m.ages ? faded[age] : std::pow(faded[1], static_cast<double>(age));
            taught[i] = static_cast<float>(weights[i * size + j] * m.teaching[j]);
        }
        first.add(m.bag + j * width, taught);
    }
    aim(m, first, lengths);
    spread(m, centre, deviation);
    for (int64_t j = 0; j < size; ++j) {
        if (m.teaching[j] == 0) continue;
        float along[MANY], taught[MANY];
        dots(m.bag + j * width, m.towards, width, along);
        for (int i = 0; i < MANY; ++i) {
            double& weight = weights[i * size + j];
            const double at = static_cast<float>(along[i] - weight * m.pull[j] / lengths[i]);
            const double farther = FARTHER * (at - centre[i]) / deviation[i] - FARTHER * FARTHER / 2;
            const double odds = FOREIGN / (1 - FOREIGN) * std::exp(std::min(farther, 20.0));
            weight = weight * odds / (1 + odds);
            taught[i] = static_cast<float>(weight * m.teaching[j]);
        }
        second.add(m.bag + j * width, taught);
    }
    aim(m, second, lengths);
    for (int64_t j = 0; j < size; ++j) {
        float along[MANY];
        dots(m.bag + j * width, m.towards, width, along);
        const double leverage = m.leverage[j];
        for (int i = 0; i < MANY; ++i) {
            const double own = weights[i * size + j] * m.pull[j] / lengths[i];
            m.along[i * stride + j] = static_cast<float>((along[i] - own + m.mean_part[i] * leverage) / (1 - leverage));
        }
    }
    for (int64_t k = 0; k < width; ++k) {
        float along[MANY];
        dots(m.whiten + k * width, m.towards, width, along);
        for (int i = 0; i < MANY; ++i) m.onto[i * width + k] = along[i];
    }
    m.placed = 0;
}

// Rank a mean row, bet on it, and have it wait to teach.
static void observe_mean(MeanRows& m, const float* row, int64_t now) {
    const int64_t size = m.size, width = m.width, stride = m.capacity + 1;
    float *centred = m.waiting_rows + m.waiting * width, own[MANY];
    for (int64_t c = 0; c < width; ++c) centred[c] = row[c] - m.centre[c];
    dots(centred, m.onto, width, own);
    int64_t less[MANY], upto[MANY], place = size;
    double ties[MANY];
    for (int i = 0; i < MANY; ++i) count(m.along + i * stride, size, own[i] - SAME, own[i] + SAME, less[i], upto[i]);
    for (int i = 0; i < MANY; ++i) ties[i] = m.lots->next_double(m.lots->state);
    if (size < m.capacity) {
        ++m.size;
    } else {
        place = draw(m.lots, static_cast<uint32_t>(size));
    }
    for (int i = 0; i < MANY; ++i) m.along[i * stride + place] = own[i];
    m.waiting_places[m.waiting++] = place;
    if (m.waiting >= m.turn) turn_means(m);
    for (int i = 0; i < MANY; ++i) {
        const double p = (static_cast<double>(less[i]) + ties[i] * static_cast<double>(upto[i] - less[i] + 1)) /
                         static_cast<double>(size + 1);
        const double* bets = m.bets + cell(p) * MANY_BETS;
        for (int b = 0; b < MANY_BETS; ++b) {
            const int64_t at = i * MANY_BETS + b;
            m.r[at] = std::min((m.r[at] + 1) * bets[b], MOST);
            m.page[at] = std::min(std::max(m.page[at], 1.0) * bets[b], MOST);
            if (m.page[at] <= 1) m.start[at] = now;
        }
    }
}

static double mean_evidence(const MeanRows& m) {
    double total = 0;
    for (int i = 0; i < MANY * MANY_BETS; ++i) total += m.r[i];
    return total / (MANY * MANY_BETS);
}

// How many of the reference's mean rows lie below a row along the directions, and how many not above it, as if there
// were `size` of them (MeanRows.reference_places).
static void places_of_mean(MeanRows& m, const float* row, int64_t size, int64_t* less, int64_t* upto) {
    if (!m.placed) {
        for (int64_t j = 0; j < m.known; ++j) {
            float along[MANY];
            dots(m.reference + j * m.width, m.towards, m.width, along);
            const double leverage = m.known_leverage[j];
            for (int i = 0; i < MANY; ++i) {
                m.reference_along[i * m.known + j] =
                    static_cast<float>((along[i] + m.mean_part[i] * leverage) / (1 - leverage));
            }
        }
        m.placed = 1;
    }
    std::vector<float> centred(m.width);
    for (int64_t c = 0; c < m.width; ++c) centred[c] = row[c] - m.centre[c];
    float own[MANY];
    dots(centred.data(), m.onto, m.width, own);
    const double scale = static_cast<double>(size) / static_cast<double>(m.known);
    for (int i = 0; i < MANY; ++i) {
        int64_t below, within;
        count(m.reference_along + i * m.known, m.known, own[i] - SAME, own[i] + SAME, below, within);
        less[i] = static_cast<int64_t>(static_cast<double>(below) * scale);
        upto[i] = static_cast<int64_t>(std::ceil(static_cast<double>(within) * scale));
    }
}

// Of every stream, how many of the reference alone lie below a row, and how many not above it (Drift._places).
static void places(Detector& d, const float* row, const float* mean_row, int64_t* less, int64_t* upto) {
    const int64_t k = d.scores, n = d.known, columns = k + d.silent;
    for (int64_t i = 0; i < k; ++i) {
        const float *known = d.reference + i * n, *end = known + n, *place = std::lower_bound(known, end, row[i]);
        less[i] = place - known;
        upto[i] = std::upper_bound(place, end, row[i]) - known;
    }
    less += k;
    upto += k;
    if (d.directions) {
        const int64_t rows = d.rows_known;
        if (!d.placed) project(d.rows, rows, columns, rows, d.towards, d.reference_along);
        d.placed = 1;
        for (int i = 0; i < DIRECTIONS; ++i) {
            const float own = dot(d.towards + i * columns, row, columns);
            count(d.reference_along + i * rows, rows, own - SAME, own + SAME, less[i], upto[i]);
        }
        less += DIRECTIONS;
        upto += DIRECTIONS;
    }
    if (d.means && mean_row) return places_of_mean(*d.means, mean_row, n, less, upto);
    std::fill(less, less + MANY, 0);
    std::fill(upto, upto + MANY, n);
}

// ln of the sum of exp over what a bet takes for as likely, of `inside` and `outside` requests.
static double log_sum(const double* in, const double* out, double inside, double outside) {
    double logs[CHANCES], most = -HUGE_VAL, total = 0;
    for (int c = 0; c < CHANCES; ++c) {
        logs[c] = inside * in[c] + outside * out[c];
        most = std::max(most, logs[c]);
    }
    for (int c = 0; c < CHANCES; ++c) {
        if (logs[c] > most - 40) total += std::exp(logs[c] - most);  // less is a rounding
    }
    return most + std::log(total);
}

// What all bets have won (EffectSize._logs), by what they weigh.
static double won(const Effect& effect) {
    double total = 0;
    for (int64_t at = 0; at < effect.streams * ENDS; ++at) {
        const double* weights = effect.weights + at * SHARES;
        if (std::all_of(weights, weights + SHARES, [](double weight) { return weight == 0; })) continue;
        const int64_t end = at % ENDS;
        const double inside = effect.counts[at], outside = *effect.total - inside;
        const double null = log_sum(effect.usual + end * CHANCES, effect.usual_not + end * CHANCES, inside, outside);
        for (int s = 0; s < SHARES; ++s) {
            const int64_t first = (end * SHARES + s) * CHANCES;
            const double more = log_sum(effect.larger + first, effect.larger_not + first, inside, outside);
            total += weights[s] * std::exp(std::min(more - null, effect.most));
        }
    }
    return total;
}

// One request more (EffectSize.observe).
static void size_effect(Effect& effect, const int64_t* less, const int64_t* upto) {
    for (int64_t i = 0; i < effect.streams; ++i) {
        double *counts = effect.counts + i * ENDS, *hits = effect.hits + i * ENDS;
        for (int end = 0; end < ENDS; ++end) {
            const int64_t in_end = effect.in_end[end % WIDTHS];
            const double inside = end < WIDTHS ? less[i] >= effect.size - in_end : upto[i] <= in_end;
            counts[end] += inside;
            hits[end] = hits[end] * effect.fade + inside;
        }
    }
    *effect.total += 1;
    *effect.seen = *effect.seen * effect.fade + 1;
    const int64_t total = static_cast<int64_t>(*effect.total);
    if (total > effect.first && total % effect.every) return;
    effect.beyond = effect.betting ? won(effect) >= effect.enough : 0;
}

}  // namespace drift

using namespace drift;

// Take rows, (count, columns), until there is evidence for the first time, to be sized or of a drift: how many were
// taken. evidence: (count) after each.
extern "C" int64_t loradock_drift_steps(
    Detector* detector, const float* rows, const float* mean_rows, int64_t mean_stride, int64_t count, double* evidence) {
    Detector& d = *detector;
    const int64_t k = d.scores, columns = k + d.silent;
    const int64_t bets = k * (HISTOGRAMS + FIXED) + (d.directions ? DIRECTIONS * FIXED : 0);
    Ranks ranks{std::vector<double>(k), std::vector<double>(k), std::vector<double>(k), std::vector<double>(k),
                std::vector<int64_t>(k)};
    std::vector<double> multiples(bets);
    std::vector<int64_t> less(d.effect->streams), upto(d.effect->streams);
    for (int64_t i = 0; i < count; ++i) {
        const float *row = rows + i * columns, *mean_row = d.means ? mean_rows + i * mean_stride : nullptr;
        if (d.sized) {  // before anything learns from it
            places(d, row, mean_row, less.data(), upto.data());
            size_effect(*d.effect, less.data(), upto.data());
        }
        ++d.updates;
        rank_scores(d, row, ranks);
        double ties[DIRECTIONS];
        int64_t place = d.size, along[DIRECTIONS];
        if (d.directions) {
            for (double& tie : ties) tie = d.lots->next_double(d.lots->state);
            if (d.size >= d.bag_capacity) place = draw(d.lots, static_cast<uint32_t>(d.bag_capacity));
        }
        bet_on_scores(d, ranks, multiples.data());
        if (d.directions) {
            rank_along(d, row, ties, place, along);
            double* bet = multiples.data() + k * (HISTOGRAMS + FIXED);
            for (int j = 0; j < DIRECTIONS; ++j) {
                std::memcpy(bet + j * FIXED, d.direction_bets + along[j] * FIXED, FIXED * sizeof(double));
            }
        }
        const double multiple = place_bets(d, multiples.data(), bets);
        if (d.directions) teach(d, row, ranks, multiple, place);
        if (d.means) {
            observe_mean(*d.means, mean_row, d.updates);
            d.means_evidence = mean_evidence(*d.means);
        }
        evidence[i] = d.means_off ? d.evidence : (d.evidence + d.means_evidence) / 2;
        if (d.drifted) continue;
        const bool sized = d.sized;
        d.sized = evidence[i] >= d.sized_from;
        if (evidence[i] >= d.threshold || (d.sized && !sized)) return i + 1;
    }
    return count;
}

// Drift._places of some rows: less, upto (count, streams). known: (count) whether a row has a mean row.
extern "C" void loradock_drift_places(
    Detector* detector, const float* rows, const float* mean_rows, int64_t mean_stride, const uint8_t* known,
    int64_t count, int64_t* less, int64_t* upto) {
    const int64_t columns = detector->scores + detector->silent, streams = detector->effect->streams;
    for (int64_t i = 0; i < count; ++i) {
        const float* mean_row = detector->means && known[i] ? mean_rows + i * mean_stride : nullptr;
        places(*detector, rows + i * columns, mean_row, less + i * streams, upto + i * streams);
    }
}

// Move the gauges of rank shifts by some rows of scores, one after another (Drift._gauge). reference: (scores, size).
extern "C" void loradock_drift_gauge(
    const float* reference, int64_t scores, int64_t size, const float* rows, int64_t stride, int64_t count, double fade,
    double* shift) {
    for (int64_t c = 0; c < scores; ++c) {
        const float *known = reference + c * size, *end = known + size;
        double moved = shift[c];
        for (int64_t i = 0; i < count; ++i) {
            const float score = rows[i * stride + c], *less = std::lower_bound(known, end, score);
            const float* upto = less != end && *less == score ? std::upper_bound(less, end, score) : less;
            moved *= fade;
            moved += static_cast<double>((less - known) + (upto - known)) / static_cast<double>(2 * size) - 0.5;
        }
        shift[c] = moved;
    }
}

// Add rows (count, columns), less their centre, to sums of those before, which fade with each (recent_rows.fade_in).
extern "C" void loradock_drift_fade_in(
    double* sums, const float* rows, int64_t stride, int64_t count, int64_t columns, const float* centre, double fade) {
    for (int64_t i = 0; i < count; ++i) {
        const float* row = rows + i * stride;
        for (int64_t c = 0; c < columns; ++c) sums[c] = sums[c] * fade + static_cast<double>(row[c] - centre[c]);
    }
}
