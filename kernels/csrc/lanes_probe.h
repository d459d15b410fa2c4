// Every operation on lanes as a function over arrays, so that tests can hold each instruction set against plain C++
// (hr_lanes_test). Part of every isa_*.cpp.
#pragma once

#include "headrace_native.h"
#include "simd.h"
#include "vector_math.h"

namespace headrace::HR_ISA {

// One vector of 16. Operations with a mask take it from the first two bytes of c.
inline void probe_vector(int operation, const float* a, const float* b, const void* c, void* out) {
  float* to = (float*)out;
  const Mask16 mask = *(const uint16_t*)c;
  switch (operation) {
    case HR_LANES_LOAD_MASKED:
      return store(to, load(a, mask));
    case HR_LANES_STORE_MASKED:
      return store(to, load(a), mask);
    case HR_LANES_ADD:
      return store(to, add(load(a), load(b)));
    case HR_LANES_SUB:
      return store(to, sub(load(a), load(b)));
    case HR_LANES_MUL:
      return store(to, mul(load(a), load(b)));
    case HR_LANES_DIV:
      return store(to, div(load(a), load(b)));
    case HR_LANES_FMA:
      return store(to, fma(load(a), load(b), load((const float*)c)));
    case HR_LANES_FNMA:
      return store(to, fnma(load(a), load(b), load((const float*)c)));
    case HR_LANES_MAX:
      return store(to, max(load(a), load(b)));
    case HR_LANES_MIN:
      return store(to, min(load(a), load(b)));
    case HR_LANES_ABS:
      return store(to, abs(load(a)));
    case HR_LANES_COPYSIGN:
      return store(to, copysign(load(a), load(b)));
    case HR_LANES_SELECT:
      return store(to, select(mask, load(a), load(b)));
    case HR_LANES_ROUND_EVEN:
      return store(to, round_even(load(a)));
    case HR_LANES_EXP2_INT:
      return store(to, exp2_int(load(a)));
    case HR_LANES_LOAD_F16:
      return store(to, load_f16((const uint16_t*)a));
    case HR_LANES_STORE_F16:
      return store_f16((uint16_t*)out, load(a));
    case HR_LANES_LOAD_BF16:
      return store(to, load_bf16((const uint16_t*)a));
    case HR_LANES_STORE_BF16:
      return store_bf16((uint16_t*)out, load(a));
    case HR_LANES_LOAD_I8:
      return store(to, load_i8((const int8_t*)a));
    case HR_LANES_STORE_I8:
      return store_i8((int8_t*)out, load(a));
    case HR_LANES_LOAD_I32:
      return store(to, load_i32((const int32_t*)a));
    case HR_LANES_STORE_I32:
      return store_i32((int32_t*)out, load(a));
    case HR_LANES_SUM:
      return store(to, broadcast(sum(load(a))));
    case HR_LANES_MAX_LANE:
      return store(to, broadcast(max_lane(load(a))));
    case HR_LANES_EXP:
      return store(to, exp(load(a)));
    case HR_LANES_EXP_WEIGHT:
      return store(to, exp_weight(load(a)));
    case HR_LANES_TANH:
      return store(to, tanh(load(a)));
    case HR_LANES_SILU:
      return store(to, silu(load(a)));
    case HR_LANES_GELU_TANH:
      return store(to, gelu_tanh(load(a)));
  }
}

// Every vector is 64 bytes further on in each array, whatever the width of its elements.
inline void probe_lanes(int operation, const void* a, const void* b, const void* c, void* out, int64_t num_vectors) {
  for (int64_t i = 0; i < num_vectors; i++) {
    const int64_t at = i * (int64_t)sizeof(float) * 16;
    probe_vector(operation, (const float*)((const char*)a + at), (const float*)((const char*)b + at),
                 (const char*)c + at, (char*)out + at);
  }
}

}  // namespace headrace::HR_ISA
