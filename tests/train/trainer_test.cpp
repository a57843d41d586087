#include "train/trainer.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <new>
#include <numeric>
#include <optional>

#include "base/rng.h"
#include "catch.h"
#include "core/parallel.h"
#include "io/checkpoint.h"
#include "io/shard.h"
#include "model/llama_run.h"
#include "optim/low_rank.h"
#include "optim/squared_sum.h"
#include "train/divergence.h"

// Heap allocations of the whole process, counted while a test asks for it: operator new and malloc alike. The
// sanitizers bring their own allocator, which must not be replaced.
#if !defined(__SANITIZE_ADDRESS__)
namespace {
std::atomic<long> allocations{0};
std::atomic<bool> counting{false};
}  // namespace
extern "C" {
void* __libc_malloc(std::size_t size);
void* __libc_calloc(std::size_t count, std::size_t size);
void* __libc_realloc(void* old, std::size_t size);
void* __libc_memalign(std::size_t alignment, std::size_t size);

static void count_allocation() {
  if (counting.load(std::memory_order_relaxed)) allocations.fetch_add(1, std::memory_order_relaxed);
}
void* malloc(std::size_t size) {
  count_allocation();
  return __libc_malloc(size);
}
void* calloc(std::size_t count, std::size_t size) {
  count_allocation();
  return __libc_calloc(count, size);
}
void* realloc(void* old, std::size_t size) {
  count_allocation();
  return __libc_realloc(old, size);
}
void* aligned_alloc(std::size_t alignment, std::size_t size) {
  count_allocation();
  return __libc_memalign(alignment, size);
}
}
#endif

namespace kiln {
namespace {

namespace fs = std::filesystem;

struct TemporaryDirectory {
  fs::path path;
  TemporaryDirectory() {
    std::string pattern = (fs::temp_directory_path() / "kiln-trainer-XXXXXX").string();
    path = ::mkdtemp(pattern.data());
  }
  ~TemporaryDirectory() { fs::remove_all(path); }
};

/// A shard of tokens with some structure, so that there is something to learn.
void write_shard(const fs::path& path, std::int64_t tokens, std::int64_t vocab) {
  TokenShardWriter writer(path, vocab);
  const Philox random(3, 3);
  std::vector<std::int32_t> text;
  std::int64_t token = 1;
  for (std::int64_t i = 0; i < tokens; ++i) {
    token = (token * 5 + static_cast<std::int64_t>(random.bits(static_cast<std::uint64_t>(i)) % 3)) % vocab;
    text.push_back(static_cast<std::int32_t>(token));
  }
  writer.append(text);
  writer.finish();
}

std::string config_text(const fs::path& dir, const std::string& optimizer) {
  return fmt::format(
      "run: {{dir: {0}/run, seed: 3}}\n"
      "model: {{hidden: 32, ffn: 48, heads: 4, kv_heads: 2, layers: 2, vocab: 64}}\n"
      "data: {{train: {0}/train.bin, valid: {0}/train.bin, seq_len: 16}}\n"
      "batch: {{sequences: 12, micro: 2}}\n"
      "schedule: {{kind: cosine, peak_lr: 0.01, warmup_steps: 3, total_steps: 12}}\n"
      "optimizer: {{kind: {1}, rank: 8, refresh: 4}}\n"
      "checkpoint: {{every: 5, keep: 2}}\n"
      "eval: {{every: 6, tokens: 640}}\n",
      dir.string(), optimizer);
}

Config make_config(const fs::path& dir, const std::string& optimizer, std::vector<std::string> overrides = {}) {
  if (!fs::exists(dir / "train.bin")) write_shard(dir / "train.bin", 4000, 64);
  return parse_config(config_text(dir, optimizer), "test.yaml", overrides);
}

/// Each member of the family with each precision of states that it can have.
std::vector<std::vector<std::string>> members() {
  std::vector<std::vector<std::string>> list;
  for (const OptimizerKind kind : optimizer_kinds())
    for (const char* states : {"fp32", "bf16", "int8"}) {
      if (kind == OptimizerKind::adam8bit && states != std::string("int8")) continue;
      list.push_back({fmt::format("optimizer.kind={}", to_string(kind)), fmt::format("optimizer.states={}", states),
                      fmt::format("optimizer.projector_states={}", states), "optimizer.rewarm=2"});
    }
  return list;
}

/// ||G Q||^2 on the right side, ||G' Q||^2 on the left.
double captured(const Tensor& g, const Tensor& q) {
  const LowRankShape at(g.shape(), q.shape()[1]);
  std::vector<float> r(static_cast<std::size_t>(at.vectors() * at.rank));
  project(at, g.as<float>(), q.as<float>(), 1.0f, r.data());
  return squared_sum(r.data(), static_cast<std::int64_t>(r.size()));
}

/// Largest entry of |Q'Q - I|.
double orthogonality_error(const Tensor& q) {
  const auto side = static_cast<std::size_t>(q.shape()[0]), rank = static_cast<std::size_t>(q.shape()[1]);
  double worst = 0;
  for (std::size_t a = 0; a < rank; ++a)
    for (std::size_t b = 0; b < rank; ++b) {
      double sum = a == b ? -1 : 0;
      for (std::size_t s = 0; s < side; ++s)
        sum += static_cast<double>(q.span<float>()[s * rank + a]) * static_cast<double>(q.span<float>()[s * rank + b]);
      worst = std::max(worst, std::abs(sum));
    }
  return worst;
}

/// Every weight and optimizer state, byte for byte.
std::vector<std::byte> bytes_of(const Trainer& trainer) {
  std::vector<std::byte> all;
  auto append = [&](const Tensor& t) {
    const auto* data = static_cast<const std::byte*>(t.data);
    all.insert(all.end(), data, data + t.bytes());
  };
  for (const Parameter& parameter : trainer.weights().table().parameters) append(trainer.weights().view(parameter));
  trainer.states().visit([&](const std::string&, const Tensor& t) { append(t); });
  return all;
}

TEST_CASE("save and resume is bitwise the same as never stopping, for each optimizer and precision of its states") {
  for (const std::vector<std::string>& member : members()) {
    INFO(fmt::format("{}", fmt::join(member, " ")));
    const TemporaryDirectory dir;
    const auto communicator = make_local_communicator();
    const TrainerOptions quiet{.quiet = true};
    const Config config = make_config(dir.path, "adamw", member);
    Trainer whole(config, *communicator, {.quiet = true, .write_files = false});
    for (int i = 0; i < 12; ++i) whole.step();

    Config first = config;
    first.run.dir = (dir.path / "split").string();
    {
      Trainer part(first, *communicator, quiet);
      for (int i = 0; i < 7; ++i) part.step();  // past a refresh, in the middle of an interval
      save_checkpoint(fs::path(first.run.dir) / checkpoint_name(7),
                      {.weights = part.weights(), .states = part.states(), .config = to_json(first), .tokenizer = {}},
                      part.at());
    }
    Trainer resumed(first, *communicator, {.quiet = true, .write_files = false});
    REQUIRE(resumed.resume_latest());
    CHECK(resumed.at().step == 7);
    CHECK(resumed.at().position == 7 * 12);
    for (int i = 7; i < 12; ++i) resumed.step();
    CHECK(bytes_of(resumed) == bytes_of(whole));

    Trainer other(config, *communicator, {.quiet = true, .write_files = false});
    other.step();
    CHECK(bytes_of(other) != bytes_of(whole));
  }
}

TEST_CASE("micro-batches of any size give the same step") {
  const TemporaryDirectory dir;
  const auto communicator = make_local_communicator();
  std::vector<double> losses;
  for (const char* micro : {"batch.micro=1", "batch.micro=3", "batch.micro=12"}) {
    Trainer trainer(make_config(dir.path, "adamw", {micro}), *communicator, {.quiet = true, .write_files = false});
    for (int i = 0; i < 5; ++i) trainer.step();
    losses.push_back(trainer.step().loss);
  }
  CHECK(losses[1] == Approx(losses[0]).epsilon(1e-6));
  CHECK(losses[2] == Approx(losses[0]).epsilon(1e-6));
}

TEST_CASE("updates in backward give the same weights") {
  for (const OptimizerKind kind : optimizer_kinds()) {
    const std::string optimizer(to_string(kind));
    INFO(optimizer);
    const TemporaryDirectory dir;
    const auto communicator = make_local_communicator();
    const std::vector<std::string> whole{"batch.sequences=1", "batch.micro=1", "optimizer.clip_norm=0"};
    std::vector<std::string> early = whole;
    early.push_back("memory.update=in_backward");
    Trainer last(make_config(dir.path, optimizer, whole), *communicator, {.quiet = true, .write_files = false});
    Trainer first(make_config(dir.path, optimizer, early), *communicator, {.quiet = true, .write_files = false});
    for (int step = 0; step < 6; ++step) {
      const StepMetrics a = last.step(), b = first.step();
      CHECK(a.loss == b.loss);
      CHECK(b.grad_norm == Approx(a.grad_norm).epsilon(1e-12));
    }
    CHECK(bytes_of(first) == bytes_of(last));
  }
}

TEST_CASE("updates in backward need room for the largest gradients alone") {
  const auto communicator = make_local_communicator();
  const auto arena = [&](const std::string& update) {
    const Config config =
        parse_config(fmt::format("model: {{preset: llama_60m}}\noptimizer: {{kind: fira, clip_norm: 0}}\n"
                                 "batch: {{sequences: 1, micro: 1}}\nmemory: {{update: {}}}\n",
                                 update),
                     "test.yaml", {});
    return packed_memory(config, *communicator).arena;
  };
  // 58M gradients in f32; embedding and head, 16.4M each, are the largest.
  const std::uint64_t all = 232'000'000, largest = 66'000'000;
  CHECK(arena("after_backward") > all);
  CHECK(arena("in_backward") < 3 * largest);
}

TEST_CASE("updates in backward are refused where gradients must be complete first") {
  const TemporaryDirectory dir;
  const auto communicator = make_local_communicator();
  const auto refused = [&](std::vector<std::string> overrides, const std::string& sentence) {
    overrides.push_back("memory.update=in_backward");
    const Config config = make_config(dir.path, "adamw", std::move(overrides));
    CHECK_THROWS_WITH(Trainer(config, *communicator, {.quiet = true, .write_files = false}),
                      ContainsSubstring(sentence));
  };
  refused({"optimizer.clip_norm=0"}, "in_backward with 6 micro-batches");
  refused({"batch.micro=12"}, "in_backward with optimizer.clip_norm 1");
}

TEST_CASE("one batch is learnt by heart") {
  const TemporaryDirectory dir;
  write_shard(dir.path / "train.bin", 2 * 16 + 1, 64);  // two samples
  const auto communicator = make_local_communicator();
  for (const OptimizerKind kind : optimizer_kinds()) {
    INFO(to_string(kind));
    std::vector<std::string> member{fmt::format("optimizer.kind={}", to_string(kind))};
    for (const char* each :
         {"batch.sequences=2", "schedule.kind=constant", "schedule.total_steps=300", "schedule.peak_lr=0.02"})
      member.push_back(each);
    Trainer trainer(make_config(dir.path, "adamw", member), *communicator, {.quiet = true, .write_files = false});
    double loss = 0;
    for (int i = 0; i < 300; ++i) loss = trainer.step().loss;
    CHECK(loss < 0.05);
  }
}

/// A basis after the step at which its refresh was due, with the gradient that it was refreshed by.
struct Refreshed {
  std::string name;
  std::int64_t step = 0;
  const Tensor &g, &old, &now;
};

/// Trains to the end of the schedule. Gradients are computed again on the side, from the weights before their step.
void at_each_refresh(const Config& config, const std::function<void(const Refreshed&)>& visit) {
  const auto communicator = make_local_communicator();
  Trainer trainer(config, *communicator, {.quiet = true, .write_files = false});
  const OptimizerOptions options = optimizer_options(config);
  const BatchShape batch{.sequences = config.batch.sequences, .seq_len = config.data.seq_len};
  const Dataset data(config.data.train, batch.seq_len, trainer.weights().config().vocab, config.run.seed);
  std::vector<std::int32_t> tokens(static_cast<std::size_t>(batch.tokens())), targets(tokens.size());
  const auto length = static_cast<std::size_t>(batch.seq_len);
  for (std::int64_t step = 1; step <= config.schedule.total_steps; ++step) {
    std::map<std::string, HostTensor> old;  // of bases that are due
    std::vector<const Parameter*> due;
    for (const Parameter& parameter : trainer.weights().table().parameters)
      trainer.states().visit([&](const std::string& name, const Tensor& q) {
        if (name != parameter.name + ".projector") return;
        if (!refresh_due(refresh_schedule(parameter, options.refresh, options.stagger), step)) return;
        due.push_back(&parameter);
        const HostTensor& kept = old.emplace(name, q.spec).first->second;
        std::memcpy(kept.view().data, q.data, q.bytes());
      });
    std::optional<LlamaRun> side;
    if (!due.empty()) {
      for (std::size_t i = 0; i < static_cast<std::size_t>(batch.sequences); ++i)
        data.sample(trainer.at().position + static_cast<std::int64_t>(i), std::span(tokens).subspan(length * i, length),
                    std::span(targets).subspan(length * i, length));
      side.emplace(trainer.weights(), DType::f32, batch, LlamaOutput::losses_and_gradients);
      side->set_batch(tokens, targets);
      side->run();
    }
    trainer.step();
    for (const Parameter* parameter : due)
      trainer.states().visit([&](const std::string& name, const Tensor& q) {
        if (name != parameter->name + ".projector") return;
        visit({.name = name, .step = step, .g = side->gradient(*parameter), .old = old.at(name).view(), .now = q});
      });
  }
}

/// Energy of the exact basis of a gradient.
double best_energy(const Tensor& g, const Tensor& like) {
  const HostTensor exact(like.spec);
  refresh_projector(g, exact.view(), {.kind = ProjectorKind::svd}, nullptr);
  return captured(g, exact.view());
}

TEST_CASE("a warm basis holds 99 % of what the exact one would, over a training run") {
  const TemporaryDirectory dir;
  std::size_t refreshes = 0;
  double mean = 0, outside = 0;
  at_each_refresh(make_config(dir.path, "fira", {"schedule.total_steps=60", "batch.sequences=96", "batch.micro=12"}),
                  [&](const Refreshed& at) {
                    INFO(at.name << " at step " << at.step);
                    const double best = best_energy(at.g, at.now);
                    CHECK(captured(at.g, at.now) >= 0.95 * best);
                    mean += captured(at.g, at.now) / best;
                    CHECK(orthogonality_error(at.now) < 1e-5);
                    ++refreshes;
                    outside += 1 - best / squared_sum(at.g.as<float>(), at.g.numel());
                  });
  CHECK(refreshes == 14 + 14 * 59 / 4);
  const auto count = static_cast<double>(refreshes);
  CHECK(mean / count >= 0.99);
  CHECK(outside / count > 0.1);  // of the gradient no basis of rank 8 holds: there is something to miss
}

// Minutes, and a user's own shards: KILN_SHARDS='data/shards/train*' build/release/test_train "[.energy]" prints
// what scripts/results/gpu_optimizers.md has.
TEST_CASE("two passes of power iteration, as a GPU makes them, hold 99 % on real text", "[.energy]") {
  const char* shards = std::getenv("KILN_SHARDS");
  REQUIRE(shards != nullptr);
  const Config config = parse_config(
      fmt::format(
          "run: {{dir: unused, device: cpu}}\nmodel: {{preset: llama_9m}}\ndata: {{train: '{}', seq_len: 256}}\n"
          "batch: {{sequences: 64, micro: 8}}\n"
          "schedule: {{kind: cosine, peak_lr: 0.01, warmup_steps: 10, total_steps: 90}}\n"
          "optimizer: {{kind: fira, rank: 32, refresh: 28}}\n",
          shards),
      "energy.yaml", {});
  std::array<std::vector<double>, 5> held;  // by passes; 0: of the old basis
  at_each_refresh(config, [&](const Refreshed& at) {
    if (at.step == 1) return;  // cold
    const double best = best_energy(at.g, at.now);
    std::vector<std::byte> workspace(refresh_workspace_bytes(at.g.shape(), at.now.shape()[1], DType::f32));
    for (std::size_t passes = 0; passes < held.size(); ++passes) {
      if (passes > 0) refresh_projector(at.g, at.old, {.kind = ProjectorKind::power, .passes = 1}, workspace.data());
      held[passes].push_back(captured(at.g, at.old) / best);
    }
    CHECK(captured(at.g, at.now) / best == Approx(held[3].back()).epsilon(1e-4));
  });
  for (std::size_t passes = 0; passes < held.size(); ++passes) {
    const double mean =
        std::accumulate(held[passes].begin(), held[passes].end(), 0.0) / static_cast<double>(held[passes].size());
    fmt::print("{} passes, {} refreshes: mean {:.4f}, least {:.4f}\n", passes, held[passes].size(), mean,
               *std::ranges::min_element(held[passes]));
    if (passes >= 2) CHECK(mean >= 0.99);
  }
}

TEST_CASE("a loss that is not finite stops the run before the update, with exit code 5") {
  const TemporaryDirectory dir;
  const auto communicator = make_local_communicator();
  Trainer trainer(make_config(dir.path, "adamw"), *communicator, {.quiet = true, .write_files = false});
  trainer.step();
  trainer.weights().storage(0).as<float>()[5] = NAN;
  try {
    for (int i = 0; i < 20; ++i) trainer.step();
    FAIL("no error");
  } catch (const Divergence& e) {
    CHECK(e.code() == ExitCode::diverged);
    CHECK_THAT(std::string(e.what()), ContainsSubstring("the last checkpoint stands"));
    CHECK(e.at().step == trainer.at().step);
    CHECK(e.at().position == 12 * e.at().step);  // behind the offending batch
  }
}

TEST_CASE("a run leaves metrics, pruned checkpoints and snapshots") {
  const TemporaryDirectory dir;
  const auto communicator = make_local_communicator();
  const Config config = make_config(
      dir.path, "fira", {"snapshots.every=2", "schedule.kind=wsd", "schedule.decay_steps=4", "checkpoint.every=3"});
  Trainer trainer(config, *communicator, {.quiet = true});
  const TrainSummary summary = trainer.run();
  CHECK(summary.at.step == 12);
  CHECK(summary.valid_loss.has_value());
  const std::vector<StepMetrics> metrics = read_metrics(fs::path(config.run.dir) / "metrics.jsonl");
  REQUIRE(metrics.size() == 12);
  CHECK(metrics[5].valid_loss.has_value());
  CHECK(metrics[11].loss < metrics[0].loss);
  std::vector<std::int64_t> steps;
  for (const fs::path& path : list_checkpoints(config.run.dir)) steps.push_back(checkpoint_step(path).value());
  CHECK(steps == std::vector<std::int64_t>{9, 12});
  steps.clear();
  for (const fs::path& path : list_checkpoints(fs::path(config.run.dir) / "snapshots"))
    steps.push_back(checkpoint_step(path).value());
  CHECK(steps == std::vector<std::int64_t>{4, 6, 8});  // after warm-up, before the decay
}

TEST_CASE("a checkpoint of another optimizer, another model or with a torn file is refused") {
  const TemporaryDirectory dir;
  const auto communicator = make_local_communicator();
  const Config config = make_config(dir.path, "adamw", {"schedule.total_steps=3"});
  Trainer(config, *communicator, {.quiet = true}).run();
  const fs::path saved = fs::path(config.run.dir) / checkpoint_name(3);
  auto message = [&](const Config& other) {
    try {
      Trainer(other, *communicator, {.quiet = true}).resume(saved);
    } catch (const Error& e) {
      return std::string(e.what());
    }
    return std::string("no error");
  };
  CHECK_THAT(message(make_config(dir.path, "fira")), ContainsSubstring("optimizer state"));
  CHECK_THAT(message(make_config(dir.path, "adamw", {"model.layers=1"})), ContainsSubstring("parameters"));
  fs::resize_file(saved / "model.safetensors", 1000);
  CHECK_THAT(message(config), ContainsSubstring("torn"));
  Trainer again(config, *communicator, {.quiet = true});
  CHECK_FALSE(again.resume_latest());
}

TEST_CASE("ranks that do not divide the batch are refused") {
  const TemporaryDirectory dir;
  const Config config = make_config(dir.path, "adamw");
  CHECK_THROWS_WITH(micro_batch(config, 5), ContainsSubstring("do not divide over 5 ranks"));
  CHECK_THROWS_WITH(micro_batch(make_config(dir.path, "adamw", {"batch.micro=5"}), 1),
                    ContainsSubstring("batch.micro: 5"));
  CHECK(micro_batch(config, 3).sequences == 2);
}

#if !defined(__SANITIZE_ADDRESS__)
TEST_CASE("a step allocates nothing after warm-up") {
  const TemporaryDirectory dir;
  const auto communicator = make_local_communicator();
  for (std::vector<std::string> member : members()) {
    INFO(fmt::format("{}", fmt::join(member, " ")));
    member.push_back("schedule.total_steps=40");  // refreshes every 4 steps, warm ones
    const Config config = make_config(dir.path, "adamw", member);
    Trainer trainer(config, *communicator, {.quiet = true, .write_files = false});
    for (int i = 0; i < 3; ++i) trainer.step();
    allocations = 0;
    counting = true;
    for (int i = 0; i < 5; ++i) trainer.step();
    counting = false;
    CHECK(allocations.load() == 0);
    counting = true;
    void* volatile one = std::malloc(8);  // the counter does count
    counting = false;
    std::free(one);
    CHECK(allocations.load() == 1);
  }
}
#endif

}  // namespace
}  // namespace kiln
