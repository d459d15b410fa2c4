// Rows of the weight kinds with super-blocks to and from panels (layout.h). Part of pack.cpp.
#pragma once

#include "pack.h"

namespace headrace {

// Writes every byte of one row, `lane` of its panel; no two rows share a byte.
void pack_super_row(const PackedMatrix& m, const MatrixPart& part, int64_t row, int lane, uint8_t* panel);

// Of a row that pads: weights of zero.
void pack_super_padding(const PackedMatrix& m, int lane, uint8_t* panel);

void unpack_super_row(const PackedMatrix& m, const uint8_t* panel, int lane, int64_t row, const UnpackedMatrix& to);

}  // namespace headrace
