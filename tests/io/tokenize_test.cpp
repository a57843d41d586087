#include "io/tokenize.h"

#include <algorithm>
#include <map>
#include <set>
#include <sstream>
#include <utility>

#include "base/error.h"
#include "base/files.h"
#include "catch.h"
#include "corpus_fixture.h"
#include "io/shard.h"
#include "io/tokenizer.h"

namespace kiln {
namespace {

using test::error_of;
using test::Scratch;
using test::write_file;

const std::string kFirst = "The sea was grey that morning.\nNobody spoke of it.\n";
const std::string kSecond = "\nA second paper, 1889.\n\nIt ends without a new line";

std::vector<std::int32_t> tokens_of(const std::filesystem::path& path) {
  const TokenShard shard(path);
  std::vector<std::int32_t> tokens(static_cast<std::size_t>(shard.size()));
  shard.read(0, tokens);
  return tokens;
}

/// What a corpus of these documents must become: each encoded, then EOS.
std::vector<std::int32_t> expected_tokens(const Tokenizer& tokenizer, const std::vector<std::string>& documents) {
  std::vector<std::int32_t> all;
  for (const std::string& document : documents) {
    const auto tokens = tokenizer.encode(document);
    all.insert(all.end(), tokens.begin(), tokens.end());
    all.push_back(tokenizer.eos());
  }
  return all;
}

TokenizeOptions training_on(const Scratch& scratch) {
  std::string text;
  for (int i = 0; i < 100; ++i) text += kFirst + "\f\n" + kSecond + "\n\f\n";
  write_file(scratch / "many.txt", text);
  TokenizeOptions options;
  options.inputs = {scratch / "many.txt"};
  options.out = scratch / "out";
  options.train_vocab = 300;
  return options;
}

}  // namespace

TEST_CASE("a text corpus becomes documents, each with an EOS, and a tokenizer beside them") {
  const Scratch scratch;
  const TokenizeResult trained = tokenize_corpus(training_on(scratch));
  CHECK(trained.documents == 200);
  CHECK(trained.vocab == 300);
  const Tokenizer tokenizer(scratch / "out/tokenizer.model");
  CHECK(tokenizer.vocab_size() == 300);
  REQUIRE(trained.shards == std::vector<std::filesystem::path>{scratch / "out/train_000.bin"});
  const auto tokens = tokens_of(trained.shards[0]);
  CHECK(std::count(tokens.begin(), tokens.end(), tokenizer.eos()) == 200);
  CHECK(trained.tokens == static_cast<std::int64_t>(tokens.size()));
  CHECK(trained.bytes == 100 * static_cast<std::int64_t>(kFirst.size() + kSecond.size() + 1));

  // The same tokenizer on other files, into another directory.
  write_file(scratch / "two.txt", kFirst + "\f\n" + kSecond);
  write_file(scratch / "three.jsonl", "{\"text\": \"caf\\u00e9\\n\\f\\nstill one\", \"id\": 3}\n\n{\"text\": \"x\"}\n");
  TokenizeOptions reuse;
  reuse.inputs = {scratch / "two.txt", scratch / "three.jsonl"};
  reuse.out = scratch / "other";
  reuse.tokenizer = scratch / "out/tokenizer.model";
  reuse.prefix = "valid";
  const TokenizeResult loaded = tokenize_corpus(reuse);
  CHECK(loaded.documents == 4);
  REQUIRE(loaded.shards == std::vector<std::filesystem::path>{scratch / "other/valid_000.bin"});
  CHECK(tokens_of(loaded.shards[0]) ==
        expected_tokens(tokenizer, {kFirst, kSecond + "\n", "caf\u00e9\n\f\nstill one", "x"}));
  CHECK(hash_file(scratch / "other/tokenizer.model") == hash_file(scratch / "out/tokenizer.model"));

  // And into the directory where that tokenizer already lies.
  reuse.inputs = {scratch / "two.txt"};
  reuse.out = scratch / "out";
  const TokenizeResult beside = tokenize_corpus(reuse);
  CHECK(tokens_of(beside.shards.at(0)) == expected_tokens(tokenizer, {kFirst, kSecond + "\n"}));
}

TEST_CASE("shards are cut at the first document end past their size") {
  const Scratch scratch;
  TokenizeOptions options = training_on(scratch);
  const std::int64_t whole = tokenize_corpus(options).tokens;
  options.shard_tokens = whole / 4;
  const TokenizeResult cut = tokenize_corpus(options);
  CHECK(cut.tokens == whole);
  REQUIRE((cut.shards.size() == 4 || cut.shards.size() == 5));
  std::int64_t tokens = 0;
  for (std::size_t i = 0; i < cut.shards.size(); ++i) {
    CHECK(cut.shards[i].filename() == fmt::format("train_{:03}.bin", i));
    const auto shard = tokens_of(cut.shards[i]);
    CHECK(shard.back() == 2);
    if (i + 1 < cut.shards.size()) CHECK(static_cast<std::int64_t>(shard.size()) >= options.shard_tokens);
    tokens += static_cast<std::int64_t>(shard.size());
  }
  CHECK(tokens == whole);
  // A later run in one shard leaves none of the old ones to be read with it.
  options.shard_tokens = whole;
  tokenize_corpus(options);
  CHECK_FALSE(std::filesystem::exists(cut.shards[1]));
}

TEST_CASE("nothing but shards and the tokenizer is left in the directory") {
  const Scratch scratch;
  tokenize_corpus(training_on(scratch));
  CHECK(std::distance(std::filesystem::directory_iterator(scratch / "out"), {}) == 2);
}

TEST_CASE("a corpus that cannot be read is a data error that names file and line") {
  const Scratch scratch;
  TokenizeOptions options = training_on(scratch);
  const auto complaint = [&](const std::string& name, const std::string& part) {
    options.inputs = {scratch / "many.txt", scratch / name};
    const Error error = error_of([&] { tokenize_corpus(options); });
    CHECK(error.code() == ExitCode::data);
    CHECK_THAT(error.what(), ContainsSubstring(name) && ContainsSubstring(part));
    CHECK_FALSE(std::filesystem::exists(scratch / "out/train_000.bin"));
  };
  complaint("absent.txt", "no such file");
  write_file(scratch / "empty.txt", "");
  complaint("empty.txt", "no document");
  write_file(scratch / "separators.txt", "\f\n\f\n");
  complaint("separators.txt", "no document");
  write_file(scratch / "empty.jsonl", "\n\n");
  complaint("empty.jsonl", "no document");
  const std::string good = "{\"text\": \"a good line\"}\n";
  const std::vector<std::string> bad = {"{\"text\": \"torn", "[1]", "{\"body\": 1}", "{\"text\": 5}",
                                        "{\"text\": \"\xff\xfe\"}"};
  for (const std::string& line : bad) {
    write_file(scratch / "bad.jsonl", good + "\n" + line + "\n" + good);
    complaint("bad.jsonl", "bad.jsonl:3:");
  }
  std::filesystem::create_directories(scratch / "folder.txt");
  complaint("folder.txt", "no such file");

  options = training_on(scratch);
  options.train_vocab = 0;
  options.tokenizer = scratch / "absent.model";
  const Error missing = error_of([&] { tokenize_corpus(options); });
  CHECK(missing.code() == ExitCode::data);
  CHECK_THAT(missing.what(), ContainsSubstring("absent.model"));
}

TEST_CASE("tokenize wants inputs, a shard size and one of a tokenizer and a vocabulary") {
  const Scratch scratch;
  const auto code = [](const TokenizeOptions& options) { return error_of([&] { tokenize_corpus(options); }).code(); };
  TokenizeOptions options = training_on(scratch);
  options.train_vocab = 0;
  CHECK(code(options) == ExitCode::usage);
  options.train_vocab = 300;
  options.tokenizer = scratch / "any.model";
  CHECK(code(options) == ExitCode::usage);
  options.tokenizer.clear();
  options.shard_tokens = 0;
  CHECK(code(options) == ExitCode::usage);
  options.shard_tokens = 10;
  options.inputs.clear();
  CHECK(code(options) == ExitCode::usage);
}

TEST_CASE("the corpus of the quickstart is as its table says") {
  const std::filesystem::path data = std::filesystem::path(KILN_SOURCE_DIR) / "data";
  std::map<std::string, std::multiset<std::int64_t>> listed, found;
  std::int64_t total = 0;
  std::istringstream readme(read_text(data / "README.md"));
  for (std::string line; std::getline(readme, line);) {
    const std::string part = line.substr(0, 7) == "| train" ? "train" : line.substr(0, 7) == "| valid" ? "valid" : "";
    if (part.empty()) continue;
    CHECK_THAT(line, ContainsSubstring("public domain"));
    const std::size_t end = line.rfind(" |"), begin = line.rfind("| ", end - 1) + 2;
    std::string bytes = line.substr(begin, end - begin);
    bytes.erase(std::remove(bytes.begin(), bytes.end(), ','), bytes.end());
    listed[part].insert(std::stoll(bytes));
  }
  for (const std::string part : {"train", "valid"}) {
    std::istringstream text(read_text(data / "corpus" / (part + ".txt")));
    std::int64_t bytes = 0;
    for (std::string line; std::getline(text, line);) {
      if (line == "\f") {
        found[part].insert(std::exchange(bytes, 0));
        continue;
      }
      bytes += static_cast<std::int64_t>(line.size()) + 1;
      total += static_cast<std::int64_t>(line.size()) + 1;
    }
    found[part].insert(bytes);
  }
  CHECK(listed["train"].size() == 37);
  CHECK(listed["valid"].size() == 6);
  CHECK(listed == found);
  CHECK((total > 4'500'000 && total < 6'000'000));
}

}  // namespace kiln
