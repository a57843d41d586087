#include "io/shard.h"

#include <fstream>
#include <vector>

#include "base/error.h"
#include "base/files.h"
#include "catch.h"
#include "corpus_fixture.h"

namespace kiln {
namespace {

using test::error_of;
using test::Scratch;
using test::write_shard;

std::vector<std::int32_t> header_of(const std::filesystem::path& path) {
  std::ifstream in(path, std::ios::binary);
  std::vector<std::int32_t> header(256);
  in.read(reinterpret_cast<char*>(header.data()), 1024);
  return header;
}

void resize_by(const std::filesystem::path& path, std::int64_t bytes) {
  const auto size = static_cast<std::int64_t>(std::filesystem::file_size(path));
  std::filesystem::resize_file(path, static_cast<std::uintmax_t>(size + bytes));
}

void overwrite(const std::filesystem::path& path, std::int64_t offset, std::int32_t word) {
  std::fstream out(path, std::ios::binary | std::ios::in | std::ios::out);
  out.seekp(offset);
  out.write(reinterpret_cast<const char*>(&word), sizeof(word));
}

}  // namespace

TEST_CASE("a shard is laid out as llm.c lays it out") {
  const Scratch scratch;
  const auto path = scratch / "a.bin";
  write_shard(path, {1, 65535, 258}, 65536);

  std::vector<std::int32_t> expected(256, 0);
  expected[0] = 20240520;
  expected[1] = 1;
  expected[2] = 3;
  CHECK(header_of(path) == expected);
  CHECK(read_text(path).substr(1024) == std::string("\x01\x00\xff\xff\x02\x01", 6));

  write_shard(path, {65536, 7}, 65537);
  expected[0] = 20240801;
  expected[1] = 7;
  expected[2] = 2;
  CHECK(header_of(path) == expected);
  CHECK(read_text(path).substr(1024) == std::string("\x00\x00\x01\x00\x07\x00\x00\x00", 8));
}

TEST_CASE("a shard gives back the tokens written, narrow and wide, past the write buffer") {
  const Scratch scratch;
  for (const std::int64_t vocab : {50000, 200000}) {
    std::vector<std::int32_t> tokens(800'001);
    for (std::size_t i = 0; i < tokens.size(); ++i)
      tokens[i] = static_cast<std::int32_t>((i * 2654435761u) % static_cast<std::size_t>(vocab));
    const auto path = scratch / "deep" / "b.bin";
    write_shard(path, tokens, vocab);
    const TokenShard shard(path);
    REQUIRE(shard.size() == 800'001);
    std::vector<std::int32_t> all(tokens.size());
    shard.read(0, all);
    CHECK(all == tokens);
    CHECK(shard[800'000] == tokens.back());
    std::vector<std::int32_t> middle(5);
    shard.read(524'285, middle);
    CHECK(middle == std::vector<std::int32_t>(tokens.begin() + 524'285, tokens.begin() + 524'290));
  }
}

TEST_CASE("an unfinished shard leaves nothing behind, and spares the file that stood there") {
  const Scratch scratch;
  const auto path = scratch / "c.bin";
  write_shard(path, {1, 2, 3}, 10);
  {
    TokenShardWriter writer(path, 10);
    writer.append(std::vector<std::int32_t>{4});
  }
  CHECK(TokenShard(path).size() == 3);
  CHECK(std::distance(std::filesystem::directory_iterator(scratch.path()), {}) == 1);
}

TEST_CASE("a token outside the vocabulary is not written") {
  const Scratch scratch;
  TokenShardWriter writer(scratch / "d.bin", 10);
  writer.append(std::vector<std::int32_t>{9, 9});
  for (const std::int32_t bad : {10, -1}) {
    const Error error = error_of([&] { writer.append(std::vector<std::int32_t>{bad}); });
    CHECK(error.code() == ExitCode::data);
    CHECK_THAT(error.what(), ContainsSubstring("d.bin: token " + std::to_string(bad) + " at 2"));
  }
}

TEST_CASE("a torn or foreign shard is named") {
  const Scratch scratch;
  const auto path = scratch / "e.bin";
  const auto complaint = [&](const std::string& part) {
    const Error error = error_of([&] { TokenShard shard(path); });
    CHECK(error.code() == ExitCode::data);
    CHECK_THAT(error.what(), ContainsSubstring("e.bin") && ContainsSubstring(part));
  };

  SECTION("missing") { complaint("e.bin"); }
  SECTION("empty") {
    std::ofstream(path).flush();
    complaint("0 bytes, expected a header of 1024");
  }
  SECTION("cut inside the header") {
    write_shard(path, {1, 2, 3}, 10);
    std::filesystem::resize_file(path, 1023);
    complaint("1023 bytes, expected a header of 1024");
  }
  SECTION("cut inside the tokens") {
    write_shard(path, {1, 2, 3}, 10);
    resize_by(path, -1);
    complaint("1029 bytes, expected 1030 for the 3 tokens");
  }
  SECTION("too long") {
    write_shard(path, {1, 2, 3}, 10);
    resize_by(path, 2);
    complaint("1032 bytes, expected 1030 for the 3 tokens");
  }
  SECTION("another magic") {
    write_shard(path, {1, 2, 3}, 10);
    overwrite(path, 0, 42);
    complaint("magic 42 version 1");
  }
  SECTION("the version of the other width") {
    write_shard(path, {1, 2, 3}, 10);
    overwrite(path, 4, 7);
    complaint("magic 20240520 version 7");
  }
  SECTION("a negative count") {
    write_shard(path, {1, 2, 3}, 10);
    overwrite(path, 8, -3);
    complaint("-3 tokens");
  }
}

}  // namespace kiln
