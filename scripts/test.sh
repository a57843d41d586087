#!/usr/bin/env bash
# Everything that must hold: installs what is missing, builds, checks the format, runs every test, compiles the CUDA
# kernels where nvcc is found, and runs the CPU tests again under AddressSanitizer and UndefinedBehaviorSanitizer. Ends
# with one line that says so.
set -euo pipefail
cd "$(dirname "$0")/.."
jobs=$(nproc)
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 CTEST_OUTPUT_ON_FAILURE=1

scripts/setup.sh

# clang-format's rules change between major versions; the sources follow version 14 (Debian 12).
if clang-format --version 2>/dev/null | grep -q 'version 14\.'; then
  git ls-files 'src/*.h' 'src/*.cpp' 'tests/*.h' 'tests/*.cpp' 'kernels/*.h' 'kernels/*.cpp' 'kernels/*.cu' 'kernels/*.cuh' |
    xargs -r clang-format --dry-run -Werror
  echo "format: clean"
else
  echo "format: SKIPPED, needs clang-format 14, found $(clang-format --version 2>/dev/null || echo none)"
fi

cmake --preset release
cmake --build --preset release -j "$jobs"
ctest --test-dir build/release -j 1

# The kernels compile wherever there is a CUDA compiler; their tests run where there is a device, and are skipped elsewhere.
if command -v nvcc >/dev/null || [ -x /usr/local/cuda/bin/nvcc ]; then
  cmake --preset cuda
  cmake --build --preset cuda -j "$jobs" --target kiln test_kernels
  ctest --test-dir build/cuda -L gpu
else
  echo "cuda: SKIPPED, there is no nvcc"
fi

# Debug information and optimisation for the rest would only cost time here.
cmake --preset asan -DCMAKE_CXX_FLAGS_RELWITHDEBINFO='-O1 -g1'
cmake --build --preset asan -j "$jobs"
# Leaks of the MPI library itself are not ours; everything else must be clean.
LSAN_OPTIONS=suppressions=$PWD/tests/lsan.supp ctest --test-dir build/asan -j 1 -LE mpi

echo "all tests passed"
