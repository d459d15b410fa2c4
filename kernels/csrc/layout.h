// The memory layouts that packing, kernels and executor agree on: weight panels, quantised activations, KV blocks.
//
// Everything is sized in lanes: 16 floats side by side, whatever the machine's registers hold. A weight panel is 16
// output rows, so one lane is one output element and no kernel ever adds across lanes of a matrix product.
#pragma once

#include <cstddef>
#include <cstdint>

namespace headrace {

constexpr int kLanes = 16;     // floats in an F32x16; output rows of a weight panel
constexpr int kGroup = 32;     // input features of a weight block, and of an activation group
constexpr int kColumns = 4;    // activation rows ("columns" of the product) that are interleaved
constexpr size_t kAlign = 64;  // bytes; every buffer and panel starts on a cache line

constexpr int kSuper = 256;  // input features of a super-block, which has scales of two levels

enum class WeightKind : int32_t {
  kInt4 = 0,
  kInt8 = 1,
  kF32 = 2,
  kF16 = 3,
  kBf16 = 4,
  kSuper4 = 5,  // GGUF's Q4_K
  kSuper5 = 6,  // Q5_K
  kSuper6 = 7,  // Q6_K
};
constexpr int kNumWeightKinds = 8;
enum class ScaleKind : int32_t { kF16 = 0, kF32 = 1 };

// A packed matrix of `rows` x `cols` weights (rows = output features). Panels of 16 rows follow each other, rows that
// pad the last one are zero. Within a panel, blocks of 32 input features follow each other:
//
//   kInt4   256 B: byte 64 g + 4 r + j (g < 4, r < 16, j < 4) holds feature 4 g + j of row r in its low nibble and
//           feature 16 + 4 g + j in its high one, as q in 0..15
//   kInt8   512 B: byte 64 g + 4 r + j (g < 8) holds feature 4 g + j of row r as q + 128
//   then scales [scales_per_block][16] and, with has_zeros, zeros [scales_per_block][16], as ScaleKind says.
//   scales_per_block is 1, or 2 where a group is 16 features. weight = scale * q + zero with zeros; without,
//   weight = scale * (q - 8) for kInt4 and scale * q for kInt8.
//
//   kSuper4, kSuper5, kSuper6: super-blocks of 256 features, 2368, 2880 and 3392 B (4.6, 5.6 and 6.6 bits a weight):
//     0    f16 d[16]       scale of the scales of each row
//     32   f16 dmin[16]    scale of the mins; 0 for kSuper6
//     64   u8 scale[8][16] of features 32 i ..; kSuper6: i8 scale[16][16] of features 16 i .., and nothing follows
//     192  u8 min[8][16]
//     320  8 blocks of 32 features:
//            kSuper4, kSuper5: the low 4 bits of each q as for kInt4; then for kSuper5 64 B, of which bit g of byte
//              4 r + j is the upper bit of feature 4 g + j of row r
//            kSuper6: 2 x 3 x 64 B: byte 4 r + j of vector i of half p (i < 3, p < 2) holds feature 16 p + 4 i + j in
//              its lower 6 bits, and above them bits 2 i and 2 i + 1 of feature 16 p + 12 + j
//   weight = d * scale * q - dmin * min, q in 0..15 or 0..31; kSuper6: d * scale * (q - 32), q in 0..63.
//   scales_per_block, has_zeros and scale_kind are 0.
//
//   kF32, kF16, kBf16: feature by feature, 16 rows each ([cols][16]); no scales.
//
// A gated matrix (`is_gated`) holds gate above up, `rows` / 2 each, and interleaves their rows 32 and 32, so that 4
// panels make 32 outputs of act(gate) * up; each half is padded to a multiple of 32.
struct PackedMatrix {
  const uint8_t* data;
  WeightKind kind;
  ScaleKind scale_kind;
  int32_t rows;  // logical
  int32_t cols;  // multiple of 32 for the quantised kinds, of 256 for those with super-blocks
  int32_t scales_per_block;
  int32_t has_zeros;
  int32_t is_gated;
  int64_t panel_bytes;
};

// Functions here are static: every isa_*.cpp includes them, and the linker must not keep a copy that was compiled for
// another instruction set.
static inline bool is_super(WeightKind kind) { return kind >= WeightKind::kSuper4; }
static inline bool is_quantized(WeightKind kind) {
  return kind == WeightKind::kInt4 || kind == WeightKind::kInt8 || is_super(kind);
}

// Of the kinds with super-blocks: bits of a weight, the parts of a super-block that have a scale of their own, bytes
// before the first block, of a block, and of a super-block.
constexpr int super_bits(WeightKind kind) { return (int)kind - (int)WeightKind::kSuper4 + 4; }
constexpr int super_parts(WeightKind kind) { return kind == WeightKind::kSuper6 ? 16 : 8; }
constexpr int kSuperScales = 64, kSuperMins = 192, kSuperBlocks = 320;  // offsets
constexpr int super_block_bytes(WeightKind kind) { return 256 + 64 * (super_bits(kind) - 4); }
constexpr int super_bytes(WeightKind kind) { return kSuperBlocks + kSuper / kGroup * super_block_bytes(kind); }

// The integer of feature k of row `lane` in a block of 32, 0 and up.
static inline int super_weight(WeightKind kind, const uint8_t* block, int lane, int k) {
  const int within = 4 * lane + k % 4, g = k / 4;
  if (kind == WeightKind::kSuper6) {
    const uint8_t* three = block + g / 4 * 192 + within;
    return g % 4 < 3 ? three[64 * (g % 4)] & 63 : three[0] >> 6 | three[64] >> 6 << 2 | three[128] >> 6 << 4;
  }
  const int low = block[64 * (g % 4) + within] >> g / 4 * 4 & 15;
  return kind == WeightKind::kSuper4 ? low : low | (block[256 + within] >> g & 1) << 4;
}

// Bytes of the integers of a block of kInt4 or kInt8; scales and zeros follow them.
static inline int64_t quant_bytes(WeightKind kind) { return kind == WeightKind::kInt4 ? 256 : 512; }

static inline int64_t block_bytes(const PackedMatrix& m) {
  const int64_t vectors = (int64_t)m.scales_per_block * (m.has_zeros ? 2 : 1);
  return quant_bytes(m.kind) + vectors * kLanes * (m.scale_kind == ScaleKind::kF16 ? 2 : 4);
}

// What `panel_bytes` must be.
static inline int64_t panel_bytes_of(const PackedMatrix& m) {
  if (is_super(m.kind)) return (int64_t)(m.cols / kSuper) * super_bytes(m.kind);
  if (is_quantized(m.kind)) return m.cols / kGroup * block_bytes(m);
  return (int64_t)m.cols * kLanes * (m.kind == WeightKind::kF32 ? 4 : 2);
}

static inline int64_t num_panels(const PackedMatrix& m) {
  return m.is_gated ? ((int64_t)m.rows / 2 + 31) / 32 * 4 : ((int64_t)m.rows + kLanes - 1) / kLanes;
}

// What `begin` and `end` of KernelTable::linear count.
static inline int64_t num_linear_units(const PackedMatrix& m) { return m.is_gated ? num_panels(m) / 4 : num_panels(m); }

// Rows of activations quantised for the integer kinds, in groups of 32 features: x = scale * q, symmetric.
// bits 8: q in -127..127; bits 16: q in -32512..32512. Four rows are interleaved; what lies in the places of rows
// beyond the last is never read as a number that matters. The exact layout is private to activations.h and linear*.h.
struct Activations {
  uint8_t* data;
  int32_t bits;   // 8 or 16
  int32_t width;  // features, a multiple of 32
};

// One block: 4 rows x 32 features.
static inline size_t activation_block_bytes(int32_t bits) { return 64 + (size_t)kColumns * kGroup * (size_t)bits / 8; }

// Bytes of Activations::data for `rows` rows.
static inline size_t activation_bytes(int64_t rows, int64_t width, int32_t bits) {
  return (size_t)((rows + kColumns - 1) / kColumns) * (size_t)(width / kGroup) * activation_block_bytes(bits);
}

enum class KvKind : int32_t { kF32 = 0, kF16 = 1, kBf16 = 2, kInt8 = 3 };

// The KV blocks of one layer: per block and KV head first K, transposed, [head_dim][block_size], then V,
// [block_size][head_dim], elements as `kind` says. kInt8 keeps a float32 scale per token and head behind the elements:
// [block_size] for K, [block_size] for V. block_bytes is that of one block with all heads, a multiple of 64.
struct KvLayer {
  uint8_t* data;
  int64_t block_bytes;
  int64_t head_bytes;  // bytes of one head within a block
  KvKind kind;
  int32_t num_kv_heads;
  int32_t head_dim;
  int32_t block_size;
};

}  // namespace headrace
