// What a library of kernels computes, without Python: products of every format of weights, and the first of the largest. To
// stdout, one result a line: its name, then its numbers as they are in memory. The inputs are the same on every processor.
//
//     products kernels.so

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <string>
#include <vector>

namespace {

void* library;

template <class F>
F* function(const char* name) {
  return reinterpret_cast<F*>(dlsym(library, name));
}

// Of -127 to 127; as bfloat16, which holds them, the upper half of the float.
uint32_t state;
int lot() {
  state = state * 1664525 + 1013904223;
  return int(state >> 16) % 255 - 127;
}
uint16_t bf16(float v) {
  uint32_t u;
  std::memcpy(&u, &v, 4);
  return uint16_t(u >> 16);
}
std::vector<uint16_t> lots(size_t n, float by) {
  std::vector<uint16_t> v(n);
  for (auto& it : v) it = bf16(float(lot()) * by);
  return v;
}

void print(const std::string& name, const std::vector<float>& v) {
  std::printf("%s\t", name.c_str());
  for (float it : v) {
    uint32_t u;
    std::memcpy(&u, &it, 4);
    std::printf("%08x", u);
  }
  std::printf("\n");
}

constexpr int N = 80, K = 640, MOST = 17;  // five tiles of four: blocks of 4 bits are unpacked

void multiply(const std::string& name, int matrix) {
  const auto logits = function<void(int, const uint16_t*, int64_t, int, float*, int64_t, int, float, float)>("loradock_logits");
  state = 1;
  const auto x = lots(MOST * K, 1 / 64.f);
  std::vector<float> each(MOST * N), together(MOST * N);
  for (int i = 0; i < MOST; i++) logits(matrix, x.data() + i * K, K, 1, each.data() + i * N, N, N, 0, 1);
  for (int rows = 2; rows <= MOST; rows++) {
    logits(matrix, x.data(), K, rows, together.data(), N, N, 0, 1);
    if (std::memcmp(each.data(), together.data(), sizeof(float) * rows * N)) {
      std::fprintf(stderr, "%s: %d rows are not what each of them is by itself\n", name.c_str(), rows);
      std::exit(1);
    }
  }
  print(name, each);
}

}  // namespace

int main(int, char** words) {
  library = dlopen(words[1], RTLD_LAZY);
  if (!library) return std::fprintf(stderr, "%s\n", dlerror()), 1;
  const char* instructions = function<const char*()>("loradock_instructions")();
  std::printf("%s\n", instructions);
  if (!*instructions) return 0;
  const auto packed = function<int(const void*, int, int, int, int, const float*, const uint16_t*, int)>("loradock_matrix");
  state = 2;
  const auto floats = lots(N * K, 1 / 512.f), bias = lots(N, 1 / 8.f);
  multiply("bf16", packed(floats.data(), N, K, 0, 16, nullptr, bias.data(), 0));
  std::vector<int8_t> bytes(N * K);
  for (auto& it : bytes) it = int8_t(lot());
  std::vector<float> scale(N, 1 / 64.f);
  multiply("int8", packed(bytes.data(), N, K, 1, K, scale.data(), bias.data(), 0));
  multiply("int8 g64", packed(floats.data(), N, K, 2, 64, nullptr, nullptr, 0));
  multiply("int4 g32", packed(floats.data(), N, K, 3, 32, nullptr, nullptr, 0));

  const auto integers = function<int(const uint32_t*, const int64_t*, int, const uint16_t*, const uint8_t*, const int64_t*, int,
                                     int, int, const uint16_t*, int)>("loradock_matrix_integers");
  for (int bits : {4, 8})
    for (int group : {16, 32, 128})
      for (int zeros = 0; zeros < (bits == 4 ? 2 : 1); zeros++) {
        std::vector<uint32_t> numbers(N * K * bits / 32);
        for (auto& it : numbers) it = uint32_t(lot()) << 24 ^ uint32_t(lot()) << 12 ^ uint32_t(lot());
        for (int i = 0; i < K * bits / 32; i++) numbers[i] = 0, numbers[K * bits / 32 + i] = ~0u;  // the least, and the largest
        const auto of_group = lots(N * K / group, 1 / 64.f);
        std::vector<uint8_t> zero(N * K / group);
        for (auto& it : zero) it = uint8_t(lot() & 15);
        const int64_t strides[] = {K * bits / 32, 1}, scale_strides[] = {K / group, 1};
        multiply(std::to_string(bits) + " bits, groups of " + std::to_string(group) + (zeros ? ", zero points" : ""),
                 integers(numbers.data(), strides, bits, of_group.data(), zeros ? zero.data() : nullptr, scale_strides, N, K,
                          group, nullptr, 0));
      }

  const auto argmax = function<int64_t(const float*, int64_t)>("loradock_argmax");
  std::vector<float> row(1000), found;
  for (auto& it : row) it = float(lot());
  for (int n : {1, 15, 16, 17, 100, 1000}) found.push_back(float(argmax(row.data(), n)));
  print("argmax", found);
}
