// The C ABI of the native library: all that Python (headrace.kernels.native, by ctypes) may call.
//
// Plain C types only; no function throws. Functions that can fail return 0 or a negative code, and hr_last_error() has
// the sentence (per thread). Handles are made and freed by one thread; an executor runs on one thread at a time.
#pragma once

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define HR_API extern "C" __attribute__((visibility("default")))
#else
#define HR_API extern "C"
#endif

#define HR_ABI_VERSION 2

HR_API int hr_abi_version(void);
HR_API const char* hr_source_hash(void);         // of the sources that it was compiled from
HR_API const char* hr_isa_name(void);            // of the table in use, e.g. "avx512vnni"; "" where none can run
HR_API const char* hr_isa_names_compiled(void);  // comma-separated
HR_API const char* hr_isa_names_usable(void);    // of those, what this CPU runs
HR_API const char* hr_last_error(void);

// How to treat one row of logits: headrace.kernels.batch.RowSampling, as headrace.kernels.native.sampling encodes it.
// `bias_ids`, `banned_ids`, `prompt_ids`, `output_ids` are offsets into one array of token ids, `bias_values` into one
// of float32 values (one per bias id), `top` into the arrays that take the num_logprobs most likely tokens.
typedef struct HrRowSampling {
  double temperature, top_p, min_p;
  double repetition_penalty, presence_penalty, frequency_penalty;
  uint64_t seed;
  int32_t target, top_k, position, num_logprobs;
  int32_t bias_ids, bias_values, num_bias;
  int32_t banned_ids, num_banned;
  int32_t prompt_ids, num_prompt;
  int32_t output_ids, num_output;
  int32_t top;
} HrRowSampling;

// One row of logits, used up: headrace.kernels.batch.RowResult. num_top entries were written at `top`.
typedef struct HrRowResult {
  double logprob;  // NaN where not asked for
  int32_t token_id, is_finite;
  int32_t num_top, top;
} HrRowResult;

// What the offsets in `samplings` point into. 0, or negative where an offset, a count or a token id is out of range:
// called before rows are sampled, as nothing is checked there.
HR_API int hr_check_samplings(const HrRowSampling* samplings, int32_t num_rows, int32_t vocab_size,
                              const int32_t* token_ids, int32_t num_token_ids, int32_t num_bias_values,
                              int32_t num_top);

// Sample rows of logits, float32 [num_rows][vocab_size], with the kernels of `isa` (null: those in use). For tests and
// benches. 0, or negative.
HR_API int hr_sample_test(const char* isa, const float* logits, int64_t logits_stride, int32_t num_rows,
                          int32_t vocab_size, const HrRowSampling* samplings, const int32_t* token_ids,
                          int32_t num_token_ids, const float* bias_values, int32_t num_bias_values,
                          HrRowResult* results, int32_t* top_ids, double* top_logprobs, int32_t num_top);

// ---- The executor: a fused program handed over once, then one call per step (headrace.kernels.native.encode) ----

// csrc/layout.h, PackedMatrix. `data` is 64-byte aligned; an executor copies it.
typedef struct HrMatrix {
  const void* data;
  int64_t data_bytes, panel_bytes;
  int32_t kind, scale_kind, rows, cols, scales_per_block, has_zeros, is_gated, reserved;
} HrMatrix;

typedef struct HrVector {  // copied
  const float* data;
  int64_t size;
} HrVector;

// bits 0: float32; 8 or 16: quantised activations. is_logits: has max_logit_rows rows, else max_tokens.
typedef struct HrBuffer {
  int32_t is_logits, bits, width;
} HrBuffer;

typedef struct HrOperand {  // columns of a buffer; all of it where that is quantised
  int32_t buffer, column, width;
} HrOperand;

typedef struct HrRope {  // copied
  const float* inv_freq;
  int32_t half;
  float attention_factor;
} HrRope;

typedef struct HrKvShape {
  int32_t num_kv_heads, head_dim;
} HrKvShape;

enum HrOpKind {
  HR_EMBED = 0,      // out = rows of matrix * scale
  HR_QUANTIZE = 1,   // quantized = a
  HR_LINEAR = 2,     // out or quantized = a @ matrix (+ vector); epilogue: csrc/kernel_table.h, Epilogue
  HR_NORM = 3,       // out and/or quantized = norm of a by vector, in groups of `group`; selects_rows: by logit_rows
  HR_ROPE_KV = 4,    // a, b, c = q, k, v; vector, vector2 = norms of q and k; rope
  HR_ATTENTION = 5,  // out and/or quantized = attention of a
  HR_ADD = 6,        // out = a + b
  HR_SILU_GATE = 7,  // out = act(a) * b
  HR_GELU_GATE = 8,
  HR_SELECT = 9,     // out = rows logit_rows of a
  HR_SOFT_CAP = 10,  // a = soft_cap * tanh(a / soft_cap)
  HR_NUM_OP_KINDS = 11
};

// Indices into the arrays of HrExecutorConfig (operands, matrices, vectors, ropes, layers); -1: none.
typedef struct HrOp {
  int32_t kind, a, b, c, out, quantized, matrix, vector, vector2, rope, layer;
  int32_t epilogue, group, num_heads, window, selects_rows;
  float eps, scale, soft_cap;
} HrOp;

typedef struct HrExecutorConfig {
  const HrMatrix* matrices;
  const HrVector* vectors;
  const HrBuffer* buffers;
  const HrOperand* operands;
  const HrRope* ropes;
  const HrKvShape* layers;
  const HrOp* ops;
  int32_t num_matrices, num_vectors, num_buffers, num_operands, num_ropes, num_layers, num_ops;
  int32_t logits;                                       // operand
  int32_t vocab_size, num_blocks, block_size, kv_kind;  // kv_kind: csrc/layout.h, KvKind
  int32_t max_tokens, max_logit_rows, num_threads;
  int32_t is_profiled;  // measure every op
  int32_t test_fault;   // 0; 1 makes dense products depend on the number of rows, for the test that must notice it
} HrExecutorConfig;

// headrace.kernels.batch.StepBatch: T tokens of B sequences, S rows of logits. `samplings` null: no sampling.
typedef struct HrStepBatch {
  const int32_t *token_ids, *positions, *slot_mapping;  // [T]
  const int32_t *cu_seqlens_q, *seq_lens;               // [B + 1], [B]
  const int32_t* block_tables;                          // [B][block_table_width]
  const int32_t* logit_rows;                            // [S]
  const HrRowSampling* samplings;                       // [S]
  const int32_t* sampling_ids;
  const float* bias_values;
  HrRowResult* results;  // [S]
  int32_t* top_ids;
  double* top_logprobs;
  int32_t num_tokens, num_seqs, num_logits, block_table_width;
  int32_t num_sampling_ids, num_bias_values, num_top, reserved;
} HrStepBatch;

typedef struct HrExecutor HrExecutor;

// Null where something does not fit; hr_last_error says what.
HR_API HrExecutor* hr_executor_create(const HrExecutorConfig* config);
HR_API void hr_executor_destroy(HrExecutor* executor);
// One step. 0, or negative: the batch was refused and nothing has run.
HR_API int hr_executor_run(HrExecutor* executor, const HrStepBatch* batch);
// Copies the last step's logits, [S][vocab_size].
HR_API int hr_executor_logits(const HrExecutor* executor, float* out);
// Nanoseconds spent so far in each op, then in what precedes the first (plans) and in sampling: num_ops + 2 numbers,
// all 0 unless is_profiled. Waiting for the slower threads counts.
HR_API int hr_executor_stats(const HrExecutor* executor, int64_t* nanoseconds, int32_t count);
HR_API const char* hr_executor_isa(const HrExecutor* executor);
// Fills the KV block with NaN (bytes 255), so that a test sees who reads what was freed.
HR_API int hr_executor_poison(HrExecutor* executor, int32_t block);

// ---- Matrices and single linear ops (headrace.kernels.native.matrix); HrMatrix is declared above ----

// Some rows of a matrix that is to be packed: MatrixPart of pack.h.
typedef struct HrMatrixPart {
  const void* packed;
  const float* scales;
  const float* zeros;
  const void* sub_scales;
  const uint8_t* sub_mins;
  int32_t rows, group_size;
} HrMatrixPart;

typedef struct HrUnpackedMatrix {  // UnpackedMatrix of pack.h
  void* packed;
  float* scales;
  float* zeros;
  void* sub_scales;
  uint8_t* sub_mins;
} HrUnpackedMatrix;

// Bytes of a packed matrix (data and the two sizes are not looked at), or -1 where there is no such matrix.
HR_API int64_t hr_matrix_bytes(const HrMatrix* matrix);
// Pack the parts, one below the other, into out (64-byte aligned, hr_matrix_bytes long). 0, or negative.
HR_API int hr_pack_matrix(const HrMatrix* matrix, const HrMatrixPart* parts, int32_t num_parts, uint8_t* out,
                          int64_t out_bytes);
// The inverse, in groups of 32 / scales_per_block: packed as in HrMatrixPart for all rows; scales and zeros,
// [rows][cols / group_size], and what else a part of this kind has; null where there are none. 0, or negative.
HR_API int hr_unpack_matrix(const HrMatrix* matrix, const HrUnpackedMatrix* to);

// Bytes of `rows` x `width` activations quantised to `bits`, or -1 where there are no such.
HR_API int64_t hr_activation_bytes(int64_t rows, int64_t width, int32_t bits);

// What one linear op works on: LinearArgs of kernel_table.h. activations, of num_rows x matrix.cols, for the quantised
// kinds, x for the others; gated takes what a gate makes where out is null. bias is [panels * 16] in the panels' order.
typedef struct HrLinear {
  const uint8_t* activations;
  int64_t activations_bytes;
  const float* x;
  int64_t x_stride;
  const float* bias;
  float* out;
  int64_t out_stride;
  uint8_t* gated;
  int64_t gated_bytes;
  int32_t bits, gated_bits, epilogue, num_rows;
} HrLinear;

// Single ops with the kernels of `isa` (null: those in use), for tests and benches. 0, or negative.
HR_API int hr_quantize_test(const char* isa, const float* x, int64_t x_stride, int32_t rows, int32_t width,
                            int32_t bits, uint8_t* out, int64_t out_bytes);
HR_API int hr_linear_test(const char* isa, const HrMatrix* matrix, const HrLinear* linear, int32_t units_per_call);
HR_API int hr_embed_test(const char* isa, const HrMatrix* table, const int32_t* token_ids, int32_t num_tokens,
                         float scale, float* out, int64_t out_stride);

// Timing loops: `repeats` times the op with every one of the matrices (all of one shape), or a read of all bytes, each
// thread doing its share of each. `seconds` passed, or, with one thread, those that it ran. 0, or negative.
HR_API int hr_linear_bench(const char* isa, const HrMatrix* matrices, int32_t num_matrices, const HrLinear* linear,
                           int32_t num_threads, int32_t repeats, double* seconds);
HR_API int hr_read_bench(const uint8_t* data, int64_t bytes, int32_t num_threads, int32_t repeats, double* seconds);

// ---- Single ops that are no matrix product (headrace.kernels.native.single_ops), with the kernels of `isa` (null:
// those in use). For tests and benches. 0, or negative. ----

// csrc/layout.h, KvLayer: num_blocks blocks of hr_kv_block_bytes each; 64-byte aligned.
typedef struct HrKv {
  uint8_t* data;
  int64_t data_bytes;
  int32_t kind, num_kv_heads, head_dim, block_size, num_blocks, reserved;
} HrKv;

// Bytes of one block with all heads, or -1 where there is no such.
HR_API int64_t hr_kv_block_bytes(int32_t kind, int32_t num_kv_heads, int32_t head_dim, int32_t block_size);

enum HrLaneOperation {  // csrc/lanes_probe.h
  HR_LANES_LOAD_MASKED,
  HR_LANES_STORE_MASKED,
  HR_LANES_ADD,
  HR_LANES_SUB,
  HR_LANES_MUL,
  HR_LANES_DIV,
  HR_LANES_FMA,
  HR_LANES_FNMA,
  HR_LANES_MAX,
  HR_LANES_MIN,
  HR_LANES_ABS,
  HR_LANES_COPYSIGN,
  HR_LANES_SELECT,
  HR_LANES_ROUND_EVEN,
  HR_LANES_EXP2_INT,
  HR_LANES_LOAD_F16,
  HR_LANES_STORE_F16,
  HR_LANES_LOAD_BF16,
  HR_LANES_STORE_BF16,
  HR_LANES_LOAD_I8,
  HR_LANES_STORE_I8,
  HR_LANES_LOAD_I32,
  HR_LANES_STORE_I32,
  HR_LANES_SUM,
  HR_LANES_MAX_LANE,
  HR_LANES_EXP,
  HR_LANES_EXP_WEIGHT,
  HR_LANES_TANH,
  HR_LANES_SILU,
  HR_LANES_GELU_TANH,
  HR_NUM_LANE_OPERATIONS
};
// Each array is num_vectors times 64 bytes: 16 elements each, of whatever width, from the first byte on.
HR_API int hr_lanes_test(const char* isa, int32_t operation, const void* a, const void* b, const void* c, void* out,
                         int64_t num_vectors);

typedef struct HrRmsNorm {  // csrc/kernel_table.h, RmsNormArgs
  const float* x;
  int64_t x_stride;
  const float* weight;
  const int32_t* row_index;
  float* out;
  int64_t out_stride;
  uint8_t* quantized;
  int64_t quantized_bytes;
  int32_t num_x_rows, rows, width, group, bits;
  float eps;
} HrRmsNorm;
HR_API int hr_rms_norm_test(const char* isa, const HrRmsNorm* op);

enum HrElementwise {  // a + b; act(a) * b; cap * tanh(a / cap)
  HR_ELEMENTWISE_ADD,
  HR_ELEMENTWISE_SILU_GATE,
  HR_ELEMENTWISE_GELU_GATE,
  HR_ELEMENTWISE_SOFT_CAP,
  HR_NUM_ELEMENTWISE
};
HR_API int hr_elementwise_test(const char* isa, int32_t kind, const float* a, const float* b, float* out,
                               int64_t stride, int32_t rows, int32_t width, float cap);

// cos_sin: float32 [rows][2 * half].
HR_API int hr_rope_table_test(const char* isa, const float* inv_freq, int32_t half, const int32_t* positions,
                              int32_t rows, float attention_factor, float* cos_sin);

typedef struct HrRopeKv {  // csrc/kernel_table.h, RopeKvArgs
  HrKv kv;
  float *q, *k;
  const float* v;
  int64_t q_stride, k_stride, v_stride;
  const float *q_norm, *k_norm, *cos_sin;
  const int32_t* slots;
  int32_t num_heads, rows;
  float norm_eps;
} HrRopeKv;
HR_API int hr_rope_kv_test(const char* isa, const HrRopeKv* op);

typedef struct HrAttention {  // csrc/kernel_table.h, AttentionArgs
  HrKv kv;
  const float* q;
  int64_t q_stride;
  const int32_t *block_tables, *seq_lens, *cu_seqlens_q;
  float* out;
  int64_t out_stride;
  uint8_t* quantized;
  int64_t quantized_bytes;
  int32_t num_seqs, block_table_width, num_heads, window, bits;
  int32_t num_threads, repeats;  // the whole op, so many times over
  float scale, soft_cap;
} HrAttention;
// The number of items that the op was cut into, or negative. nanoseconds: [repeats] or null.
HR_API int hr_attention_test(const char* isa, const HrAttention* op, int64_t* nanoseconds);

// ---- The pool of threads alone, for tests and bench/ops/pool.py; the executor makes its own ----

typedef struct HrPool HrPool;

// csrc/pool.h, PoolOptions; a time below 0: the default. Null where it cannot be made; hr_last_error says why.
HR_API HrPool* hr_pool_create(int32_t num_threads, int64_t barrier_spin_ns, int64_t idle_spin_ns, int32_t is_pinned,
                              int32_t yields);
HR_API void hr_pool_destroy(HrPool* pool);
HR_API int hr_pool_is_pinned(const HrPool* pool);
// `runs` runs in which each thread counts and passes two barriers, `barriers` times. counts: [num_threads], how often
// each counted. Returns how often a thread saw another that had not counted as far, or negative.
HR_API int64_t hr_pool_barrier_test(HrPool* pool, int32_t runs, int32_t barriers, int64_t* counts);

// Steps like the executor's: `phases` one after the other, of `units` each, which threads share out.
typedef struct HrPoolSteps {
  int64_t unit_work;     // bytes read where it streams, else dependent multiplications
  int64_t memory_bytes;  // that are read round and round
  int64_t gap_ns;        // busy, in the calling thread, between two steps
  int64_t spin_ns;       // before a thread without units sleeps, where they do not meet
  int32_t steps, phases, units, streams;
  int32_t meets;  // at a barrier after each phase (with the pool's own options); else as csrc/units.h says
  int32_t yields;
} HrPoolSteps;
// nanoseconds: [steps]. 0, or negative.
HR_API int hr_pool_steps_test(HrPool* pool, const HrPoolSteps* steps, int64_t* nanoseconds);
