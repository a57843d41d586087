#include "merge/merge_bench.h"

#include <cmath>

#include "merge_fixture.h"

using namespace kiln;

TEST_CASE("the bench of a merge reads every tensor, and writes nothing") {
  const TempDirectory temp;
  write_hf_directory(temp / "checkpoint-1", random_model(DType::f32, 1));
  write_sharded_directory(temp / "checkpoint-2", random_model(DType::f32, 2));
  write_checkpoint(temp / "step_00000003", random_model(DType::bf16, 3), 3);
  const std::uint64_t elements = 37 * 129 + 41 * 101 + 5;
  const MergeBench bench = bench_merge({temp / "checkpoint-1", temp / "checkpoint-2", temp / "step_00000003"}, 2);
  CHECK(bench.bytes == elements * (4 + 4 + 2));
  CHECK(bench.read_seconds > 0);
  CHECK(bench.average_seconds > 0);
  CHECK(bench.hashed_seconds > 0);
  CHECK(bench.average_fraction > 0);
  CHECK(bench.hashed_fraction > 0);
  check_only(temp.path(), {"checkpoint-1", "checkpoint-2", "step_00000003"});
  CHECK_THROWS_WITH(bench_merge({temp / "checkpoint-1"}, 0), ContainsSubstring("measure 1 or more"));
}

TEST_CASE("the bench of a merge refuses weights that are not finite, as a merge does") {
  const TempDirectory temp;
  TestModel model = random_model(DType::f32, 1);
  model["model.norm.weight"].values[1] = std::nan("");
  write_hf_directory(temp / "checkpoint-1", model);
  CHECK_THROWS_WITH(bench_merge({temp / "checkpoint-1"}, 1), ContainsSubstring("'model.norm.weight' holds nan"));
}
