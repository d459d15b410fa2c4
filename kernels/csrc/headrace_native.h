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

#define HR_ABI_VERSION 1

HR_API int hr_abi_version(void);
HR_API const char* hr_source_hash(void);        // of the sources that it was compiled from
HR_API const char* hr_isa_name(void);           // of the table in use, e.g. "avx512vnni"; "" where none can run
HR_API const char* hr_isa_names_compiled(void); // comma-separated
HR_API const char* hr_isa_names_usable(void);   // of those, what this CPU runs
HR_API const char* hr_last_error(void);
