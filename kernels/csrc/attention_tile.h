// The two products of attention on one chunk of keys, for a few rows at a time: scores q K and weighted values p V.
// Used by attention.h.
//
// One lane is one key (scores) or one feature (values), and sums run over features, or keys, in order: how many rows or
// tiles of keys a call covers changes nothing in any of its results.
#pragma once

#include "attention_plan.h"
#include "simd.h"

namespace headrace::HR_ISA {

constexpr int kKeyTiles = kAttentionChunk / kLanes;

template <KvKind Kind>
struct KvElement;
template <>
struct KvElement<KvKind::kF32> {
  using Type = float;
  static F32x16 widen(const float* p) { return load(p); }
};
template <>
struct KvElement<KvKind::kF16> {
  using Type = uint16_t;
  static F32x16 widen(const uint16_t* p) { return load_f16(p); }
};
template <>
struct KvElement<KvKind::kBf16> {
  using Type = uint16_t;
  static F32x16 widen(const uint16_t* p) { return load_bf16(p); }
};
template <>
struct KvElement<KvKind::kInt8> {
  using Type = int8_t;
  static F32x16 widen(const int8_t* p) { return load_i8(p); }
};

// The keys of one chunk and KV head, in tiles of 16 positions. Only the tiles that were asked for are set.
struct ChunkView {
  const void* k[kKeyTiles];         // element (d, lane) of tile t at k[t] + d * k_stride + lane, in elements
  const void* v[kKeyTiles];         // element (lane, d) at v[t] + lane * v_stride + d
  const float* k_scale[kKeyTiles];  // [16] each; null but for kInt8
  const float* v_scale[kKeyTiles];
  int64_t k_stride, v_stride;
  // What comes after this chunk, or the view itself. What is read here is fetched there, at the same place, into the
  // second cache: keys while scores are computed, values while values are weighed, as memory has no time to lose.
  const ChunkView* next;
};

// How many tiles of keys, and vectors of features, fill the registers beside `rows` rows.
#if defined(HR_ISA_AVX512)
constexpr int tiles_beside(int) { return 4; }
#else
constexpr int tiles_beside(int rows) { return rows >= 4 ? 1 : rows >= 2 ? 2 : 4; }
#endif

// The same pointer, which the compiler takes for another one: what is loaded through it for one tile, or vector, is
// loaded again for the next. AVX2 has 16 registers, and GCC 12 would rather keep the broadcasts of the rows in them
// than all sums.
inline __attribute__((always_inline)) const float* loaded_again(const float* p) {
#if !defined(HR_ISA_AVX512) && !defined(HR_ISA_GENERIC)
  __asm__ volatile("" : "+r"(p));
#endif
  return p;
}

// scores[r][16 t + lane] = sum over d of q[r][d] K[d][lane], for tiles [tile, tile + Tiles).
template <KvKind Kind, int Rows, int Tiles>
__attribute__((noinline)) void score_tiles(const float* q, int head_dim, const ChunkView& view, int tile,
                                           float* scores) {
  using Element = KvElement<Kind>;
  const typename Element::Type* k[Tiles];
  const typename Element::Type* next[Tiles];
  F32x16 sums[Rows][Tiles];
  for (int t = 0; t < Tiles; t++) k[t] = (const typename Element::Type*)view.k[tile + t];
  for (int t = 0; t < Tiles; t++) next[t] = (const typename Element::Type*)view.next->k[tile + t];
  for (int r = 0; r < Rows; r++)
    for (int t = 0; t < Tiles; t++) sums[r][t] = broadcast(0.0f);
  const int64_t stride = view.k_stride;
  if (head_dim < 1) __builtin_unreachable();
  for (int d = 0; d < head_dim; d++) {
    for (int t = 0; t < Tiles; t++) {
      const F32x16 keys = Element::widen(k[t] + d * stride);
      __builtin_prefetch(next[t] + d * stride, 0, 2);
      const float* rows = loaded_again(q + d);
      for (int r = 0; r < Rows; r++) sums[r][t] = fma(broadcast(rows[r * kAttentionStride]), keys, sums[r][t]);
    }
  }
  for (int r = 0; r < Rows; r++)
    for (int t = 0; t < Tiles; t++) store(scores + r * kAttentionChunk + (tile + t) * kLanes, sums[r][t]);
}

template <KvKind Kind, int Rows>
inline void score_chunk(const float* q, int head_dim, const ChunkView& view, int tile, int tile_end, float* scores) {
  constexpr int kMost = tiles_beside(Rows);
  for (; kMost >= 4 && tile + 4 <= tile_end; tile += 4) score_tiles<Kind, Rows, kMost>(q, head_dim, view, tile, scores);
  constexpr int kSome = kMost >= 2 ? 2 : 1;
  for (; tile + kSome <= tile_end; tile += kSome) score_tiles<Kind, Rows, kSome>(q, head_dim, view, tile, scores);
  for (; tile < tile_end; tile++) score_tiles<Kind, Rows, 1>(q, head_dim, view, tile, scores);
}

// values[r][d] += weights[r][key] V[key][d], keys [key, key_end) in order, for 16 * Vectors features from `d` on.
template <KvKind Kind, int Rows, int Vectors>
__attribute__((noinline)) void weigh_vectors(const float* weights, const ChunkView& view, int key, int key_end, int d,
                                             bool from_zero, float* values, int64_t values_stride) {
  using Element = KvElement<Kind>;
  F32x16 sums[Rows][Vectors];
  for (int r = 0; r < Rows; r++)
    for (int j = 0; j < Vectors; j++)
      sums[r][j] = from_zero ? broadcast(0.0f) : load(values + r * values_stride + d + j * kLanes);
  while (key < key_end) {
    const int tile = key / kLanes, tile_end = tile * kLanes + kLanes;
    const int end = tile_end < key_end ? tile_end : key_end;
    const int64_t offset = key % kLanes * view.v_stride + d;
    const typename Element::Type* v = (const typename Element::Type*)view.v[tile] + offset;
    const typename Element::Type* next = (const typename Element::Type*)view.next->v[tile] + offset;
    for (; key < end; key++, v += view.v_stride, next += view.v_stride) {
      __builtin_prefetch(next, 0, 2);
      for (int j = 0; j < Vectors; j++) {
        const F32x16 features = Element::widen(v + j * kLanes);
        const float* rows = loaded_again(weights + key);
        for (int r = 0; r < Rows; r++) sums[r][j] = fma(broadcast(rows[r * kAttentionChunk]), features, sums[r][j]);
      }
    }
  }
  for (int r = 0; r < Rows; r++)
    for (int j = 0; j < Vectors; j++) store(values + r * values_stride + d + j * kLanes, sums[r][j]);
}

// For all features; padded_dim is head_dim rounded up to 16.
template <KvKind Kind, int Rows>
inline void weigh_values(const float* weights, const ChunkView& view, int key, int key_end, int padded_dim,
                         bool from_zero, float* values, int64_t values_stride) {
  constexpr int kMost = tiles_beside(Rows);
  int d = 0;
  for (; d + kMost * kLanes <= padded_dim; d += kMost * kLanes) {
    weigh_vectors<Kind, Rows, kMost>(weights, view, key, key_end, d, from_zero, values, values_stride);
  }
  for (; d < padded_dim; d += kLanes) {
    weigh_vectors<Kind, Rows, 1>(weights, view, key, key_end, d, from_zero, values, values_stride);
  }
}

}  // namespace headrace::HR_ISA
