#pragma once
#include <sys/wait.h>

#include <array>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "base/rng.h"
#include "io/shard.h"

namespace kiln::test {

namespace fs = std::filesystem;

/// What a run of the program printed (both streams) and its exit code.
struct Outcome {
  int code = -1;
  std::string text;
};

/// Runs a shell command line; KILN stands for the program, DIR for the directory.
inline Outcome run(std::string command, const fs::path& dir) {
  auto replace = [&](const std::string& from, const std::string& to) {
    for (std::size_t at = 0; (at = command.find(from, at)) != std::string::npos; at += to.size())
      command.replace(at, from.size(), to);
  };
  replace("KILN", KILN_PROGRAM);
  replace("DIR", dir.string());
  Outcome outcome;
  std::FILE* pipe = ::popen(("{ " + command + "; } 2>&1").c_str(), "r");
  std::array<char, 4096> piece;
  for (std::size_t n; (n = std::fread(piece.data(), 1, piece.size(), pipe)) > 0;) outcome.text.append(piece.data(), n);
  const int status = ::pclose(pipe);
  outcome.code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  return outcome;
}

/// A directory with a shard that has something to learn and a configuration of a tiny model.
struct Workspace {
  fs::path dir;

  Workspace() {
    std::string pattern = (fs::temp_directory_path() / "kiln-apps-XXXXXX").string();
    dir = ::mkdtemp(pattern.data());
    shard(dir / "train.bin", 64);
    std::ofstream(dir / "c.yaml") << "run: {dir: " << (dir / "run").string() << ", seed: 3, threads: 1}\n"
                                  << "model: {hidden: 32, ffn: 48, heads: 4, kv_heads: 2, layers: 2, vocab: 64}\n"
                                  << "data: {train: " << (dir / "train.bin").string()
                                  << ", valid: " << (dir / "train.bin").string() << ", seq_len: 16}\n"
                                  << "batch: {sequences: 12, micro: 1}\n"
                                  << "schedule: {kind: constant, peak_lr: 0.001, warmup_steps: 10, total_steps: 50}\n"
                                  << "optimizer: {kind: fira, rank: 8, refresh: 20}\n"
                                  << "checkpoint: {every: 5, keep: 2}\n"
                                  << "eval: {every: 25, tokens: 640}\n";
  }
  ~Workspace() { fs::remove_all(dir); }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  static void shard(const fs::path& path, std::int64_t vocab) {
    TokenShardWriter writer(path, vocab);
    const Philox random(3, 3);
    std::vector<std::int32_t> text;
    std::int64_t token = 1;
    for (std::uint64_t i = 0; i < 4000; ++i) {
      token = (token * 5 + static_cast<std::int64_t>(random.bits(i) % 3)) % vocab;
      text.push_back(static_cast<std::int32_t>(token));
    }
    writer.append(text);
    writer.finish();
  }

  Outcome operator()(const std::string& command) const { return run(command, dir); }
};

}  // namespace kiln::test
