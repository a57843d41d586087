#include "train/op_bench.h"

#include "catch.h"
#include "model/llama_config.h"

namespace kiln::test {
namespace {

TEST_CASE("a benchmark of a preset's GEMMs on a GPU takes whole sequences") {
  for (const std::string_view preset : llama_preset_names()) {
    INFO(preset);
    const std::int64_t tokens = gpu_bench_tokens(llama_preset(preset).hidden);
    CHECK(tokens % 256 == 0);
    CHECK(tokens >= 16384);
    CHECK(tokens <= 131072);
  }
}

}  // namespace
}  // namespace kiln::test
