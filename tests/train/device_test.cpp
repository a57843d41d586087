#include "train/device.h"

#include "catch.h"

namespace kiln::test {
namespace {

std::int64_t multiple_of(const LlamaConfig& model, const OptimizerOptions& optimizer) {
  return layout_for_codes(model, optimizer, StorageLayout(DType::bf16, 64)).multiple;
}

TEST_CASE("a device pads to eights alone where codes would have other blocks than those of files") {
  const LlamaConfig model = llama_preset("llama_60m");
  REQUIRE(model.ffn % 64 == 32);
  REQUIRE(model.ffn > model.hidden);
  for (const OptimizerKind kind : optimizer_kinds()) {
    INFO(to_string(kind));
    if (kind != OptimizerKind::adam8bit) {
      CHECK(multiple_of(model, {.kind = kind}) == 64);
      CHECK(multiple_of(model, {.kind = kind, .states = StatePrecision::bf16}) == 64);
    }
    CHECK(multiple_of(model, {.kind = kind, .states = StatePrecision::int8}) == 8);
  }
  const OptimizerOptions basis{.kind = OptimizerKind::fira, .projector_states = StatePrecision::int8};
  CHECK(multiple_of(model, basis) == 64);  // of the shorter side, which has no padding
  LlamaConfig narrow = model;
  narrow.ffn = 200;
  CHECK(multiple_of(narrow, basis) == 8);
  LlamaConfig words = model;
  words.vocab = 1000;
  CHECK(multiple_of(words, {.kind = OptimizerKind::fira_plus}) == 8);  // whose embedding has codes
}

}  // namespace
}  // namespace kiln::test
