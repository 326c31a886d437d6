// Sums over many numbers: as quick as the processor multiplies and adds, in whichever order that is.
#pragma once
#include <cstdint>

namespace drift {

float dot(const float* a, const float* b, int64_t n);

// sums (2): of a row (width) with two others, (2, width).
void dots(const float* row, const float* towards, int64_t width, float* sums);

// sums (2, width) += taught (2) times a row (width).
void add_row(float* sums, const float* row, int64_t width, const float* taught);

// along (4, size) = towards (4, columns) @ bag (columns, size); the rows of bag and along are `stride` apart.
void project(const float* bag, int64_t size, int64_t columns, int64_t stride, const float* towards, float* along);

// out (count, width) = rows (count, width) @ matrix (width, width).
void multiply(const float* rows, int64_t count, const float* matrix, int64_t width, float* out);

}  // namespace drift
