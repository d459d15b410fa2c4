// See error.h.
#include "error.h"

#include <cstdarg>
#include <cstdio>

#include "headrace_native.h"

namespace headrace {
namespace {

thread_local char last_error[512] = "";

}  // namespace

int fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(last_error, sizeof last_error, format, arguments);
  va_end(arguments);
  return -1;
}

}  // namespace headrace

const char* hr_last_error(void) { return headrace::last_error; }
