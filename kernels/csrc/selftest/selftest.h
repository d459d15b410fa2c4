// What the parts of the self-test share: random inputs, aligned memory, and the comparison of all kernel tables.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "kernel_table.h"

namespace headrace::selftest {

// Zeroed, 64-byte aligned memory, with a cache line of slack for kernels that read whole vectors.
template <typename T>
class Buffer {
 public:
  explicit Buffer(size_t size) : size_(size) {
    const size_t bytes = (size * sizeof(T) + 2 * kAlign - 1) / kAlign * kAlign;
    data_ = (T*)std::aligned_alloc(kAlign, bytes);
    if (!data_) std::abort();
    std::memset((void*)data_, 0, bytes);
  }
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  T* data() { return data_; }
  T& operator[](size_t i) { return data_[i]; }
  size_t size() const { return size_; }
  size_t bytes() const { return size_ * sizeof(T); }

 private:
  T* data_;
  size_t size_;
};

// xorshift64* (Vigna 2016): the same numbers on every machine.
class Random {
 public:
  uint64_t next() {
    state_ ^= state_ >> 12;
    state_ ^= state_ << 25;
    state_ ^= state_ >> 27;
    return state_ * 2685821657736338717ull;
  }
  int below(int n) { return (int)((next() >> 33) % (uint64_t)n); }

  // Mostly of ordinary size, now and then zero, denormal, tiny or large; never infinite.
  float number() {
    const float x = ((float)(next() >> 40) / 8388608.0f - 1.0f) * 4.0f;
    switch (below(64)) {
      case 0:
        return 0.0f;
      case 1:
        return x * 1e-40f;
      case 2:
        return x * 1e-12f;
      case 3:
        return x * 300.0f;
      default:
        return x;
    }
  }

  // A finite float16 or bfloat16 between about 2^-7 and 4, as bits.
  uint16_t half(bool is_bf16) {
    const uint64_t bits = next();
    const uint16_t sign = (uint16_t)(bits >> 63 << 15);
    if (is_bf16) return (uint16_t)(sign | (120 + (bits >> 40) % 9) << 7 | (bits >> 20 & 0x7F));
    return (uint16_t)(sign | (8 + (bits >> 40) % 9) << 10 | (bits >> 20 & 0x3FF));
  }

  void fill(float* x, size_t n) {
    for (size_t i = 0; i < n; i++) x[i] = number();
  }

 private:
  uint64_t state_ = 88172645463325252ull;
};

// The tables that this CPU runs, the generic one first.
const std::vector<const KernelTable*>& tables();

extern int num_compared, num_different;

// Runs `run(table, out)` for every table, each on its own copy of `out`, and compares the bytes with those of the
// generic one; these are in `out` afterwards.
template <typename T, typename Run>
void compare(const char* what, Buffer<T>& out, Run run) {
  Buffer<T> start(out.size());
  std::memcpy((void*)start.data(), (const void*)out.data(), out.bytes());
  run(*tables()[0], out.data());
  for (size_t i = 1; i < tables().size(); i++) {
    Buffer<T> other(out.size());
    std::memcpy((void*)other.data(), (const void*)start.data(), out.bytes());
    run(*tables()[i], other.data());
    num_compared++;
    const uint8_t *a = (const uint8_t*)out.data(), *b = (const uint8_t*)other.data();
    size_t at = 0;
    while (at < out.bytes() && a[at] == b[at]) at++;
    if (at == out.bytes()) continue;
    num_different++;
    std::printf("%s: %s and generic differ from byte %zu on, of %zu\n", what, tables()[i]->name, at, out.bytes());
  }
}

void test_linear(Random& random);
void test_rows(Random& random);
void test_attention(Random& random);
void test_sample(Random& random);

}  // namespace headrace::selftest
