// One table of kernels per instruction set: what the executor calls and what the op tests call. The files isa_*.cpp
// each compile the same templates and export one table; dispatch.cpp chooses.
//
// Every function works on a range of its op's units, [begin, end), so that threads can share an op; results never
// depend on how it is split. None allocates; none throws; all pointers are 64-byte aligned unless said otherwise.
#pragma once

#include "layout.h"
#include "sample_args.h"

namespace headrace {

enum class Epilogue : int32_t { kStore = 0, kAdd = 1, kSiluGate = 2, kGeluGate = 3 };

// out = x @ weight.T (+ bias). x is `activations` for the integer kinds, `x` (float32 [num_rows, cols]) for the others.
// Units: panels; for gated weights groups of 4 panels (32 outputs).
//   kStore   out[t][n] = sum;  kAdd  out[t][n] += sum
//   gates    out[t][n] = act(gate) * up as float32 where out is given, else quantised into `gated`
struct LinearArgs {
  const PackedMatrix* weight;
  const Activations* activations;
  const float* x;
  int64_t x_stride;    // floats between rows of x
  const float* bias;   // [rows] padded to a panel with zeros, or null
  float* out;          // float32
  int64_t out_stride;  // floats between rows of out
  const Activations* gated;
  Epilogue epilogue;
  int32_t num_rows;  // rows of x: tokens
};

// Rows of float32 to what the next product wants. Units: rows.
struct RmsNormArgs {
  const float* x;
  int64_t x_stride;
  const float* weight;  // [group]
  float eps;
  int32_t width;
  int32_t group;  // width, or head_dim for QK-norm
  float* out;     // float32, may be x; or null
  int64_t out_stride;
  const Activations* quantized;  // or null
  const int32_t* row_index;      // row t reads x row row_index[t]; null: t
};

// Turn q and k, write k and v into the KV blocks. q_norm, k_norm: optional RMSNorm per head before. Units: token rows.
struct RopeKvArgs {
  float* q;  // [T, num_heads * head_dim], turned in place
  float* k;  // null: neither turned nor written
  const float* v;
  int64_t q_stride, k_stride, v_stride;
  int32_t num_heads;
  const float* q_norm;  // [head_dim] or null
  const float* k_norm;
  float norm_eps;
  const float* cos_sin;  // [T][head_dim]: cos [half] then sin [half] of each row's position; null: no rotation
  const int32_t* slots;  // [T]
  const KvLayer* kv;
};

struct RopeTableArgs {
  const float* inv_freq;  // [half]
  const int32_t* positions;
  float attention_factor;
  int32_t half;
  float* cos_sin;  // [T][2 * half]
};

// Causal attention over KV blocks. Units: the items of `plan` (attention.h says how a step is cut into items).
struct AttentionArgs {
  const float* q;  // [T, num_heads * head_dim]
  int64_t q_stride;
  const KvLayer* kv;
  const int32_t* block_tables;  // [B, block_table_width]
  int64_t block_table_width;
  const int32_t* seq_lens;      // [B]
  const int32_t* cu_seqlens_q;  // [B + 1]
  int32_t num_seqs;
  int32_t num_heads;
  int32_t window;  // 0: none
  float scale;
  float soft_cap;  // 0: none
  float* out;      // float32 [T, num_heads * head_dim], or null
  int64_t out_stride;
  const Activations* quantized;  // or null
  const void* plan;
  uint8_t* scratch;  // of this thread, attention_scratch_bytes
};

struct ElementwiseArgs {  // out = a + b; or act(a) * b; or cap * tanh(a / cap). Units: rows.
  const float* a;
  const float* b;
  float* out;
  int64_t a_stride, b_stride, out_stride;
  int32_t width;
  float cap;
};

struct EmbedArgs {  // out[t] = table[token_ids[t]] * scale. Units: rows.
  const PackedMatrix* table;
  const int32_t* token_ids;
  float scale;
  float* out;
  int64_t out_stride;
};

struct QuantizeArgs {  // Units: rows.
  const float* x;
  int64_t x_stride;
  const Activations* quantized;
};

struct KernelTable {
  const char* name;
  void (*linear)(const LinearArgs&, int begin, int end);
  void (*embed)(const EmbedArgs&, int begin, int end);
  void (*quantize)(const QuantizeArgs&, int begin, int end);
  void (*rms_norm)(const RmsNormArgs&, int begin, int end);
  void (*rope_table)(const RopeTableArgs&, int begin, int end);
  void (*rope_kv)(const RopeKvArgs&, int begin, int end);
  void (*attention)(const AttentionArgs&, int begin, int end);
  void (*add)(const ElementwiseArgs&, int begin, int end);
  void (*silu_gate)(const ElementwiseArgs&, int begin, int end);
  void (*gelu_gate)(const ElementwiseArgs&, int begin, int end);
  void (*soft_cap)(const ElementwiseArgs&, int begin, int end);
  void (*sample)(const SampleArgs&, int begin, int end);
  void (*probe_lanes)(int operation, const void* a, const void* b, const void* c, void* out, int64_t num_vectors);
};

// Null where the table was not compiled for this target.
const KernelTable* generic_kernels();
const KernelTable* avx2_kernels();
const KernelTable* avx512_kernels();
const KernelTable* avx512vnni_kernels();
const KernelTable* neon_kernels();

// The best table that this CPU can run, or the one that HEADRACE_NATIVE_ISA names; null where that cannot run here.
const KernelTable* choose_kernels(const char* forced);

}  // namespace headrace
