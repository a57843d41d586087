#include "io/checkpoint.h"

#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <fstream>
#include <thread>

#include "base/files.h"
#include "catch.h"

namespace kiln {
namespace {

namespace fs = std::filesystem;

struct Scratch {
  fs::path path;
  Scratch() {
    std::string pattern = (fs::temp_directory_path() / "kiln-checkpoint-XXXXXX").string();
    path = ::mkdtemp(pattern.data());
  }
  ~Scratch() { fs::remove_all(path); }
};

void write_checkpoint(const fs::path& directory, int content) {
  CheckpointWriter writer(directory);
  writer.write_json("state.json", {{"content", content}});
  std::ofstream(writer.directory() / "model.bin") << std::string(20000, static_cast<char>('a' + content % 26));
  writer.commit();
}

TEST_CASE("a committed checkpoint is whole, and any damage to it shows") {
  const Scratch scratch;
  const fs::path dir = scratch.path / checkpoint_name(7);
  write_checkpoint(dir, 1);
  CHECK_FALSE(checkpoint_fault(dir, ManifestCheck::hashes).has_value());
  CHECK(list_checkpoints(scratch.path) == std::vector<fs::path>{dir});
  {
    std::fstream file(dir / "model.bin", std::ios::in | std::ios::out);
    file << 'Z';
  }
  CHECK_FALSE(checkpoint_fault(dir, ManifestCheck::sizes).has_value());
  CHECK_THAT(checkpoint_fault(dir, ManifestCheck::hashes).value(),
             ContainsSubstring("model.bin does not match its hash"));
  fs::resize_file(dir / "model.bin", 10);
  CHECK_THAT(checkpoint_fault(dir, ManifestCheck::sizes).value(), ContainsSubstring("has 10 bytes, expected 20000"));
  CHECK(list_checkpoints(scratch.path).empty());
  fs::remove(dir / "model.bin");
  CHECK_THAT(checkpoint_fault(dir, ManifestCheck::sizes).value(), ContainsSubstring("model.bin is missing"));
  fs::remove(dir / "MANIFEST.json");
  CHECK_THAT(checkpoint_fault(dir, ManifestCheck::sizes).value(), ContainsSubstring("MANIFEST.json is missing"));
}

TEST_CASE("a writer that is dropped leaves nothing, and replaces only when it is complete") {
  const Scratch scratch;
  const fs::path dir = scratch.path / checkpoint_name(1);
  { CheckpointWriter dropped(dir); }
  CHECK(fs::is_empty(scratch.path));
  write_checkpoint(dir, 1);
  {
    CheckpointWriter dropped(dir);
    dropped.write_json("state.json", {{"content", 2}});
  }
  CHECK(read_json(dir / "state.json")["content"] == 1);
  write_checkpoint(dir, 3);
  CHECK(read_json(dir / "state.json")["content"] == 3);
  CHECK(std::distance(fs::directory_iterator(scratch.path), {}) == 1);
}

TEST_CASE("names, order and pruning") {
  const Scratch scratch;
  CHECK(checkpoint_name(1000) == "step_00001000");
  CHECK(checkpoint_step("run/step_00001000") == 1000);
  CHECK_FALSE(checkpoint_step("run/step_00001000.tmp-5").has_value());
  CHECK_FALSE(checkpoint_step("run/other").has_value());
  for (const int step : {30, 5, 100, 20}) write_checkpoint(scratch.path / checkpoint_name(step), step);
  prune_checkpoints(scratch.path, 0);
  CHECK(list_checkpoints(scratch.path).size() == 4);
  prune_checkpoints(scratch.path, 2);
  CHECK(list_checkpoints(scratch.path) ==
        std::vector<fs::path>{scratch.path / checkpoint_name(30), scratch.path / checkpoint_name(100)});
  CHECK(std::distance(fs::directory_iterator(scratch.path), {}) == 2);

  fs::create_directories(scratch.path / checkpoint_name(40));  // torn
  CHECK(remove_checkpoints_after(scratch.path / "nowhere", 0).empty());
  CHECK(remove_checkpoints_after(scratch.path, 100).empty());
  CHECK(remove_checkpoints_after(scratch.path, 30) ==
        std::vector<fs::path>{scratch.path / checkpoint_name(40), scratch.path / checkpoint_name(100)});
  CHECK(fs::directory_iterator(scratch.path)->path() == scratch.path / checkpoint_name(30));
  CHECK(std::distance(fs::directory_iterator(scratch.path), {}) == 1);
}

TEST_CASE("kill -9 at any moment leaves only whole checkpoints, and never fewer") {
  const Scratch scratch;
  std::int64_t newest = 0;
  for (int round = 0; round < 12; ++round) {
    const pid_t child = ::fork();
    REQUIRE(child >= 0);
    if (child == 0) {
      for (std::int64_t step = newest + 1;; ++step) {
        write_checkpoint(scratch.path / checkpoint_name(step), static_cast<int>(step));
        write_checkpoint(scratch.path / checkpoint_name(step), static_cast<int>(step + 1));  // and replaces it
        prune_checkpoints(scratch.path, 2);
      }
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(20 + 17 * round));
    ::kill(child, SIGKILL);
    ::waitpid(child, nullptr, 0);
    const std::vector<fs::path> found = list_checkpoints(scratch.path);
    for (const fs::path& path : found) CHECK_FALSE(checkpoint_fault(path, ManifestCheck::hashes).has_value());
    const std::int64_t last = found.empty() ? 0 : checkpoint_step(found.back()).value();
    CHECK(last >= newest);
    newest = last;
  }
  CHECK(newest > 0);
}

TEST_CASE("the model files of a directory, single or sharded") {
  const Scratch scratch;
  CHECK_THROWS_WITH(model_files(scratch.path), ContainsSubstring("holds neither"));
  write_text_atomic(scratch.path / "model.safetensors.index.json",
                    R"({"weight_map": {"a": "b.safetensors", "c": "a.safetensors", "d": "b.safetensors"}})");
  CHECK_THROWS_WITH(model_files(scratch.path), ContainsSubstring("a.safetensors: missing"));
  for (const char* name : {"a.safetensors", "b.safetensors"}) std::ofstream(scratch.path / name) << "x";
  CHECK(model_files(scratch.path) ==
        std::vector<fs::path>{scratch.path / "a.safetensors", scratch.path / "b.safetensors"});
  std::ofstream(scratch.path / "model.safetensors") << "x";
  CHECK(model_files(scratch.path) == std::vector<fs::path>{scratch.path / "model.safetensors"});
}

}  // namespace
}  // namespace kiln
