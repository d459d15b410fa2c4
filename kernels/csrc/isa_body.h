// The body of every isa_*.cpp: all kernels, compiled for one instruction set, and their table.
#pragma once

#include "kernel_table.h"
#include "simd.h"
// The kernels, each in the namespace headrace::HR_ISA.
#include "linear.h"
#include "embed.h"
#include "elementwise.h"
#include "rope.h"
#include "attention.h"
#include "lanes_probe.h"
#include "sample.h"

#define HR_STRINGIFY_(x) #x
#define HR_STRINGIFY(x) HR_STRINGIFY_(x)

namespace headrace::HR_ISA {

inline const KernelTable kTable = {
    HR_STRINGIFY(HR_ISA),
    linear,
    embed,
    quantize,
    rms_norm,
    rope_table,
    rope_kv,
    attention,
    add_rows,
    silu_gate,
    gelu_gate,
    soft_cap,
    sample_rows,
    probe_lanes,
};

}  // namespace headrace::HR_ISA
