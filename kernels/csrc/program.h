// The executor's own form of a fused program: every pointer resolved once, so that a step only fills in row counts.
// Made by program.cpp from an HrExecutorConfig, walked by executor.cpp.
#pragma once

#include <memory>
#include <vector>

#include "attention_plan.h"
#include "headrace_native.h"
#include "kernel_table.h"

namespace headrace {

// Anonymous memory: zero, on a page's boundary, and free of cost where it is never touched.
class Memory {
 public:
  Memory() = default;
  ~Memory();
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  bool map(size_t bytes);       // once
  bool map_huge(size_t bytes);  // the same in huge pages where the system has them: touched 2 MiB at a time
  uint8_t* data() const { return data_; }

 private:
  uint8_t* data_ = nullptr;
  void* mapped_ = nullptr;
  size_t bytes_ = 0;
};

// Columns of a float32 buffer; rows are `stride` floats apart and start on a cache line.
struct Floats {
  float* data = nullptr;
  int64_t stride = 0;
  int32_t width = 0;
  bool is_logits = false;
};

struct Op {
  HrOpKind kind;
  bool is_logits;  // has a row per wanted row of logits, else per token
  int32_t units;   // where they do not depend on the step
  int32_t plan;    // of an attention
  Epilogue epilogue;
  union {
    LinearArgs linear;
    RmsNormArgs norm;
    RopeKvArgs rope_kv;
    AttentionArgs attention;
    ElementwiseArgs elementwise;
    EmbedArgs embed;
    QuantizeArgs quantize;
  };
};

struct Rope {
  std::vector<float> inv_freq;
  RopeTableArgs args;
};

// Attentions that cut a step alike share a plan.
struct PlanKey {
  int32_t window, num_heads, num_kv_heads, head_dim;
  bool operator==(const PlanKey& o) const {
    return window == o.window && num_heads == o.num_heads && num_kv_heads == o.num_kv_heads && head_dim == o.head_dim;
  }
};

struct Plan {
  PlanKey key;
  AttentionArgs shapes;  // what plan_attention reads
  AttentionPlan plan;
};

struct Program {
  int32_t vocab_size, num_blocks, block_size, max_tokens, max_logit_rows, num_threads, max_token_id;
  std::vector<PackedMatrix> matrices;
  std::vector<const float*> vectors;
  std::vector<int64_t> vector_sizes;
  std::vector<Activations> activations;  // by buffer; of the quantised ones
  std::vector<Floats> operands;
  std::vector<int32_t> quant_buffer;  // by operand: the buffer where that is quantised, else -1
  std::vector<Rope> ropes;
  std::vector<KvLayer> layers;
  std::vector<KvLayer> head_shapes;  // by op: for a rotation that belongs to no layer
  std::vector<std::unique_ptr<Plan>> plans;
  std::vector<Op> ops;
  Floats logits;
  Memory weights, vector_memory, arena, kv;
  int32_t* row_index;                                       // [max_logit_rows], of the step
  std::vector<uint8_t*> attention_scratch, sample_scratch;  // by thread
};

// Checks everything that a step will rely on; 0, or -1 with a sentence for hr_last_error.
int build_program(const HrExecutorConfig& config, Program& program);

// Checks a step's batch against the program; 0, or -1 with a sentence.
int check_batch(const Program& program, const HrStepBatch& batch);

}  // namespace headrace
