// Compares every table of kernels that this CPU runs with plain C++ (generic), bit by bit, on random data. A program
// for where the Python op tests cannot go: `make native-neon` runs it under an emulator. Exit status 1 where bits
// differ.
#include "selftest.h"

namespace headrace::selftest {

int num_compared = 0, num_different = 0;

const std::vector<const KernelTable*>& tables() {
  static const std::vector<const KernelTable*> usable = [] {
    std::vector<const KernelTable*> found = {choose_kernels("generic")};
    for (const char* name : {"avx2", "avx512", "avx512vnni", "neon"})
      if (const KernelTable* table = choose_kernels(name)) found.push_back(table);
    return found;
  }();
  return usable;
}

}  // namespace headrace::selftest

int main() {
  using namespace headrace::selftest;
  Random random;
  test_linear(random);
  test_rows(random);
  test_attention(random);
  test_sample(random);
  std::printf("kernels:");
  for (const headrace::KernelTable* table : tables()) std::printf(" %s", table->name);
  std::printf("\n%d passed, %d failed\n", num_compared - num_different, num_different);
  return num_different != 0 || num_compared == 0;
}
