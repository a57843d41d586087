// Tests tagged [gpu] need one: without it the others run, and the program ends with the code that CTest shows as
// skipped.
#define CATCH_CONFIG_RUNNER  // Catch2 2 keeps its runner in this file; Catch2 3 links its own
#include <cstdlib>
#include <filesystem>

#include "catch.h"
#include "kernels/cuda_backend.h"

int main(int argc, char** argv) {
  constexpr int kSkipped = 77;  // SKIP_RETURN_CODE in tests/CMakeLists.txt
  if (kiln::cuda::device_count() == 0) {
    fmt::print("SKIPPED: all tests of kernels/ but a few need a CUDA device ({})\n", kiln::cuda::why_no_device());
    const char* const others[] = {argv[0], "~[gpu]"};
    const int failed = Catch::Session().run(2, others);
    return failed == 0 ? kSkipped : failed;
  }
  // GEMM plans of the tests stay out of the user's cache, and hold for all tests of one run.
  std::string pattern = (std::filesystem::temp_directory_path() / "kiln-kernels-XXXXXX").string();
  const std::filesystem::path cache = ::mkdtemp(pattern.data());
  ::setenv("KILN_CACHE_DIR", cache.c_str(), 1);
  const int failed = Catch::Session().run(argc, argv);
  std::filesystem::remove_all(cache);
  return failed;
}
