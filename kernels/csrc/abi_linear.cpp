// The C functions of matrices and single linear ops (headrace_native.h). All arguments are checked before memory is
// touched: Python's callers get a sentence, never a crash.
#include <cstdint>
#include <cstring>

#include "abi_linear.h"
#include "error.h"
#include "headrace_native.h"
#include "kernel_table.h"
#include "pack.h"

using namespace headrace;

namespace headrace {

PackedMatrix packed_matrix(const HrMatrix& m) {
  PackedMatrix packed = {(const uint8_t*)m.data,
                         (WeightKind)m.kind,
                         (ScaleKind)m.scale_kind,
                         m.rows,
                         m.cols,
                         m.scales_per_block,
                         m.has_zeros,
                         m.is_gated,
                         0};
  packed.panel_bytes = panel_bytes_of(packed);
  return packed;
}

}  // namespace headrace

namespace {

constexpr int64_t kMostBytes = INT64_MAX / 4;

bool is_aligned(const void* p) { return (uintptr_t)p % kAlign == 0; }

int check_matrix(const HrMatrix* m) {
  if (!m) return fail("matrix is null");
  if (m->rows <= 0 || m->cols <= 0) return fail("a matrix has rows and columns, not %d x %d", m->rows, m->cols);
  if (m->kind < 0 || m->kind >= kNumWeightKinds) return fail("there is no weight kind %d", m->kind);
  if (m->is_gated < 0 || m->is_gated > 1) return fail("is_gated is %d, not 0 or 1", m->is_gated);
  if (m->is_gated && m->rows % 2) return fail("%d rows cannot be halved into gate and up", m->rows);
  if (is_super((WeightKind)m->kind)) {
    if (m->cols % kSuper) return fail("%d columns are no multiple of %d", m->cols, kSuper);
    if (m->scale_kind || m->has_zeros || m->scales_per_block) return fail("the scales of kind %d are fixed", m->kind);
  } else if (is_quantized((WeightKind)m->kind)) {
    if (m->cols % kGroup) return fail("%d columns are no multiple of %d", m->cols, kGroup);
    if (m->scale_kind < 0 || m->scale_kind > 1) return fail("there is no scale kind %d", m->scale_kind);
    if (m->has_zeros < 0 || m->has_zeros > 1) return fail("has_zeros is %d, not 0 or 1", m->has_zeros);
    if (m->scales_per_block < 1 || m->scales_per_block > 2)
      return fail("scales_per_block is %d, not 1 or 2", m->scales_per_block);
  }
  const PackedMatrix packed = packed_matrix(*m);
  if (num_panels(packed) > kMostBytes / packed.panel_bytes)
    return fail("%d x %d weights are too many", m->rows, m->cols);
  return 0;
}

int check_super_part(const HrMatrix& m, const HrMatrixPart& part) {
  const bool has_mins = (WeightKind)m.kind != WeightKind::kSuper6;
  if (!part.sub_scales) return fail("a part's sub-scales are null");
  if (has_mins != (part.zeros != nullptr) || has_mins != (part.sub_mins != nullptr))
    return fail("a part %s mins, the matrix %s", has_mins ? "lacks" : "has", has_mins ? "has them" : "has none");
  const int group = kSuper / super_parts((WeightKind)m.kind);
  if (part.group_size != group) return fail("a group is %d, not %d", group, part.group_size);
  return 0;
}

int check_part(const HrMatrix& m, const HrMatrixPart& part) {
  if (part.rows <= 0) return fail("a part has rows, not %d", part.rows);
  if (!part.packed) return fail("a part's packed is null");
  if (!is_quantized((WeightKind)m.kind)) return 0;
  if (!part.scales) return fail("a part's scales are null");
  if (is_super((WeightKind)m.kind)) return check_super_part(m, part);
  if (part.zeros && !m.has_zeros) return fail("a part has zeros, the matrix has none");
  const int group = part.group_size;
  if (group != 16 && (group <= 0 || group % kGroup)) return fail("a group is 16 or a multiple of 32, not %d", group);
  if (group == 16 && m.scales_per_block != 2) return fail("groups of 16 need two scales per block");
  if (m.cols % group) return fail("%d columns are no multiple of the group size %d", m.cols, group);
  return 0;
}

int64_t checked_activation_bytes(int64_t rows, int64_t width, int32_t bits) {
  if (rows <= 0 || rows > INT32_MAX) return fail("activations have rows, not %lld", (long long)rows);
  if (width <= 0 || width > INT32_MAX || width % kGroup)
    return fail("activations are a multiple of %d wide, not %lld", kGroup, (long long)width);
  if (bits != 8 && bits != 16) return fail("activations have 8 or 16 bits, not %d", bits);
  return (int64_t)activation_bytes(rows, width, bits);  // at most 2^31 * 2^31 * 2.5: it fits
}

int check_activations(const void* data, int64_t bytes, int64_t rows, int64_t width, int32_t bits) {
  const int64_t needed = checked_activation_bytes(rows, width, bits);
  if (needed < 0) return -1;
  if (!data) return fail("activations are null");
  if (!is_aligned(data)) return fail("activations are not aligned to %d bytes", (int)kAlign);
  if (bytes < needed) return fail("activations need %lld bytes, not %lld", (long long)needed, (long long)bytes);
  return 0;
}

}  // namespace

namespace headrace {

int check_data(const HrMatrix* m) {
  if (check_matrix(m)) return -1;
  if (!m->data) return fail("the matrix's data is null");
  const PackedMatrix packed = packed_matrix(*m);
  if (m->panel_bytes != packed.panel_bytes)
    return fail("a panel has %lld bytes, not %lld", (long long)packed.panel_bytes, (long long)m->panel_bytes);
  if (m->data_bytes < num_panels(packed) * packed.panel_bytes) return fail("the matrix's data is cut off");
  if (!is_aligned(m->data)) return fail("the matrix's data is not aligned to %d bytes", (int)kAlign);
  return 0;
}

const KernelTable* kernels_of(const char* isa) {
  const KernelTable* table = choose_kernels(isa);
  if (!table) fail("no kernels %s that run here", isa ? isa : "");
  return table;
}

int check_linear(const HrMatrix* m, const HrLinear* op) {
  if (check_data(m)) return -1;
  if (!op) return fail("linear is null");
  if (op->num_rows <= 0) return fail("a linear op has rows, not %d", op->num_rows);
  if (is_quantized((WeightKind)m->kind)) {
    if (check_activations(op->activations, op->activations_bytes, op->num_rows, m->cols, op->bits)) return -1;
  } else {
    if (!op->x) return fail("x is null");
    if (op->x_stride < m->cols) return fail("rows of x are %lld apart, not %d", (long long)op->x_stride, m->cols);
  }
  const bool is_gate = op->epilogue == (int32_t)Epilogue::kSiluGate || op->epilogue == (int32_t)Epilogue::kGeluGate;
  if (op->epilogue < 0 || op->epilogue > 3) return fail("there is no epilogue %d", op->epilogue);
  if (is_gate != (m->is_gated == 1)) return fail("a gate goes with a gated matrix, and with no other");
  if (!op->out) {
    if (!is_gate) return fail("out is null");
    return check_activations(op->gated, op->gated_bytes, op->num_rows, m->rows / 2, op->gated_bits);
  }
  const int width = is_gate ? m->rows / 2 : m->rows;
  if (op->out_stride < width) return fail("rows of out are %lld apart, not %d", (long long)op->out_stride, width);
  return 0;
}

LinearOp::LinearOp(const HrMatrix& m, const HrLinear& op)
    : matrix(packed_matrix(m)),
      // The kernels write through the pointers of outputs alone.
      activations{const_cast<uint8_t*>(op.activations), op.bits, m.cols},
      gated{op.gated, op.gated_bits, m.rows / 2},
      args{&matrix, &activations,  op.x,   op.x_stride,           op.bias,
           op.out,  op.out_stride, &gated, (Epilogue)op.epilogue, op.num_rows} {}

}  // namespace headrace

int64_t hr_matrix_bytes(const HrMatrix* matrix) {
  if (check_matrix(matrix)) return -1;
  const PackedMatrix m = packed_matrix(*matrix);
  return num_panels(m) * m.panel_bytes;
}

int hr_pack_matrix(const HrMatrix* matrix, const HrMatrixPart* parts, int32_t num_parts, uint8_t* out,
                   int64_t out_bytes) {
  if (check_matrix(matrix)) return -1;
  if (!parts || num_parts <= 0) return fail("there are no parts");
  if (num_parts > 16) return fail("%d parts are too many", num_parts);
  MatrixPart own[16];
  int64_t rows = 0;
  for (int i = 0; i < num_parts; i++) {
    if (check_part(*matrix, parts[i])) return -1;
    const int group = is_quantized((WeightKind)matrix->kind) ? parts[i].group_size : kGroup;
    own[i] = {parts[i].packed,   parts[i].scales, parts[i].zeros, (const uint8_t*)parts[i].sub_scales,
              parts[i].sub_mins, parts[i].rows,   group};
    rows += parts[i].rows;
  }
  if (rows != matrix->rows) return fail("the parts have %lld rows, the matrix %d", (long long)rows, matrix->rows);
  if (!out) return fail("out is null");
  if (!is_aligned(out)) return fail("out is not aligned to %d bytes", (int)kAlign);
  const int64_t needed = hr_matrix_bytes(matrix);
  if (out_bytes < needed) return fail("out needs %lld bytes, not %lld", (long long)needed, (long long)out_bytes);
  const PackedMatrix m = packed_matrix(*matrix);
  pack_panels(m, own, num_parts, out, 0, num_panels(m));
  return 0;
}

int hr_unpack_matrix(const HrMatrix* matrix, const HrUnpackedMatrix* to) {
  if (check_data(matrix)) return -1;
  if (!to || !to->packed) return fail("packed is null");
  const WeightKind kind = (WeightKind)matrix->kind;
  const bool is_two_level = is_super(kind), has_mins = is_two_level && kind != WeightKind::kSuper6;
  if (is_quantized(kind) && (!to->scales || ((matrix->has_zeros || has_mins) && !to->zeros)))
    return fail("scales or zeros are null");
  if (is_two_level && (!to->sub_scales || (has_mins && !to->sub_mins))) return fail("sub-scales or mins are null");
  unpack_matrix(packed_matrix(*matrix), {to->packed, to->scales, to->zeros, (uint8_t*)to->sub_scales, to->sub_mins});
  return 0;
}

int64_t hr_activation_bytes(int64_t rows, int64_t width, int32_t bits) {
  return checked_activation_bytes(rows, width, bits);
}

int hr_quantize_test(const char* isa, const float* x, int64_t x_stride, int32_t rows, int32_t width, int32_t bits,
                     uint8_t* out, int64_t out_bytes) {
  if (check_activations(out, out_bytes, rows, width, bits)) return -1;
  if (!x) return fail("x is null");
  if (x_stride < width) return fail("rows of x are %lld apart, not %d", (long long)x_stride, width);
  const KernelTable* table = kernels_of(isa);
  if (!table) return -1;
  const Activations to = {out, bits, width};
  const QuantizeArgs args = {x, x_stride, &to};
  table->quantize(args, 0, rows);
  return 0;
}

int hr_linear_test(const char* isa, const HrMatrix* matrix, const HrLinear* op, int32_t units_per_call) {
  if (check_linear(matrix, op)) return -1;
  if (units_per_call <= 0) return fail("a call has units, not %d", units_per_call);
  const KernelTable* table = kernels_of(isa);
  if (!table) return -1;
  const LinearOp own(*matrix, *op);
  const int units = (int)num_linear_units(own.matrix);
  for (int begin = 0; begin < units; begin += units_per_call)
    table->linear(own.args, begin, units - begin < units_per_call ? units : begin + units_per_call);
  return 0;
}

int hr_embed_test(const char* isa, const HrMatrix* table, const int32_t* token_ids, int32_t num_tokens, float scale,
                  float* out, int64_t out_stride) {
  if (check_data(table)) return -1;
  if (table->is_gated) return fail("a gated matrix is no table");
  if (!token_ids || !out) return fail("token_ids or out is null");
  if (num_tokens <= 0) return fail("there are tokens, not %d", num_tokens);
  if (out_stride < table->cols) return fail("rows of out are %lld apart, not %d", (long long)out_stride, table->cols);
  for (int i = 0; i < num_tokens; i++)
    if (token_ids[i] < 0 || token_ids[i] >= table->rows) return fail("there is no token %d", token_ids[i]);
  const KernelTable* kernels = kernels_of(isa);
  if (!kernels) return -1;
  const PackedMatrix m = packed_matrix(*table);
  kernels->embed({&m, token_ids, scale, out, out_stride}, 0, num_tokens);
  return 0;
}
