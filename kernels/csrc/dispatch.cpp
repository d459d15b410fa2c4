// Which table of kernels this machine uses, decided once, and the library's identity. Called from Python at load.
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <cstdlib>
#include <cstring>
#include <string>

#include "headrace_native.h"
#include "kernel_table.h"

#ifndef HR_SOURCE_HASH
#define HR_SOURCE_HASH ""
#endif

namespace headrace {
namespace {

struct Candidate {
  const char* name;
  const KernelTable* (*table)();
  bool (*can_run)();
};

bool always() { return true; }
#if defined(__x86_64__)
bool has_f16c() {  // clang 14 does not know the name
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") &&
         has_f16c();
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
bool has_avx512vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }
#endif

// Best first.
const Candidate kCandidates[] = {
#if defined(__x86_64__)
    {"avx512vnni", avx512vnni_kernels, has_avx512vnni},
    {"avx512", avx512_kernels, has_avx512},
    {"avx2", avx2_kernels, has_avx2},
#elif defined(__aarch64__)
    {"neon", neon_kernels, always},
#endif
    {"generic", generic_kernels, always},
};

std::string names(bool usable_only) {
  std::string joined;
  for (const Candidate& candidate : kCandidates) {
    if (usable_only && !candidate.can_run()) continue;
    if (!joined.empty()) joined += ",";
    joined += candidate.name;
  }
  return joined;
}

}  // namespace

const KernelTable* choose_kernels(const char* forced) {
  for (const Candidate& candidate : kCandidates) {
    if (forced && *forced && std::strcmp(forced, candidate.name) != 0) continue;
    if (candidate.can_run()) return candidate.table();
  }
  return nullptr;
}

}  // namespace headrace

int hr_abi_version(void) { return HR_ABI_VERSION; }

const char* hr_source_hash(void) { return HR_SOURCE_HASH; }

const char* hr_isa_name(void) {
  const headrace::KernelTable* table = headrace::choose_kernels(std::getenv("HEADRACE_NATIVE_ISA"));
  return table ? table->name : "";
}

const char* hr_isa_names_compiled(void) {
  static const std::string joined = headrace::names(false);
  return joined.c_str();
}

const char* hr_isa_names_usable(void) {
  static const std::string joined = headrace::names(true);
  return joined.c_str();
}
