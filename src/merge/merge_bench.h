#pragma once
#include <cstdint>
#include <filesystem>
#include <vector>

namespace kiln {

/// Seconds that parts of a merge take over files which the page cache holds. Of each the median over the rounds.
struct MergeBench {
  std::uint64_t bytes = 0;      // of tensors, read once
  double read_seconds = 0;      // preads of 1 MiB, on all threads: what reading alone takes
  double average_seconds = 0;   // reading and averaging; the result is thrown away
  double hashed_seconds = 0;    // reading, hashing and averaging; the result is thrown away
  double average_fraction = 0;  // median over rounds of read_seconds / average_seconds
  double hashed_fraction = 0;
};

/// Measures the mean of checkpoints as merge_checkpoints makes it, in fp32, without writing it. A round is reading,
/// averaging, averaging with hashes, one after the other; the first round, which may fill the page cache, does not
/// count. error  usage: fewer than 1 round; those of open_inputs
MergeBench bench_merge(const std::vector<std::filesystem::path>& directories, int rounds);

}  // namespace kiln
