// One HrOp after the other to an Op: every index and width is checked here, and nowhere later. Called by program.cpp.
#include "program_ops.h"

#include "error.h"
#include "kv.h"
#include "units.h"

namespace headrace {
namespace {

// Resolves one op. The first thing that does not fit is kept as the sentence; what was asked for is then a dummy.
class Resolver {
 public:
  Resolver(const HrExecutorConfig& config, Program& program, int index)
      : config_(config), program_(program), in_(config.ops[index]), index_(index) {}

  int resolve(Op& op);

 private:
  void refuse(const char* what) {
    if (!failed_) fail("op %d (kind %d): %s", index_, in_.kind, what);
    failed_ = true;
  }
  void expect(bool fits, const char* what) {
    if (!fits) refuse(what);
  }
  static bool has(int32_t index) { return index != -1; }

  bool is_operand(int32_t index) {
    const bool exists = index >= 0 && index < config_.num_operands;
    expect(exists, "no such operand");
    return exists;
  }
  bool is_quantized_operand(int32_t index) { return is_operand(index) && program_.quant_buffer[index] >= 0; }
  bool has_logit_rows(int32_t index) {
    return is_operand(index) && config_.buffers[config_.operands[index].buffer].is_logits;
  }
  Floats floats(int32_t index) {
    if (!is_operand(index) || is_quantized_operand(index)) {
      refuse("an operand is not float32");
      return Floats();
    }
    return program_.operands[index];
  }
  const Activations* activations(int32_t index) {
    if (!is_quantized_operand(index)) {
      refuse("an operand is not quantised");
      return &nothing_;
    }
    return &program_.activations[program_.quant_buffer[index]];
  }
  const PackedMatrix* matrix() {
    if (in_.matrix < 0 || in_.matrix >= config_.num_matrices) {
      refuse("no such matrix");
      return &no_matrix_;
    }
    return &program_.matrices[in_.matrix];
  }
  const float* vector(int32_t index, int64_t size) {
    if (index < 0 || index >= config_.num_vectors || program_.vector_sizes[index] != size) {
      refuse("a vector is missing or of another length");
      return nullptr;
    }
    return program_.vectors[index];
  }
  const KvLayer* layer() {
    if (in_.layer < 0 || in_.layer >= config_.num_layers) {
      refuse("no such layer");
      return nullptr;
    }
    return &program_.layers[in_.layer];
  }

  void same_rows(int32_t a, int32_t b) { expect(has_logit_rows(a) == has_logit_rows(b), "operands differ in rows"); }
  void outputs(int32_t width, float*& out, int64_t& stride, const Activations*& quantized);

  void embed(EmbedArgs& args);
  void linear(Op& op);
  void norm(RmsNormArgs& args);
  void rope_kv(RopeKvArgs& args);
  void attention(Op& op);
  void elementwise(ElementwiseArgs& args);
  int32_t plan_of(const KvLayer& kv);

  const HrExecutorConfig& config_;
  Program& program_;
  const HrOp& in_;
  const int index_;
  bool failed_ = false;
  const Activations nothing_ = {nullptr, 8, 0};
  const PackedMatrix no_matrix_ = {};
};

// The float32 and/or quantised output of a norm, an attention or a gated product.
void Resolver::outputs(int32_t width, float*& out, int64_t& stride, const Activations*& quantized) {
  out = nullptr;
  stride = 0;
  quantized = nullptr;
  expect(has(in_.out) || has(in_.quantized), "there is no output");
  if (has(in_.out)) {
    const Floats to = floats(in_.out);
    expect(to.width == width, "the output has another width");
    out = to.data;
    stride = to.stride;
  }
  if (has(in_.quantized)) {
    quantized = activations(in_.quantized);
    expect(quantized->width == width, "the quantised output has another width");
  }
  if (has(in_.out) && has(in_.quantized)) same_rows(in_.out, in_.quantized);
}

void Resolver::embed(EmbedArgs& args) {
  const PackedMatrix* table = matrix();
  const Floats out = floats(in_.out);
  expect(!table->is_gated && table->cols == out.width && !out.is_logits, "the table does not fit");
  args = {table, nullptr, in_.scale, out.data, out.stride};
  if (program_.max_token_id >= table->rows) program_.max_token_id = table->rows - 1;
}

void Resolver::linear(Op& op) {
  const PackedMatrix* weight = matrix();
  LinearArgs& args = op.linear;
  expect(in_.epilogue >= 0 && in_.epilogue <= 3, "unknown epilogue");
  const Epilogue epilogue = (Epilogue)in_.epilogue;
  const bool is_gate = epilogue == Epilogue::kSiluGate || epilogue == Epilogue::kGeluGate;
  expect(is_gate == (weight->is_gated != 0), "the matrix and the epilogue differ in gates");
  args = LinearArgs();
  args.weight = weight;
  args.epilogue = op.epilogue = epilogue;
  if (is_quantized(weight->kind)) {
    args.activations = activations(in_.a);
    expect(args.activations->width == weight->cols, "the input has another width");
  } else {
    const Floats x = floats(in_.a);
    expect(x.width == weight->cols, "the input has another width");
    args.x = x.data;
    args.x_stride = x.stride;
  }
  outputs(is_gate ? weight->rows / 2 : weight->rows, args.out, args.out_stride, args.gated);
  expect(is_gate ? !(args.out && args.gated) : !args.gated, "a product has one output");
  expect(!args.x || args.x != args.out, "a product cannot write to its input");
  if (has(in_.vector)) args.bias = vector(in_.vector, weight->rows);
  expect(!is_gate || !args.bias, "a gated product has no bias");
  same_rows(in_.a, has(in_.out) ? in_.out : in_.quantized);
  op.units = (int32_t)num_linear_units(*weight);
  expect((int64_t)op.units * program_.max_tokens <= Units::kMost, "the product is too large for a step");
  op.is_logits = has_logit_rows(in_.a);
}

void Resolver::norm(RmsNormArgs& args) {
  const Floats x = floats(in_.a);
  args = RmsNormArgs();
  args.x = x.data;
  args.x_stride = x.stride;
  args.eps = in_.eps;
  args.width = x.width;
  args.group = in_.group;
  expect(in_.group > 0 && x.width % in_.group == 0, "the groups do not fit");
  args.weight = vector(in_.vector, in_.group);
  outputs(x.width, args.out, args.out_stride, args.quantized);
  const int32_t to = has(in_.out) ? in_.out : in_.quantized;
  if (in_.selects_rows) {
    expect(!x.is_logits && has_logit_rows(to), "rows are selected from tokens for logits");
    args.row_index = program_.row_index;
  } else {
    same_rows(in_.a, to);
  }
}

void Resolver::rope_kv(RopeKvArgs& args) {
  args = RopeKvArgs();
  const int head_dim = in_.group;
  expect(head_dim > 0 && head_dim <= kMaxHeadDim, "the head is too wide");
  if (failed_) return;
  program_.head_shapes[index_] = {nullptr, 0, 0, KvKind::kF32, 1, head_dim, program_.block_size};
  args.kv = &program_.head_shapes[index_];
  if (has(in_.a)) {
    const Floats q = floats(in_.a);
    expect(!q.is_logits && q.width % head_dim == 0, "q does not fit");
    args.q = q.data;
    args.q_stride = q.stride;
    args.num_heads = q.width / head_dim;
  }
  if (has(in_.b)) {
    const Floats k = floats(in_.b), v = floats(in_.c);
    args.kv = layer();
    if (failed_) return;
    const bool fits = args.kv->head_dim == head_dim && k.width == args.kv->num_kv_heads * head_dim;
    expect(fits && v.width == k.width && !k.is_logits && !v.is_logits, "k and v do not fit");
    args.k = k.data;
    args.v = v.data;
    args.k_stride = k.stride;
    args.v_stride = v.stride;
  }
  if (has(in_.vector)) args.q_norm = vector(in_.vector, head_dim);
  if (has(in_.vector2)) args.k_norm = vector(in_.vector2, head_dim);
  args.norm_eps = in_.eps;
  if (!has(in_.rope)) return;
  const bool exists = in_.rope >= 0 && in_.rope < config_.num_ropes;
  expect(exists && config_.ropes[in_.rope].half * 2 == head_dim, "no such rotation");
  if (!failed_) args.cos_sin = program_.ropes[in_.rope].args.cos_sin;
}

int32_t Resolver::plan_of(const KvLayer& kv) {
  const PlanKey key = {in_.window, in_.num_heads, kv.num_kv_heads, kv.head_dim};
  for (size_t i = 0; i < program_.plans.size(); i++)
    if (program_.plans[i]->key == key) return (int32_t)i;
  program_.plans.push_back(std::make_unique<Plan>());
  Plan& plan = *program_.plans.back();
  plan.key = key;
  plan.shapes = AttentionArgs();
  plan.shapes.kv = &kv;
  plan.shapes.num_heads = in_.num_heads;
  plan.shapes.window = in_.window;
  reserve_attention_plan(plan.plan, kv, in_.num_heads, program_.max_tokens, program_.num_threads);
  return (int32_t)program_.plans.size() - 1;
}

void Resolver::attention(Op& op) {
  AttentionArgs& args = op.attention;
  args = AttentionArgs();
  const Floats q = floats(in_.a);
  args.kv = layer();
  if (failed_) return;
  expect(in_.num_heads > 0 && in_.num_heads % args.kv->num_kv_heads == 0, "the heads do not fit");
  expect(q.width == in_.num_heads * args.kv->head_dim && !q.is_logits, "q does not fit");
  expect(in_.window >= 0, "the window is negative");
  // Each head quantises its own groups.
  expect(!has(in_.quantized) || args.kv->head_dim % kGroup == 0, "a group would span two heads");
  outputs(q.width, args.out, args.out_stride, args.quantized);
  if (failed_) return;
  args.q = q.data;
  args.q_stride = q.stride;
  args.num_heads = in_.num_heads;
  args.window = in_.window;
  args.scale = in_.scale;
  args.soft_cap = in_.soft_cap;
  op.plan = plan_of(*args.kv);
  args.plan = &program_.plans[op.plan]->plan;
}

// Also the selection of rows, which is a copy.
void Resolver::elementwise(ElementwiseArgs& args) {
  args = ElementwiseArgs();
  const bool in_place = in_.kind == HR_SOFT_CAP;
  const Floats a = floats(in_.a), out = in_place ? a : floats(in_.out);
  expect(a.width == out.width, "the output has another width");
  if (in_.kind == HR_SELECT)
    expect(!a.is_logits && out.is_logits, "rows are selected from tokens for logits");
  else if (!in_place)
    same_rows(in_.a, in_.out);
  args.a = a.data;
  args.a_stride = a.stride;
  args.out = out.data;
  args.out_stride = out.stride;
  args.width = a.width;
  args.cap = in_.soft_cap;
  if (in_.kind == HR_ADD || in_.kind == HR_SILU_GATE || in_.kind == HR_GELU_GATE) {
    const Floats b = floats(in_.b);
    expect(b.width == a.width, "the operands differ in width");
    same_rows(in_.a, in_.b);
    args.b = b.data;
    args.b_stride = b.stride;
  }
}

int Resolver::resolve(Op& op) {
  op.kind = (HrOpKind)in_.kind;
  op.units = 0;
  op.plan = -1;
  op.epilogue = Epilogue::kStore;
  op.is_logits = false;
  switch (in_.kind) {
    case HR_EMBED:
      embed(op.embed);
      break;
    case HR_QUANTIZE: {
      const Floats x = floats(in_.a);
      op.quantize = {x.data, x.stride, activations(in_.quantized)};
      expect(x.width == op.quantize.quantized->width, "the quantised output has another width");
      same_rows(in_.a, in_.quantized);
      break;
    }
    case HR_LINEAR:
      linear(op);
      break;
    case HR_NORM:
      norm(op.norm);
      break;
    case HR_ROPE_KV:
      rope_kv(op.rope_kv);
      break;
    case HR_ATTENTION:
      attention(op);
      break;
    case HR_ADD:
    case HR_SILU_GATE:
    case HR_GELU_GATE:
    case HR_SELECT:
    case HR_SOFT_CAP:
      elementwise(op.elementwise);
      break;
    default:
      refuse("unknown kind");
  }
  if (failed_) return -1;
  const int32_t written = has(in_.out) ? in_.out : has(in_.quantized) ? in_.quantized : in_.a;
  if (in_.kind != HR_ROPE_KV && in_.kind != HR_LINEAR) op.is_logits = has_logit_rows(written);
  return 0;
}

}  // namespace

int resolve_ops(const HrExecutorConfig& config, Program& program) {
  program.max_token_id = program.vocab_size - 1;
  program.head_shapes.resize(config.num_ops);
  program.ops.resize(config.num_ops);
  for (int i = 0; i < config.num_ops; i++)
    if (Resolver(config, program, i).resolve(program.ops[i])) return -1;
  if (config.logits < 0 || config.logits >= config.num_operands || program.quant_buffer[config.logits] >= 0)
    return fail("there are no logits");
  program.logits = program.operands[config.logits];
  if (!program.logits.is_logits || program.logits.width != config.vocab_size)
    return fail("the logits are not as wide as the vocabulary");
  return 0;
}

}  // namespace headrace
