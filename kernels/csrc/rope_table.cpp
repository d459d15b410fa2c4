// cos and sin of a step's positions, shared by all layers that turn alike. Once per step and row, so libm's double
// precision is quick enough (about 1 us per row of a 64-wide head), and no instruction set has its own idea of it.
#include <cmath>

#include "kernel_table.h"

namespace headrace {

// The angle is a product rounded to float32, as the reference has it (kernels/headrace/kernels/rope/reference.py).
void rope_table(const RopeTableArgs& args, int begin, int end) {
  for (int row = begin; row < end; row++) {
    float* cosines = args.cos_sin + (int64_t)row * 2 * args.half;
    float* sines = cosines + args.half;
    for (int i = 0; i < args.half; i++) {
      const float angle = (float)args.positions[row] * args.inv_freq[i];
      cosines[i] = (float)std::cos((double)angle) * args.attention_factor;
      sines[i] = (float)std::sin((double)angle) * args.attention_factor;
    }
  }
}

}  // namespace headrace
