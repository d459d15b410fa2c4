// The sentence behind a C function that failed, kept per thread until the next one. Used by every abi_*.cpp.
#pragma once

namespace headrace {

// Keep a sentence (printf's format, cut at 511 bytes) for hr_last_error; returns -1, what the function then returns.
__attribute__((format(printf, 1, 2))) int fail(const char* format, ...);

}  // namespace headrace
