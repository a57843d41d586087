#include "train/anneal.h"

#include <filesystem>

#include "base/files.h"
#include "base/rng.h"
#include "catch.h"
#include "io/checkpoint.h"
#include "io/shard.h"

namespace kiln {
namespace {

namespace fs = std::filesystem;

/// A trunk of 12 steps at a constant rate, with checkpoints at 4, 8 and 12.
struct Trunk {
  fs::path dir;
  Config config;
  std::unique_ptr<Communicator> communicator = make_local_communicator();

  Trunk() {
    std::string pattern = (fs::temp_directory_path() / "kiln-anneal-XXXXXX").string();
    dir = ::mkdtemp(pattern.data());
    TokenShardWriter shard(dir / "train.bin", 64);
    const Philox random(3, 3);
    std::vector<std::int32_t> text;
    for (std::uint64_t i = 0; i < 4000; ++i) text.push_back(static_cast<std::int32_t>(random.bits(i) % 64));
    shard.append(text);
    shard.finish();
    config = parse_config(fmt::format("run: {{dir: {0}/run, seed: 3, threads: 1}}\n"
                                      "model: {{hidden: 32, ffn: 48, heads: 4, layers: 1, vocab: 64}}\n"
                                      "data: {{train: {0}/train.bin, seq_len: 16}}\n"
                                      "batch: {{sequences: 4}}\n"
                                      "schedule: {{kind: constant, peak_lr: 0.01, warmup_steps: 2, total_steps: 12}}\n"
                                      "optimizer: {{kind: adamw}}\n"
                                      "checkpoint: {{every: 4, keep: 0}}\n"
                                      "snapshots: {{every: 2}}\n",
                                      dir.string()),
                          "anneal.yaml", {});
    Trainer(config, *communicator, {.quiet = true}).run();
  }
  ~Trunk() { fs::remove_all(dir); }

  AnnealBranch branch(double final_ratio) const {
    return {.checkpoint = dir / "run" / checkpoint_name(8),
            .end_step = 12,
            .shape = DecayShape::linear,
            .final_ratio = final_ratio,
            .run_dir = dir / "anneal"};
  }
  fs::path run(const AnnealBranch& branch) const {
    int stopped_by = 0;
    return run_anneal(config, branch, *communicator, {.quiet = true}, stopped_by);
  }
};

TEST_CASE("an anneal whose rate does not fall is its trunk, bit for bit: same batches, states and steps") {
  const Trunk trunk;
  const fs::path last = trunk.run(trunk.branch(1.0));
  CHECK(last == trunk.dir / "anneal" / checkpoint_name(12));
  CHECK(hash_file(last / "model.safetensors") ==
        hash_file(trunk.dir / "run" / checkpoint_name(12) / "model.safetensors"));
  CHECK(list_checkpoints(trunk.dir / "anneal").size() == 1);
  CHECK_FALSE(fs::exists(trunk.dir / "anneal" / "snapshots"));
}

TEST_CASE("an anneal falls to its ratio over exactly its steps, and is trained once") {
  const Trunk trunk;
  const Config config = anneal_config(trunk.config, trunk.branch(0.1));
  CHECK(learning_rate(config.schedule, 8) == 0.01);
  CHECK(learning_rate(config.schedule, 9) == Approx(0.01 * (1 - 0.9 / 4)));
  CHECK(learning_rate(config.schedule, 12) == Approx(0.001));
  const fs::path last = trunk.run(trunk.branch(0.1));
  CHECK(hash_file(last / "model.safetensors") !=
        hash_file(trunk.dir / "run" / checkpoint_name(12) / "model.safetensors"));
  const auto written = fs::last_write_time(last / "model.safetensors");
  CHECK(trunk.run(trunk.branch(0.1)) == last);
  CHECK(fs::last_write_time(last / "model.safetensors") == written);
}

TEST_CASE("a branch takes no averages and is not rescued") {
  const Trunk trunk;
  Config rescued = trunk.config;
  rescued.averages = {{.every = 2, .count = 2}};
  rescued.run.on_divergence = OnDivergence::merge;
  rescued.rescue.spike = 1.5;
  validate(rescued);
  const Config config = anneal_config(rescued, trunk.branch(0.1));
  CHECK(config.averages.empty());
  CHECK(config.run.on_divergence == OnDivergence::stop);
  CHECK_FALSE(config.rescue.spike.has_value());
  CHECK(config.checkpoint.keep == 1);
}

TEST_CASE("a branch that cannot be is refused") {
  const Trunk trunk;
  AnnealBranch branch = trunk.branch(0.1);
  branch.end_step = 8;
  CHECK_THROWS_WITH(anneal_config(trunk.config, branch), ContainsSubstring("has no steps"));
  branch.end_step = 12;
  branch.checkpoint = trunk.dir / "run" / checkpoint_name(1);
  CHECK_THROWS_WITH(anneal_config(trunk.config, branch), ContainsSubstring("lies in the warm-up"));
  branch.checkpoint = trunk.dir / "merged";
  CHECK_THROWS_WITH(anneal_config(trunk.config, branch), ContainsSubstring("is no checkpoint of a run"));
}

}  // namespace
}  // namespace kiln
