// Products of a block of a super-block with AVX2 and 8-bit activations: the 16-bit sums of linear_dots_avx2.h meet the
// part's scale, twice, where they would meet ones. See linear_super.h.
//
// Sums of pairs fit 16 bits for all 8 steps of 4-bit weights (8 * 2 * 15 * 127 = 30480) and for two steps of 6-bit ones
// (2 * 2 * 63 * 127 = 32004), whose offset of 32 is taken out by sum over the parts of -32 * scale * sum of a: pairs of
// 4 * scale (at most 512) and -8 * sum (at most 16256).
#pragma once

#include "linear_super_dots.h"

#define HR_KEEP(v) __asm__("" : "+x"(v))

namespace headrace::HR_ISA {

inline __m256i load_256(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }

inline F32x16 load_u8(const uint8_t* p) {
  const __m128i bytes = _mm_loadu_si128((const __m128i*)p);
  return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes)),
          _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8)))};
}

// Scales, each twice, as 16 bits: a byte goes to the upper half of two words, which are shifted down.
template <bool kIsSigned>
inline void expand_pairs(const uint8_t* from, int parts, SuperBlock& to) {
  const __m256i low = _mm256_setr_epi8(-1, 0, -1, 0, -1, 1, -1, 1, -1, 2, -1, 2, -1, 3, -1, 3, -1, 4, -1, 4, -1, 5, -1,
                                       5, -1, 6, -1, 6, -1, 7, -1, 7);
  const __m256i high = _mm256_or_si256(low, _mm256_set1_epi16(8 << 8));
  for (int part = 0; part < parts; part++) {
    const __m256i bytes = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)(from + kLanes * part)));
    const __m256i words[2] = {_mm256_shuffle_epi8(bytes, low), _mm256_shuffle_epi8(bytes, high)};
    for (int half = 0; half < 2; half++)
      _mm256_store_si256((__m256i*)(to.pairs[part] + kLanes * half),
                         kIsSigned ? _mm256_srai_epi16(words[half], 8) : _mm256_srli_epi16(words[half], 8));
  }
}

inline void expand_super_scales(WeightKind kind, int32_t bits, const uint8_t* from, SuperBlock& to) {
  if (bits == 16) {
    for (int part = 0; part < super_parts(kind); part++, from += kLanes)
      store(to.scales[part], kind == WeightKind::kSuper6 ? load_i8((const int8_t*)from) : load_u8(from));
    return;
  }
  if (kind != WeightKind::kSuper6) return expand_pairs<false>(from, 8, to);
  expand_pairs<true>(from, 16, to);
  for (int block = 0; block < 8; block++) {
    for (int half = 0; half < 2; half++) {
      const __m256i low = load_256(to.pairs[2 * block] + kLanes * half);
      const __m256i high = load_256(to.pairs[2 * block + 1] + kLanes * half);
      const __m256i both = _mm256_blend_epi16(low, high, 0xAA);
      _mm256_store_si256((__m256i*)(to.offsets[block] + kLanes * half), _mm256_slli_epi16(both, 2));
    }
  }
}

// Features 16 part .. 16 part + 15 of 8 rows as four vectors of bytes, 0 and up; `half` 0: rows 0..7.
template <WeightKind kKind>
inline void four_weights(const uint8_t* block, int part, int half, __m256i (&w)[4]) {
  const __m256i mask = _mm256_set1_epi8(kKind == WeightKind::kSuper6 ? 63 : 15);
  if (kKind == WeightKind::kSuper6) {
    const __m256i top = _mm256_set1_epi8((char)0xC0);
    __m256i three[3];
    for (int i = 0; i < 3; i++) {
      three[i] = load_256(block + 192 * part + 64 * i + 32 * half);
      w[i] = _mm256_and_si256(three[i], mask);
      three[i] = _mm256_and_si256(three[i], top);
    }
    // Shifts of 16-bit lanes move nothing from byte to byte, as the bits below these are clear.
    const __m256i first = _mm256_or_si256(_mm256_srli_epi16(three[0], 2), three[1]);
    w[3] = _mm256_srli_epi16(_mm256_or_si256(_mm256_srli_epi16(first, 2), three[2]), 2);
    return;
  }
  for (int i = 0; i < 4; i++) {
    const __m256i both = load_256(block + 64 * i + 32 * half);
    w[i] = _mm256_and_si256(part ? _mm256_srli_epi16(both, 4) : both, mask);
  }
  if (kKind == WeightKind::kSuper4) return;
  const __m256i bits = load_256(block + 256 + 32 * half), upper = _mm256_set1_epi8(0x10);
  for (int i = 0; i < 4; i++) {  // bit 4 part + i to bit 4
    const __m256i moved = part ? _mm256_srli_epi16(bits, i) : _mm256_slli_epi16(bits, 4 - i);
    w[i] = _mm256_or_si256(w[i], _mm256_and_si256(moved, upper));
  }
}

// A byte for each q; for 16-bit activations what Format::kWords means.
template <WeightKind kKind, int kBits>
inline void expand_blocks(const uint8_t* from, uint8_t* to) {
  const __m256i low = _mm256_set1_epi16(255), less = _mm256_set1_epi16(kKind == WeightKind::kSuper6 ? 32 : 0);
  for (int block = 0; block < 8; block++, from += super_block_bytes(kKind)) {
    for (int part = 0; part < 2; part++, to += 16 * kLanes * (kBits / 8)) {
      for (int half = 0; half < 2; half++) {
        __m256i w[4];
        four_weights<kKind>(from, part, half, w);
        for (int i = 0; i < 4; i++) {
          uint8_t* at = to + 64 * i * (kBits / 8) + 32 * half;
          if (kBits == 8) {
            _mm256_store_si256((__m256i*)at, w[i]);
          } else {
            _mm256_store_si256((__m256i*)at, _mm256_sub_epi16(_mm256_and_si256(w[i], low), less));
            _mm256_store_si256((__m256i*)(at + 64), _mm256_sub_epi16(_mm256_srli_epi16(w[i], 8), less));
          }
        }
      }
    }
  }
}

template <WeightKind kKind>
inline void expand_kind(int32_t bits, const uint8_t* from, uint8_t* to) {
  if (bits == 8) return expand_blocks<kKind, 8>(from, to);
  expand_blocks<kKind, 16>(from, to);
}

inline void expand_super_integers(WeightKind kind, int32_t bits, const uint8_t* from, uint8_t* to) {
  if (kind == WeightKind::kSuper4) return expand_kind<WeightKind::kSuper4>(bits, from, to);
  if (kind == WeightKind::kSuper5) return expand_kind<WeightKind::kSuper5>(bits, from, to);
  expand_kind<WeightKind::kSuper6>(bits, from, to);
}

// 4-bit weights: 16-bit sums over all features.
template <bool kPacked, int kRows>
inline void small_super_dots(const SuperBlock& super, const uint8_t* q, int block, const uint8_t* const* a,
                             F32x16 (&n)[kRows]) {
  constexpr Format kFormat = kPacked ? Format::kNibbles : Format::kSmallBytes;
  __m256i sums[kRows][2];
  for (int c = 0; c < kRows; c++) sums[c][0] = sums[c][1] = _mm256_setzero_si256();
#pragma GCC unroll 8
  for (int g = 0; g < 8; g++) {
    __m256i low = weights_at<kFormat>(q, g, 0), high = weights_at<kFormat>(q, g, 1);
    HR_KEEP(low);
    HR_KEEP(high);
#pragma GCC unroll 4
    for (int c = 0; c < kRows; c++) {
      const __m256i x = broadcast4(a[c / 4] + sizeof(ActivationHeader) + 16 * g + 4 * (c % 4));
      sums[c][0] = _mm256_add_epi16(sums[c][0], _mm256_maddubs_epi16(low, x));
      HR_KEEP(sums[c][0]);
      sums[c][1] = _mm256_add_epi16(sums[c][1], _mm256_maddubs_epi16(high, x));
      HR_KEEP(sums[c][1]);
    }
  }
  for (int c = 0; c < kRows; c++) {
    n[c] = {_mm256_cvtepi32_ps(_mm256_madd_epi16(sums[c][0], load_256(super.pairs[block]))),
            _mm256_cvtepi32_ps(_mm256_madd_epi16(sums[c][1], load_256(super.pairs[block] + kLanes)))};
  }
}

// -32 * scale * sum of a, over both parts of the block.
template <int kRows>
inline void start_at_offset(const SuperBlock& super, int block, const uint8_t* const* a, __m256i (&sums)[kRows][2]) {
  for (int c = 0; c < kRows; c++) {
    const ActivationHeader& header = *(const ActivationHeader*)a[c / 4];
    const int32_t high = header.neg8_sum_high[c % 4], low = header.neg8_sum[c % 4] - high;
    const __m256i neg8 = _mm256_set1_epi32((int32_t)((uint32_t)high << 16 | ((uint32_t)low & 0xFFFF)));
    sums[c][0] = _mm256_madd_epi16(neg8, load_256(super.offsets[block]));
    sums[c][1] = _mm256_madd_epi16(neg8, load_256(super.offsets[block] + kLanes));
  }
}

// Eight features, from those of a on, of 8 rows: 16-bit sums of pairs, times the scales.
inline void add_eight(__m256i& sum, __m256i w0, __m256i w1, __m256i first, __m256i second, const int16_t* scales) {
  const __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16(w0, first), _mm256_maddubs_epi16(w1, second));
  sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, load_256(scales)));
  HR_KEEP(sum);
}

// 5- and 6-bit weights.
template <WeightKind kKind, bool kPacked, int kRows>
inline void wide_super_dots(const SuperBlock& super, const uint8_t* q, int block, const uint8_t* const* a,
                            F32x16 (&n)[kRows]) {
  __m256i sums[kRows][2];
  if (kKind == WeightKind::kSuper6) {
    start_at_offset<kRows>(super, block, a, sums);
  } else {
    for (int c = 0; c < kRows; c++) sums[c][0] = sums[c][1] = _mm256_setzero_si256();
  }
#pragma GCC unroll 2
  for (int part = 0; part < 2; part++) {
    const int16_t* scales = super.pairs[kKind == WeightKind::kSuper6 ? 2 * block + part : block];
    __m256i packed[2][4];
    if (kPacked) {
      four_weights<kKind>(q, part, 0, packed[0]);
      four_weights<kKind>(q, part, 1, packed[1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 4; i += 2) {
      __m256i w[2][2];
      for (int half = 0; half < 2; half++) {
        for (int j = 0; j < 2; j++) {
          w[half][j] = kPacked ? packed[half][i + j] : load_256(q + 256 * part + 64 * (i + j) + 32 * half);
          HR_KEEP(w[half][j]);
        }
      }
#pragma GCC unroll 4
      for (int c = 0; c < kRows; c++) {
        const uint8_t* x = a[c / 4] + sizeof(ActivationHeader) + 64 * part + 16 * i + 4 * (c % 4);
        const __m256i first = broadcast4(x), second = broadcast4(x + 16);
        add_eight(sums[c][0], w[0][0], w[0][1], first, second, scales);
        add_eight(sums[c][1], w[1][0], w[1][1], first, second, scales + kLanes);
      }
    }
  }
  for (int c = 0; c < kRows; c++) n[c] = {_mm256_cvtepi32_ps(sums[c][0]), _mm256_cvtepi32_ps(sums[c][1])};
}

// How many rows a tile has at most that reads q as they are packed.
template <WeightKind kKind, int kBits>
constexpr int kMostPacked = kMaxColumns;

// 5- and 6-bit weights as they are packed, and 16-bit activations.
template <WeightKind kKind, int kFirst, int kLast, int kRows>
inline void packed_dots(const uint8_t* q, const uint8_t* const* a, F32x16 (&d)[kRows]) {
  __m256i sums[kRows][2];
  for (int c = 0; c < kRows; c++) {
    const ActivationHeader& header = *(const ActivationHeader*)a[c / 4];
    const int32_t offset = kKind == WeightKind::kSuper6 ? 32 : 0;
    sums[c][0] = sums[c][1] = _mm256_set1_epi32(correction<kFirst, kLast>(header, c % 4, offset));
  }
#pragma GCC unroll 2
  for (int part = kFirst / 4; part < kLast / 4; part++) {
    __m256i w[2][4];
    four_weights<kKind>(q, part, 0, w[0]);
    four_weights<kKind>(q, part, 1, w[1]);
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      HR_KEEP(w[0][i]);
      HR_KEEP(w[1][i]);
#pragma GCC unroll 4
      for (int c = 0; c < kRows; c++) {
        const uint8_t* x = a[c / 4] + sizeof(ActivationHeader) + 32 * (4 * part + i) + 8 * (c % 4);
        accumulate<Format::kSmallBytes, 16>(sums[c][0], w[0][i], x);
        accumulate<Format::kSmallBytes, 16>(sums[c][1], w[1][i], x);
      }
    }
  }
  for (int c = 0; c < kRows; c++) d[c] = {_mm256_cvtepi32_ps(sums[c][0]), _mm256_cvtepi32_ps(sums[c][1])};
}

template <WeightKind kKind, int kBits, bool kPacked, int kFirst, int kLast, int kRows>
inline void part_dots(const uint8_t* q, const uint8_t* const* a, F32x16 (&d)[kRows]) {
  static_assert(kBits == 16, "8-bit activations have tiles of their own");
  if constexpr (!kPacked) {
    word_dots<kFirst, kLast, kRows>(q, a, d);
  } else if constexpr (kKind == WeightKind::kSuper4) {
    block_dots<Format::kNibbles, kBits, true, kFirst, kLast, kRows>(q, a, d);
  } else {
    packed_dots<kKind, kFirst, kLast, kRows>(q, a, d);
  }
}

template <WeightKind kKind, int kBits, bool kPacked, int kPart, int kRows>
inline void super_dots(const SuperBlock& super, const uint8_t* q, int block, const uint8_t* const* a,
                       F32x16 (&n)[kRows]) {
  if constexpr (kBits == 16) {
    float_super_dots<kKind, kBits, kPacked, kPart, kRows>(super, q, block, a, n);
  } else if constexpr (kKind == WeightKind::kSuper4) {
    small_super_dots<kPacked, kRows>(super, q, block, a, n);
  } else {
    wide_super_dots<kKind, kPacked, kRows>(super, q, block, a, n);
  }
}

}  // namespace headrace::HR_ISA

#undef HR_KEEP
