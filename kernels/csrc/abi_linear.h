// A linear op as C callers give it, checked and in the kernels' terms. Used by abi_linear.cpp, bench_linear.cpp and
// program.cpp.
#pragma once

#include "headrace_native.h"
#include "kernel_table.h"

namespace headrace {

// 0, or negative with a sentence (error.h).
int check_linear(const HrMatrix* matrix, const HrLinear* op);

// The table called `isa` (null: the one in use), or null with a sentence where it cannot run here.
const KernelTable* kernels_of(const char* isa);

// 0, or negative with a sentence: whether there is such a matrix, and its data are whole and aligned.
int check_data(const HrMatrix* matrix);

// What the executor and the kernels call a matrix that check_data found sound; panel_bytes is filled in.
PackedMatrix packed_matrix(const HrMatrix& matrix);

// The arguments of one op that check_linear found sound. They point into this object.
struct LinearOp {
  LinearOp(const HrMatrix& m, const HrLinear& op);
  LinearOp(const LinearOp&) = delete;
  LinearOp& operator=(const LinearOp&) = delete;

  PackedMatrix matrix;
  Activations activations;
  Activations gated;
  LinearArgs args;
};

}  // namespace headrace
