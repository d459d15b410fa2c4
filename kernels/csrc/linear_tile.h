// The matrix product over quantised weights: one panel of 16 outputs times some rows of activations. Called by
// linear.h; the integer dots of a block come from linear_dots_*.h, everything in floating point is here, so that there
// is one order of operations. For an output f, from f = 0, blocks in the order of k, and in a block the parts that have
// a scale of their own (features 0..31, or 0..15 and then 16..31):
//
//   d = sum of q * a over the part, exact in int32 (without zeros q is signed; with zeros int4's q is 0..15)
//   f = fma(float(d) * weight_scale, activation_scale, f)
//   f = fma(weight_zero, activation_scale_sum, f)          with zeros only
//
// where float(d) * weight_scale is rounded, and activation_scale_sum is activation_scale * float(sum of a) rounded. It
// depends on nothing else: not on the instruction set, the number of rows, or how panels are shared out.
#pragma once

#include <utility>

#include "activations.h"

namespace headrace::HR_ISA {

// How the 16 x 32 integers of a block lie in memory: packed as in layout.h, or unpacked: kSmallBytes, the nibbles as
// bytes [g][16 rows][4]; kWords, int16 [g][2][16 rows][2] for 16-bit activations, of which the first two are features
// 4 g and 4 g + 2, less the offset of weights that have no zeros.
enum class Format { kNibbles, kSmallBytes /* 0..15 */, kBytes /* q + 128 */, kWords };
constexpr bool is_unpacked(Format format) { return format == Format::kSmallBytes || format == Format::kWords; }

}  // namespace headrace::HR_ISA

#if defined(HR_ISA_AVX512)
#include "linear_dots_avx512.h"
#elif defined(HR_ISA_AVX2)
#include "linear_dots_avx2.h"
#elif defined(HR_ISA_NEON)
#include "linear_dots_neon.h"
#else
#include "linear_dots_generic.h"
#endif

namespace headrace::HR_ISA {

// A panel, or a run of its blocks, times up to kMaxColumns rows of activations.
struct TileArgs {
  const uint8_t* q;       // integers of the first block
  int64_t q_stride;       // bytes from block to block
  const uint8_t* scales;  // [parts][16], then zeros likewise; float16 or float32
  int64_t scale_stride;
  bool has_f16_scales;  // unpacked blocks have none
  const uint8_t* a;     // activation block of the first four rows
  int64_t a_stride;     // bytes from four rows to the next four
  int32_t num_blocks;
  bool is_first;         // start from 0, not from what is in `sums`
  float* sums;           // [rows][16]
  const uint8_t* ahead;  // of the first block: what to prefetch, a block for a block; or null
  int64_t ahead_stride;
};

// activation_scale_sum of half a block.
inline float half_scale_sum(const ActivationHeader& header, int column, int part) {
  const int32_t neg8 = part ? header.neg8_sum_high[column] : header.neg8_sum[column] - header.neg8_sum_high[column];
  return header.scale[column] * (float)(neg8 / -8);
}

template <Format kFormat, int kBits, bool kZeros, int kParts, int kRows>
inline void multiply_part(const TileArgs& t, const uint8_t* q, const uint8_t* scales, const uint8_t* const* a, int part,
                          F32x16 (&f)[kRows]) {
  F32x16 d[kRows];
  if (kParts == 1) {
    block_dots<kFormat, kBits, kZeros, 0, 8, kRows>(q, a, d);
  } else if (part == 0) {
    block_dots<kFormat, kBits, kZeros, 0, 4, kRows>(q, a, d);
  } else {
    block_dots<kFormat, kBits, kZeros, 4, 8, kRows>(q, a, d);
  }
  const int zero_at = kLanes * (kParts + part);
  const bool is_f16 = !is_unpacked(kFormat) && t.has_f16_scales;
  const F32x16 scale =
      is_f16 ? load_f16((const uint16_t*)scales + kLanes * part) : load((const float*)scales + kLanes * part);
  for (int c = 0; c < kRows; c++) {
    const ActivationHeader& header = *(const ActivationHeader*)a[c / 4];
    f[c] = fma(mul(d[c], scale), broadcast(header.scale[c % 4]), f[c]);
  }
  if (!kZeros) return;
  const F32x16 zero = is_f16 ? load_f16((const uint16_t*)scales + zero_at) : load((const float*)scales + zero_at);
  for (int c = 0; c < kRows; c++) {
    const ActivationHeader& header = *(const ActivationHeader*)a[c / 4];
    const float sum = kParts == 1 ? header.scale_sum[c % 4] : half_scale_sum(header, c % 4, part);
    f[c] = fma(zero, broadcast(sum), f[c]);
  }
}

template <Format kFormat, int kBits, bool kZeros, int kParts, int kRows>
void multiply_tile(const TileArgs& t) {
  constexpr int kFours = (kRows + 3) / 4;
  constexpr int kScaleBytes = 32 * kParts * (kZeros ? 2 : 1);
  // Of 16-bit weights it is not known here what they were.
  constexpr int kAheadBytes = (kFormat == Format::kBytes || kFormat == Format::kWords ? 512 : 256) + kScaleBytes;
  const uint8_t* a[kFours];
  for (int i = 0; i < kFours; i++) a[i] = t.a + i * t.a_stride;
  const uint8_t *q = t.q, *scales = t.scales, *ahead = t.ahead;
  F32x16 f[kRows];
  for (int c = 0; c < kRows; c++) f[c] = t.is_first ? broadcast(0.0f) : load(t.sums + kLanes * c);
  for (int block = 0; block < t.num_blocks; block++) {
    if (ahead) {
      for (int at = 0; at < kAheadBytes; at += 64) __builtin_prefetch(ahead + at, 0, 3);
      ahead += t.ahead_stride;
    }
    for (int part = 0; part < kParts; part++)
      multiply_part<kFormat, kBits, kZeros, kParts, kRows>(t, q, scales, a, part, f);
    q += t.q_stride;
    scales += t.scale_stride;
    for (int i = 0; i < kFours; i++) a[i] += activation_block_bytes(kBits);
  }
  for (int c = 0; c < kRows; c++) store(t.sums + kLanes * c, f[c]);
}

using Tile = void (*)(const TileArgs&);

// multiply_tile for each number of rows, [rows - 1].
struct Tiles {
  Tile of_rows[kMaxColumns];
};
template <Format kFormat, int kBits, bool kZeros, int kParts, int... kIndex>
const Tiles* tiles_of(std::integer_sequence<int, kIndex...>) {
  static constexpr Tiles kTiles = {{multiply_tile<kFormat, kBits, kZeros, kParts, kIndex + 1>...}};
  return &kTiles;
}

template <Format kFormat, int kBits>
const Tiles* choose_tiles(const PackedMatrix& m) {
  // Nibbles are read as they are for one row only where more rows are worth an unpacked copy.
  constexpr int kMost = kFormat == Format::kNibbles && kUnpacksNibbles ? 1 : kMaxColumns;
  constexpr auto kRows = std::make_integer_sequence<int, kMost>();
  if (m.scales_per_block == 1) {
    return m.has_zeros ? tiles_of<kFormat, kBits, true, 1>(kRows) : tiles_of<kFormat, kBits, false, 1>(kRows);
  }
  return m.has_zeros ? tiles_of<kFormat, kBits, true, 2>(kRows) : tiles_of<kFormat, kBits, false, 2>(kRows);
}

template <int kBits>
const Tiles* choose_tiles(const PackedMatrix& m, Format format) {
  if constexpr (kUnpacksWords && kBits == 16) {
    if (format == Format::kWords) return choose_tiles<Format::kWords, kBits>(m);
  }
  if constexpr (kUnpacksNibbles) {
    if (format == Format::kSmallBytes) return choose_tiles<Format::kSmallBytes, kBits>(m);
  }
  if (format == Format::kBytes) return choose_tiles<Format::kBytes, kBits>(m);
  return choose_tiles<Format::kNibbles, kBits>(m);
}

// The form in which a product of `num_rows` rows reads the weights.
inline Format format_of(const PackedMatrix& m, int bits, int num_rows) {
  if (kUnpacksWords && bits == 16 && num_rows > 2 * kMaxColumns) return Format::kWords;
  if (m.kind == WeightKind::kInt8) return Format::kBytes;
  return kUnpacksNibbles && num_rows > 1 ? Format::kSmallBytes : Format::kNibbles;
}

// How many rows the next tile takes of `rows`: sizes in which no tile but the only one is small.
inline int next_tile(int rows) {
  if (rows <= kMaxColumns) return rows;
  if (kMaxColumns == 8 && rows < 12) return 4;
  return kMaxColumns;
}

// Blocks unpacked at once: 12 or 18 KiB of integers and 3 KiB of scales in the first cache.
constexpr int kChunkBlocks = 24, kWordChunkBlocks = 18;
constexpr int64_t kAheadOfOneRow = 8192;  // bytes that a single row's product prefetches ahead

// A run of blocks of a panel, in one of the unpacked formats, and scales as float32. Exact.
struct UnpackedChunk {
  alignas(64) uint8_t q[kWordChunkBlocks * 1024];
  alignas(64) float scales[kChunkBlocks * 4 * kLanes];
};
inline void unpack_chunk(const PackedMatrix& m, Format format, const uint8_t* block, int num_blocks,
                         UnpackedChunk& to) {
  const int vectors = m.scales_per_block * (m.has_zeros ? 2 : 1);
  const bool is_nibbles = m.kind == WeightKind::kInt4;
  const int offset = !is_nibbles ? 128 : m.has_zeros ? 0 : 8;
  const int64_t stride = block_bytes(m), scales_at = quant_bytes(m.kind);
  for (int b = 0; b < num_blocks; b++, block += stride) {
    if (format == Format::kWords) {
      unpack_words(block, is_nibbles, offset, to.q + 1024 * b);
    } else {
      unpack_nibbles(block, to.q + 512 * b);
    }
    const uint8_t* scales = block + scales_at;
    float* out = to.scales + kLanes * vectors * b;
    for (int v = 0; v < vectors; v++, out += kLanes) {
      store(out, m.scale_kind == ScaleKind::kF16 ? load_f16((const uint16_t*)scales + kLanes * v)
                                                 : load((const float*)scales + kLanes * v));
    }
  }
}

// Rows [first, first + num_rows) of the activations, first a multiple of 4, in tiles.
inline void multiply_rows(const Tiles& tiles, TileArgs t, int num_rows) {
  for (int row = 0; row < num_rows;) {
    const int rows = next_tile(num_rows - row);
    tiles.of_rows[rows - 1](t);
    row += rows;
    t.a += rows / 4 * t.a_stride;
    t.sums += kLanes * rows;
    t.ahead = nullptr;  // the first tile has fetched it
  }
}

// sums[t][16] = panel x rows [first, first + num_rows) of the activations; `first` is a multiple of 4.
inline void multiply_panel(const PackedMatrix& m, int64_t panel, const Activations& x, int first, int num_rows,
                           float* sums) {
  const uint8_t* weights = m.data + panel * m.panel_bytes;
  const Format format = format_of(m, x.bits, num_rows);
  const Tiles& tiles = *(x.bits == 8 ? choose_tiles<8>(m, format) : choose_tiles<16>(m, format));
  const int num_blocks = m.cols / kGroup;
  TileArgs t;
  t.q_stride = t.scale_stride = t.ahead_stride = block_bytes(m);
  t.has_f16_scales = m.scale_kind == ScaleKind::kF16;
  t.a = activation_block(x, first, 0);
  t.a_stride = (int64_t)activation_bytes(kColumns, x.width, x.bits);
  t.sums = sums;
  t.is_first = true;
  if (!is_unpacked(format)) {
    t.q = weights;
    t.scales = weights + quant_bytes(m.kind);
    t.num_blocks = num_blocks;
    t.ahead = weights + (num_rows == 1 ? kAheadOfOneRow : m.panel_bytes);
    multiply_rows(tiles, t, num_rows);
    return;
  }
  const int chunk_blocks = format == Format::kWords ? kWordChunkBlocks : kChunkBlocks;
  UnpackedChunk chunk;
  t.q = chunk.q;
  t.q_stride = format == Format::kWords ? 1024 : 512;
  t.scales = (const uint8_t*)chunk.scales;
  t.scale_stride = 64 * m.scales_per_block * (m.has_zeros ? 2 : 1);
  for (int block = 0; block < num_blocks; block += chunk_blocks) {
    const uint8_t* from = weights + block * block_bytes(m);
    t.num_blocks = num_blocks - block < chunk_blocks ? num_blocks - block : chunk_blocks;
    unpack_chunk(m, format, from, t.num_blocks, chunk);
    t.ahead = from + m.panel_bytes;
    multiply_rows(tiles, t, num_rows);
    t.is_first = false;
    t.a += (int64_t)t.num_blocks * (int64_t)activation_block_bytes(x.bits);
  }
}

}  // namespace headrace::HR_ISA
