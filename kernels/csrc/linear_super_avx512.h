// Super-blocks with AVX-512: a vector holds 4 features of all 16 rows. See linear_super.h.
#pragma once

#include "linear_super_dots.h"

namespace headrace::HR_ISA {

inline F32x16 load_u8(const uint8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)))};
}

inline void expand_super_scales(WeightKind kind, int32_t, const uint8_t* from, SuperBlock& to) {
  for (int part = 0; part < super_parts(kind); part++, from += kLanes)
    store(to.scales[part], kind == WeightKind::kSuper6 ? load_i8((const int8_t*)from) : load_u8(from));
}

// Features 16 part .. 16 part + 15 of the 16 rows as four vectors of bytes, 0 and up.
template <WeightKind kKind>
inline void four_weights(const uint8_t* block, int part, __m512i (&w)[4]) {
  if (kKind == WeightKind::kSuper6) {
    const __m512i mask = _mm512_set1_epi8(63), top = _mm512_set1_epi8((char)0xC0);
    __m512i three[3];
    for (int i = 0; i < 3; i++) {
      three[i] = _mm512_loadu_si512(block + 192 * part + 64 * i);
      w[i] = _mm512_and_si512(three[i], mask);
    }
    // Shifts of 16-bit lanes move nothing from byte to byte that is kept.
    const __m512i first = _mm512_ternarylogic_epi32(_mm512_srli_epi16(three[0], 2), three[1], top, 0xD8);
    w[3] = _mm512_ternarylogic_epi32(_mm512_srli_epi16(first, 2), three[2], top, 0xD8);
    w[3] = _mm512_and_si512(_mm512_srli_epi16(w[3], 2), mask);
    return;
  }
  const __m512i mask = _mm512_set1_epi8(15), upper = _mm512_set1_epi8(0x10);
  const __m512i bits = _mm512_loadu_si512(block + 256);
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {  // bit 4 part + i to bit 4
    const __m512i both = _mm512_loadu_si512(block + 64 * i);
    w[i] = _mm512_and_si512(part ? _mm512_srli_epi16(both, 4) : both, mask);
    const __m512i moved = part ? _mm512_srli_epi16(bits, (unsigned)i) : _mm512_slli_epi16(bits, (unsigned)(4 - i));
    w[i] = _mm512_or_si512(w[i], _mm512_and_si512(moved, upper));
  }
}

template <WeightKind kKind>
inline void expand_blocks(const uint8_t* from, uint8_t* to) {
  const __m512i bias = _mm512_set1_epi8((char)(kKind == WeightKind::kSuper6 ? 96 : 128));
  for (int block = 0; block < 8; block++, from += super_block_bytes(kKind)) {
    for (int part = 0; part < 2; part++, to += 256) {
      __m512i w[4];
      four_weights<kKind>(from, part, w);
      for (int i = 0; i < 4; i++) _mm512_store_si512(to + 64 * i, _mm512_add_epi8(w[i], bias));
    }
  }
}

// q + 128 as bytes, which is what Format::kBytes means. Never called for kSuper4, whose nibbles are read as they are.
inline void expand_super_integers(WeightKind kind, int32_t, const uint8_t* from, uint8_t* to) {
  if (kind == WeightKind::kSuper5) return expand_blocks<WeightKind::kSuper5>(from, to);
  expand_blocks<WeightKind::kSuper6>(from, to);
}

// How many rows a tile has at most that reads q as they are packed: nibbles always.
#if defined(HR_HAS_VNNI)
template <WeightKind kKind, int kBits>
constexpr int kMostPacked = kMaxColumns;
#else
template <WeightKind kKind, int kBits>
constexpr int kMostPacked = kKind == WeightKind::kSuper4 ? kMaxColumns : 0;
#endif

// 5- and 6-bit weights as they are packed, by VNNI's instructions.
template <WeightKind kKind, int kBits, int kFirst, int kLast, int kRows>
inline void packed_dots(const uint8_t* q, const uint8_t* const* a, F32x16 (&d)[kRows]) {
  __m512i sums[kRows];
  for (int c = 0; c < kRows; c++) {
    const ActivationHeader& header = *(const ActivationHeader*)a[c / 4];
    const int32_t offset = kKind == WeightKind::kSuper6 ? 32 : 0;
    sums[c] = _mm512_set1_epi32(correction<kFirst, kLast>(header, c % 4, offset));
  }
#pragma GCC unroll 2
  for (int part = kFirst / 4; part < kLast / 4; part++) {
    __m512i w[4];
    four_weights<kKind>(q, part, w);
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
#pragma GCC unroll 8
      for (int c = 0; c < kRows; c++) {
        const int at = (8 * part + 2 * i) * kBits + (c % 4) * (kBits / 2);
        accumulate<Format::kSmallBytes, kBits>(sums[c], w[i], a[c / 4] + sizeof(ActivationHeader) + at);
      }
    }
  }
  for (int c = 0; c < kRows; c++) d[c] = {_mm512_cvtepi32_ps(sums[c])};
}

template <WeightKind kKind, int kBits, bool kPacked, int kFirst, int kLast, int kRows>
inline void part_dots(const uint8_t* q, const uint8_t* const* a, F32x16 (&d)[kRows]) {
  if constexpr (kPacked && kKind != WeightKind::kSuper4) {
    packed_dots<kKind, kBits, kFirst, kLast, kRows>(q, a, d);
  } else {
    block_dots<kPacked ? Format::kNibbles : Format::kBytes, kBits, true, kFirst, kLast, kRows>(q, a, d);
  }
}

template <WeightKind kKind, int kBits, bool kPacked, int kPart, int kRows>
inline void super_dots(const SuperBlock& super, const uint8_t* q, int block, const uint8_t* const* a,
                       F32x16 (&n)[kRows]) {
  float_super_dots<kKind, kBits, kPacked, kPart, kRows>(super, q, block, a, n);
}

}  // namespace headrace::HR_ISA
