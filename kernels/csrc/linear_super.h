// The matrix product over weights in super-blocks (layout.h, kSuper4 ..): one panel of 16 outputs times some rows of
// activations. Called by linear.h. Integers meet integers as long as they can: a part's dot of q and a is multiplied by
// the part's own integer scale, and only what comes out becomes a float. For an output f, from f = 0, for each
// super-block in the order of k:
//
//   g = 0; for each of its 8 blocks of 32 features:
//     8-bit activations:  n = float(sum over the block of scale * q * a), exact: |n| <= 32 * 32 * 128 * 127 < 2^24
//                         g = fma(n, activation_scale, g)
//     16-bit activations: the same for each part of the block, in order: all 32 features for kSuper4, 16 and 16 for the
//                         others; the sum is below 2^31 and n is rounded once
//   f = fma(g, d, f)
//   h = 0; for each block: h = fma(float(min), activation_scale_sum, h); then f = fma(-h, dmin, f)    where it has mins
//
// q is signed for kSuper6 (q - 32). It depends on nothing else, as in linear_tile.h. Why the activations keep a scale
// per 32 features (GGML's Q8_K has one per 256): it costs one of 20 instructions, and docs/LOG.md has what it saves.
//
// A dot d of a part is below 2^24 even with 16 bits (16 * 32 * 32512, 32 * 15 * 32512), so that float(d) *
// float(scale), rounded, is that n: how the instruction sets that multiply in floats get the same bits.
#pragma once

#include <utility>

#include "linear_tile.h"

namespace headrace::HR_ISA {

// Bytes that an expanded q may take: 2 where 16-bit activations meet 16-bit weights.
constexpr int kExpandedBytes = kUnpacksWords ? 2 : 1;

// A super-block of a panel with scales as the tiles want them and, unless they read q as they are packed, a number for
// every q. It stays in the first-level cache.
struct SuperBlock {
  alignas(64)
      uint8_t q[kSuper * kLanes * kExpandedBytes];  // [block][g][16 rows][4]; what q is kept as is the tile's affair
  alignas(64) float scales[16][kLanes];             // by part
  alignas(64) int16_t pairs[16][2 * kLanes];        // for integer tiles: each scale twice, by part
  alignas(64) int16_t offsets[8][2 * kLanes];       // for them: 4 * scale of a block's two parts
  alignas(64) float mins[8][kLanes];
  alignas(64) float d[kLanes];
  alignas(64) float dmin[kLanes];
};

// A super-block times up to kMaxColumns rows of activations.
struct SuperTileArgs {
  const SuperBlock* super;
  const uint8_t* q;      // integers of the first block, packed or those of `super`
  const uint8_t* a;      // activation block of the first four rows
  int64_t a_stride;      // bytes from four rows to the next four
  float zero;            // 0, which the compiler must not know: GCC 12 would clear arrays of sums in memory
  float* sums;           // [rows][16], added to
  const uint8_t* ahead;  // what to prefetch, as long as the super-block; or null
};

}  // namespace headrace::HR_ISA

#if defined(HR_ISA_AVX512)
#include "linear_super_avx512.h"
#elif defined(HR_ISA_AVX2)
#include "linear_super_avx2.h"
#else
#include "linear_super_generic.h"
#endif

namespace headrace::HR_ISA {

// g += the products of one block, or of one of its two parts. No loop over these: GCC 12 at -O3 miscompiles it on Arm.
template <WeightKind kKind, int kBits, bool kPacked, int kPart, int kRows>
inline void add_part(const SuperTileArgs& t, int block, const uint8_t* const* a, F32x16 (&g)[kRows]) {
  constexpr int kStride = kPacked ? super_block_bytes(kKind) : kBits == 16 ? 512 * kExpandedBytes : 512;
  F32x16 n[kRows];
  super_dots<kKind, kBits, kPacked, kPart, kRows>(*t.super, t.q + kStride * block, block, a, n);
  for (int c = 0; c < kRows; c++) g[c] = fma(n[c], broadcast(((const ActivationHeader*)a[c / 4])->scale[c % 4]), g[c]);
}

template <WeightKind kKind, int kBits, bool kPacked, int kRows>
inline void add_block(const SuperTileArgs& t, int block, const uint8_t* const* a, F32x16 (&g)[kRows]) {
  add_part<kKind, kBits, kPacked, 0, kRows>(t, block, a, g);
  if constexpr (kBits == 16 && kKind != WeightKind::kSuper4) add_part<kKind, kBits, kPacked, 1, kRows>(t, block, a, g);
}

// f -= dmin * the products of the mins.
template <int kBits, int kRows>
inline void subtract_mins(const SuperTileArgs& t, F32x16 (&f)[kRows]) {
  F32x16 h[kRows];
  for (int c = 0; c < kRows; c++) h[c] = broadcast(t.zero);
  for (int block = 0; block < kSuper / kGroup; block++) {
    const F32x16 min = load(t.super->mins[block]);
    for (int c = 0; c < kRows; c++) {
      const uint8_t* a = t.a + c / 4 * t.a_stride + block * (int64_t)activation_block_bytes(kBits);
      h[c] = fma(min, broadcast(((const ActivationHeader*)a)->scale_sum[c % 4]), h[c]);
    }
  }
  for (int c = 0; c < kRows; c++) f[c] = fnma(h[c], load(t.super->dmin), f[c]);
}

template <WeightKind kKind, int kBits, bool kPacked, int kRows>
void multiply_super_tile(const SuperTileArgs& t) {
  constexpr int kFours = (kRows + 3) / 4, kAheadBytes = super_bytes(kKind) / 8;
  const uint8_t* a[kFours];
  for (int i = 0; i < kFours; i++) a[i] = t.a + i * t.a_stride;
  const uint8_t* ahead = t.ahead;
  F32x16 g[kRows];
  for (int c = 0; c < kRows; c++) g[c] = broadcast(t.zero);
  for (int block = 0; block < kSuper / kGroup; block++) {
    if (ahead) {
      for (int at = 0; at < kAheadBytes; at += 64) __builtin_prefetch(ahead + at, 0, 3);
      ahead += kAheadBytes;
    }
    add_block<kKind, kBits, kPacked, kRows>(t, block, a, g);
    for (int i = 0; i < kFours; i++) a[i] += activation_block_bytes(kBits);
  }
  F32x16 f[kRows];
  for (int c = 0; c < kRows; c++) f[c] = fma(g[c], load(t.super->d), load(t.sums + kLanes * c));
  if (kKind != WeightKind::kSuper6) subtract_mins<kBits, kRows>(t, f);
  for (int c = 0; c < kRows; c++) store(t.sums + kLanes * c, f[c]);
}

using SuperTile = void (*)(const SuperTileArgs&);

// multiply_super_tile for each number of rows, [rows - 1].
template <WeightKind kKind, int kBits, bool kPacked, int... kIndex>
const SuperTile* super_tiles_of(std::integer_sequence<int, kIndex...>) {
  static constexpr SuperTile kTiles[] = {multiply_super_tile<kKind, kBits, kPacked, kIndex + 1>...};
  return kTiles;
}

// The tiles for a panel and so many rows, and whether they read q as they are packed.
struct SuperTiles {
  const SuperTile* of_rows;
  bool is_packed;
};

template <WeightKind kKind, int kBits>
SuperTiles super_tiles(int num_rows) {
  constexpr int kMost = kMostPacked<kKind, kBits>;
  constexpr bool kNeverExpands = kKind == WeightKind::kSuper4 && !kUnpacksNibbles;
  if constexpr (kMost > 0) {
    if (kNeverExpands || num_rows <= kMost)
      return {super_tiles_of<kKind, kBits, true>(std::make_integer_sequence<int, kMost>()), true};
  }
  return {super_tiles_of<kKind, kBits, kNeverExpands>(std::make_integer_sequence<int, kMaxColumns>()), kNeverExpands};
}

template <int kBits>
SuperTiles choose_super_tiles(WeightKind kind, int num_rows) {
  if (kind == WeightKind::kSuper6) return super_tiles<WeightKind::kSuper6, kBits>(num_rows);
  if (kind == WeightKind::kSuper5) return super_tiles<WeightKind::kSuper5, kBits>(num_rows);
  return super_tiles<WeightKind::kSuper4, kBits>(num_rows);
}

// What every instruction set needs of a super-block's head.
inline void expand_super_head(WeightKind kind, const uint8_t* from, SuperBlock& to) {
  store(to.d, load_f16((const uint16_t*)from));
  if (kind == WeightKind::kSuper6) return;
  store(to.dmin, load_f16((const uint16_t*)(from + 32)));
  for (int block = 0; block < 8; block++) store(to.mins[block], load_u8(from + kSuperMins + kLanes * block));
}

// sums[t][16] = panel x rows [first, first + num_rows) of the activations; `first` is a multiple of 4.
inline void multiply_super_panel(const PackedMatrix& m, int64_t panel, const Activations& x, int first, int num_rows,
                                 float* sums) {
  const SuperTiles tiles =
      x.bits == 8 ? choose_super_tiles<8>(m.kind, num_rows) : choose_super_tiles<16>(m.kind, num_rows);
  const uint8_t* from = m.data + panel * m.panel_bytes;
  const int64_t ahead = num_rows == 1 ? kAheadOfOneRow : m.panel_bytes;
  SuperBlock super;
  SuperTileArgs t;
  t.super = &super;
  t.a_stride = (int64_t)activation_bytes(kColumns, x.width, x.bits);
  t.zero = 0.0f;
  const uint8_t* a = activation_block(x, first, 0);
  for (int row = 0; row < num_rows; row++) store(sums + kLanes * row, broadcast(0.0f));
  for (int s = 0; s < m.cols / kSuper; s++) {
    expand_super_head(m.kind, from, super);
    expand_super_scales(m.kind, x.bits, from + kSuperScales, super);
    t.q = from + kSuperBlocks;
    if (!tiles.is_packed) {
      expand_super_integers(m.kind, x.bits, t.q, super.q);
      t.q = super.q;
    }
    t.ahead = from + ahead;
    t.a = a;
    t.sums = sums;
    for (int row = 0; row < num_rows;) {
      const int rows = next_tile(num_rows - row);
      tiles.of_rows[rows - 1](t);
      row += rows;
      t.a += rows / 4 * t.a_stride;
      t.sums += kLanes * rows;
      t.ahead = nullptr;  // the first tile has fetched it
    }
    from += super_bytes(m.kind);
    a += kSuper / kGroup * (int64_t)activation_block_bytes(x.bits);
  }
}

}  // namespace headrace::HR_ISA
