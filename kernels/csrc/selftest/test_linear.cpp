// Self-test of matrix products and embeddings: every kind of weight, every epilogue, row counts around the tiles.
#include "selftest.h"

namespace headrace::selftest {
namespace {

void fill_super(Random& random, const PackedMatrix& m, uint8_t* data) {
  for (int64_t i = 0; i < num_panels(m) * (m.cols / kSuper); i++, data += super_bytes(m.kind)) {
    for (int at = 0; at < super_bytes(m.kind); at++) data[at] = (uint8_t)random.next();
    for (int lane = 0; lane < 2 * kLanes; lane++) {
      const uint16_t half = random.half(false);
      std::memcpy(data + 2 * lane, &half, 2);
    }
    // 6 bits where the file has so many.
    for (int at = kSuperScales; m.kind != WeightKind::kSuper6 && at < kSuperBlocks; at++) data[at] &= 63;
  }
}

// Random integers and scales; layout.h says what lies where.
void fill(Random& random, const PackedMatrix& m, uint8_t* data) {
  if (is_super(m.kind)) return fill_super(random, m, data);
  const bool is_f32 = is_quantized(m.kind) ? m.scale_kind == ScaleKind::kF32 : m.kind == WeightKind::kF32;
  const int64_t numbers = is_quantized(m.kind) ? block_bytes(m) - quant_bytes(m.kind) : m.panel_bytes;
  const int64_t num_parts = is_quantized(m.kind) ? num_panels(m) * (m.cols / kGroup) : num_panels(m);
  for (int64_t part = 0; part < num_parts; part++) {
    if (is_quantized(m.kind)) {
      for (int64_t i = 0; i < quant_bytes(m.kind); i++) *data++ = (uint8_t)random.next();
    }
    for (int64_t i = 0; i < numbers; i += is_f32 ? 4 : 2) {
      const float full = random.number();
      const uint16_t half = random.half(m.kind == WeightKind::kBf16);
      std::memcpy(data + i, is_f32 ? (const void*)&full : (const void*)&half, is_f32 ? 4 : 2);
    }
    data += numbers;
  }
}

PackedMatrix shape(WeightKind kind, ScaleKind scale_kind, int scales, bool has_zeros, bool is_gated) {
  PackedMatrix m = {};
  m.kind = kind;
  m.scale_kind = scale_kind;
  m.rows = is_gated ? 2 * 80 : 72;  // padded
  m.cols = is_super(kind) ? 768 : 96;
  m.scales_per_block = scales;
  m.has_zeros = has_zeros;
  m.is_gated = is_gated;
  m.panel_bytes = panel_bytes_of(m);
  return m;
}

void test_product(Random& random, const PackedMatrix& m, int num_rows, int bits, Epilogue epilogue, bool is_narrow) {
  Buffer<float> x((size_t)num_rows * m.cols);
  random.fill(x.data(), x.size());
  const size_t bytes = activation_bytes(num_rows, m.cols, bits ? bits : 8);
  Buffer<uint8_t> quantized(bytes);
  const Activations activations = {quantized.data(), bits, m.cols};
  if (bits) {
    const QuantizeArgs args = {x.data(), m.cols, &activations};
    tables()[0]->quantize(args, 0, num_rows);
  }
  Buffer<float> bias((size_t)num_panels(m) * kLanes);
  random.fill(bias.data(), bias.size());
  const int width = m.is_gated ? m.rows / 2 : m.rows;
  const auto args_for = [&](float* out, const Activations* gated) {
    return LinearArgs{
        &m, bits ? &activations : nullptr, x.data(), m.cols, bias.data(), out, width, gated, epilogue, num_rows};
  };
  char what[96];
  std::snprintf(what, sizeof what, "linear kind %d scales %d zeros %d gated %d rows %d bits %d epilogue %d",
                (int)m.kind, m.scales_per_block, m.has_zeros, m.is_gated, num_rows, bits, (int)epilogue);
  const int units = (int)num_linear_units(m);
  if (is_narrow) {
    Buffer<uint8_t> out(activation_bytes(num_rows, 96, 8));
    compare(what, out, [&](const KernelTable& table, uint8_t* to) {
      const Activations gated = {to, 8, 96};
      table.linear(args_for(nullptr, &gated), 0, units);
    });
  } else {
    Buffer<float> out((size_t)num_rows * width);
    random.fill(out.data(), out.size());
    compare(what, out, [&](const KernelTable& table, float* to) {
      table.linear(args_for(to, nullptr), 0, 1);
      table.linear(args_for(to, nullptr), 1, units);
    });
  }
}

void test_embedding(Random& random, const PackedMatrix& m) {
  const int32_t ids[] = {0, 71, 5, 5, 16, 40};
  Buffer<float> out(6 * (size_t)m.cols);
  char what[64];
  std::snprintf(what, sizeof what, "embed kind %d scales %d zeros %d", (int)m.kind, m.scales_per_block, m.has_zeros);
  const float scale = random.number();
  compare(what, out,
          [&](const KernelTable& table, float* to) { table.embed(EmbedArgs{&m, ids, scale, to, m.cols}, 0, 6); });
}

void test_matrix(Random& random, PackedMatrix m) {
  Buffer<uint8_t> bytes((size_t)(num_panels(m) * m.panel_bytes));
  fill(random, m, bytes.data());
  m.data = bytes.data();
  if (!m.is_gated) test_embedding(random, m);
  const std::vector<int> widths = is_quantized(m.kind) ? std::vector<int>{8, 16} : std::vector<int>{0};
  for (const int num_rows : {1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 33}) {
    for (const int bits : widths) {
      if (m.is_gated) {
        test_product(random, m, num_rows, bits, Epilogue::kSiluGate, false);
        test_product(random, m, num_rows, bits, Epilogue::kGeluGate, true);
      } else {
        test_product(random, m, num_rows, bits, Epilogue::kStore, false);
        test_product(random, m, num_rows, bits, Epilogue::kAdd, false);
      }
    }
  }
}

}  // namespace

void test_linear(Random& random) {
  for (const bool is_gated : {false, true}) {
    for (const WeightKind kind : {WeightKind::kF32, WeightKind::kF16, WeightKind::kBf16})
      test_matrix(random, shape(kind, ScaleKind::kF16, 0, false, is_gated));
    for (const WeightKind kind : {WeightKind::kSuper4, WeightKind::kSuper5, WeightKind::kSuper6})
      test_matrix(random, shape(kind, ScaleKind::kF16, 0, false, is_gated));
    for (const WeightKind kind : {WeightKind::kInt4, WeightKind::kInt8})
      for (const ScaleKind scale_kind : {ScaleKind::kF16, ScaleKind::kF32})
        for (const int scales : {1, 2})
          for (const bool has_zeros : {false, true})
            test_matrix(random, shape(kind, scale_kind, scales, has_zeros, is_gated));
  }
}

}  // namespace headrace::selftest
