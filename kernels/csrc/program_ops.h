// Resolving the ops of a program (program_ops.cpp), apart from its memory (program.cpp).
#pragma once

#include "program.h"

namespace headrace {

// Fills program.ops, plans and logits from config.ops; the rest of the program stands. 0, or -1 with a sentence.
int resolve_ops(const HrExecutorConfig& config, Program& program);

}  // namespace headrace
