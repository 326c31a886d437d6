// What serve/drift/native.py hands to detector.cpp: arrays that Python owns, and the counts that go with them.
#pragma once
#include <cstdint>

namespace drift {

constexpr int HISTOGRAMS = 3;  // bets.BETS
constexpr int FIXED = 8;       // bets.FIXED
constexpr int CELLS = 1024;    // bets.CELLS
constexpr int DIRECTIONS = 4;  // directions.HALF_LIVES
constexpr int MANY = 2;        // mean_rows.HALF_LIVES
constexpr int MANY_BETS = 5;   // mean_rows' bets along each
constexpr int WIDTHS = 3;      // effect_size.WIDTHS
constexpr int ENDS = 6;        // effect_size.ENDS
constexpr int SHARES = 4;      // effect_size.SHARES
constexpr int CHANCES = 31;    // effect_size.CHANCES

// numpy's bitgen_t (numpy/random/bitgen.h).
struct BitGenerator {
    void* state;
    uint64_t (*next_uint64)(void*);
    uint32_t (*next_uint32)(void*);
    double (*next_double)(void*);
    uint64_t (*next_raw)(void*);
};

struct MeanRows {
    int64_t width, size, capacity, known, waiting, turn, ranked;
    double farthest;
    const float *centre, *whiten, *reference;  // (width), (width, width), (known, width)
    float* bag;                                // (capacity + 1, width)
    float* along;                              // (MANY, capacity + 1)
    double *pull, *leverage;                   // (capacity + 1)
    const double* known_leverage;              // (known)
    float* teaching;                           // (capacity + 1)
    double* times;                             // (capacity + 1)
    float *towards, *onto;                     // (MANY, width)
    double* mean_part;                         // (MANY)
    float* waiting_rows;                       // (turn, width)
    int64_t* waiting_places;                   // (turn)
    double *r, *page;                          // (MANY, MANY_BETS)
    int64_t* start;
    const double* bets;  // (CELLS, MANY_BETS)
    int64_t ages;
    const double* faded;  // (MANY, ages): what a row weighs that is as old
    BitGenerator* lots;
    float* reference_along;  // (MANY, known), while that is `placed`
    int64_t placed;
};

// serve/drift/detector/effect_size.py.
struct Effect {
    int64_t streams, size;
    const int64_t* in_end;                         // (WIDTHS)
    const double *usual, *usual_not;               // (ENDS, CHANCES): ln of a chance, and of its opposite
    const double *larger, *larger_not;             // (ENDS, SHARES, CHANCES)
    const double* weights;                         // (streams, ENDS, SHARES)
    double *counts, *hits, *total, *seen;          // (streams, ENDS) twice, (1) twice
    double fade, most, enough;
    int64_t first, every, betting, beyond;
};

struct Detector {
    int64_t scores, silent, updates;
    BitGenerator* lots;
    // The bags of the scores: each sorted, (scores, capacity + 1).
    float* bags;
    int64_t bags_size, capacity;
    const float* margin;  // (scores + silent); none where there are no margins
    // The bank.
    const double* share;
    double *r, *page;
    int64_t* start;
    double *learned, *unit, *weight;  // the histograms
    const double* fades;              // (HISTOGRAMS)
    const int64_t* bins;              // (HISTOGRAMS)
    const double *score_bets, *direction_bets;  // (CELLS, FIXED)
    double evidence;
    // The directions; none with a single score.
    int64_t directions, size, bag_capacity, age, turn;
    float *bag, *along;  // (scores + silent, bag_capacity + 1), (DIRECTIONS, bag_capacity + 1)
    double *pull, *faded, *taught, *squares;
    float *towards, *allowed, *silent_part;
    const double *direction_fades, *normal;  // (DIRECTIONS), (CELLS)
    // What the directions of mean rows have won; a constant where they are not ranked. off: they do not count.
    MeanRows* means;
    double means_evidence;
    int64_t means_off;
    // The reference alone: its scores, sorted (scores, known). Its rows by columns (scores + silent, rows_known), and
    // where they lie along the directions (DIRECTIONS, rows_known), while that is `placed`.
    const float* reference;
    int64_t known;
    const float* rows;
    float* reference_along;
    int64_t rows_known, placed;
    // While it is sized, each request is shown to the effect. It is from an evidence of `sized_from` on, until `drifted`.
    Effect* effect;
    int64_t sized, drifted;
    double sized_from, threshold;
};

}  // namespace drift
