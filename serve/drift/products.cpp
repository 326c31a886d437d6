#include "products.h"

#include <algorithm>

namespace drift {

// Lanes of a vector register.
#ifdef __AVX512F__
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif
constexpr int DIRECTIONS = 4, VECTORS = 4, BLOCK = VECTORS * LANES;
typedef float Vector __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

static inline Vector load(const float* at) { return *reinterpret_cast<const Vector*>(at); }

static inline void store(float* at, Vector value) { *reinterpret_cast<Vector*>(at) = value; }

static inline float total(Vector values) {
    float sum = 0;
    for (int lane = 0; lane < LANES; ++lane) sum += values[lane];
    return sum;
}

float dot(const float* a, const float* b, int64_t n) {
    Vector first = {}, second = {};
    int64_t i = 0;
    for (; i + 2 * LANES <= n; i += 2 * LANES) {
        first += load(a + i) * load(b + i);
        second += load(a + i + LANES) * load(b + i + LANES);
    }
    float sum = total(first + second);
    for (; i < n; ++i) sum += a[i] * b[i];
    return sum;
}

void dots(const float* row, const float* towards, int64_t width, float* sums) {
    const float *a = towards, *b = towards + width;
    Vector first[2] = {}, second[2] = {};
    int64_t i = 0;
    for (; i + 2 * LANES <= width; i += 2 * LANES) {
        for (int v = 0; v < 2; ++v) {
            const Vector part = load(row + i + v * LANES);
            first[v] += part * load(a + i + v * LANES);
            second[v] += part * load(b + i + v * LANES);
        }
    }
    sums[0] = total(first[0] + first[1]);
    sums[1] = total(second[0] + second[1]);
    for (; i < width; ++i) {
        sums[0] += row[i] * a[i];
        sums[1] += row[i] * b[i];
    }
}

void add_row(float* sums, const float* row, int64_t width, const float* taught) {
    float *first = sums, *second = sums + width;
    int64_t i = 0;
    for (; i + LANES <= width; i += LANES) {
        const Vector part = load(row + i);
        store(first + i, load(first + i) + part * taught[0]);
        store(second + i, load(second + i) + part * taught[1]);
    }
    for (; i < width; ++i) {
        first[i] += row[i] * taught[0];
        second[i] += row[i] * taught[1];
    }
}

void project(const float* bag, int64_t size, int64_t columns, int64_t stride, const float* towards, float* along) {
    int64_t j = 0;
    for (; j + BLOCK <= size; j += BLOCK) {
        Vector sums[DIRECTIONS][VECTORS] = {};
        for (int64_t c = 0; c < columns; ++c) {
            const float* column = bag + c * stride + j;
            Vector rows[VECTORS];
            for (int v = 0; v < VECTORS; ++v) rows[v] = load(column + v * LANES);
            for (int i = 0; i < DIRECTIONS; ++i) {
                const float by = towards[i * columns + c];
                for (int v = 0; v < VECTORS; ++v) sums[i][v] += rows[v] * by;
            }
        }
        for (int i = 0; i < DIRECTIONS; ++i) {
            for (int v = 0; v < VECTORS; ++v) store(along + i * stride + j + v * LANES, sums[i][v]);
        }
    }
    for (int i = 0; i < DIRECTIONS; ++i) {
        float* rest = along + i * stride;
        std::fill(rest + j, rest + size, 0.0f);
        for (int64_t c = 0; c < columns; ++c) {
            const float by = towards[i * columns + c], *column = bag + c * stride;
            for (int64_t at = j; at < size; ++at) rest[at] += column[at] * by;
        }
    }
}

void multiply(const float* rows, int64_t count, const float* matrix, int64_t width, float* out) {
    constexpr int ROWS = 4;
    int64_t c = 0;
    for (; c + BLOCK <= width; c += BLOCK) {
        int64_t i = 0;
        for (; i + ROWS <= count; i += ROWS) {
            Vector sums[ROWS][VECTORS] = {};
            for (int64_t k = 0; k < width; ++k) {
                Vector part[VECTORS];
                for (int v = 0; v < VECTORS; ++v) part[v] = load(matrix + k * width + c + v * LANES);
                for (int r = 0; r < ROWS; ++r) {
                    const float by = rows[(i + r) * width + k];
                    for (int v = 0; v < VECTORS; ++v) sums[r][v] += part[v] * by;
                }
            }
            for (int r = 0; r < ROWS; ++r) {
                for (int v = 0; v < VECTORS; ++v) store(out + (i + r) * width + c + v * LANES, sums[r][v]);
            }
        }
        for (; i < count; ++i) {
            float* into = out + i * width + c;
            std::fill(into, into + BLOCK, 0.0f);
            for (int64_t k = 0; k < width; ++k) {
                const float by = rows[i * width + k];
                for (int b = 0; b < BLOCK; ++b) into[b] += by * matrix[k * width + c + b];
            }
        }
    }
    for (int64_t i = 0; i < count && c < width; ++i) {
        std::fill(out + i * width + c, out + (i + 1) * width, 0.0f);
        for (int64_t k = 0; k < width; ++k) {
            const float by = rows[i * width + k];
            for (int64_t rest = c; rest < width; ++rest) out[i * width + rest] += by * matrix[k * width + rest];
        }
    }
}

}  // namespace drift
