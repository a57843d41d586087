#include <cmath>
#include <fstream>

#include "base/decay_shape.h"
#include "base/error.h"
#include "base/files.h"
#include "base/json.h"
#include "base/rng.h"
#include "base/text.h"
#include "catch.h"

namespace kiln {
namespace {

namespace fs = std::filesystem;

struct Scratch {
  fs::path path;
  Scratch() {
    std::string pattern = (fs::temp_directory_path() / "kiln-base-XXXXXX").string();
    path = ::mkdtemp(pattern.data());
  }
  ~Scratch() { fs::remove_all(path); }
};

TEST_CASE("Philox4x32-10 gives the published known answers") {
  // Random123's kat_vectors: counter and key of zeros, then of ones.
  const auto zeros = Philox(0, 0).block(0);
  CHECK(zeros == std::array<std::uint32_t, 4>{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8});
  const std::uint64_t ones = ~std::uint64_t{0};
  CHECK(Philox(ones, ones).block(ones) == std::array<std::uint32_t, 4>{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd});
}

TEST_CASE("uniform and normal draws have their moments") {
  const Philox random(1, 2);
  double mean = 0, square = 0, fourth = 0, uniform = 0;
  const int count = 200'000;
  for (std::uint64_t i = 0; i < count; ++i) {
    const double x = random.normal(i), u = random.uniform(i);
    CHECK((u >= 0 && u < 1));
    mean += x / count;
    square += x * x / count;
    fourth += x * x * x * x / count;
    uniform += u / count;
  }
  CHECK(std::abs(mean) < 0.01);
  CHECK(square == Approx(1).epsilon(0.02));
  CHECK(fourth == Approx(3).epsilon(0.05));
  CHECK(uniform == Approx(0.5).epsilon(0.01));
  CHECK(random.bits(5) != Philox(1, 3).bits(5));
  CHECK(stream_of("a") != stream_of("b"));
}

TEST_CASE("files are replaced whole, matched in order, hashed and mapped") {
  const Scratch scratch;
  const fs::path path = scratch.path / "deep/er/a.txt";
  write_text_atomic(path, "one");
  write_text_atomic(path, "two");
  CHECK(read_text(path) == "two");
  CHECK_FALSE(fs::exists(path.string() + ".tmp"));
  CHECK_THROWS_WITH(read_text(scratch.path / "none"), ContainsSubstring("none: cannot be read"));
  for (const char* name : {"s_2", "s_10", "s_1", "t"}) std::ofstream(scratch.path / name) << name;
  const auto found = expand_glob((scratch.path / "s_*").string());
  REQUIRE(found.size() == 3);
  CHECK(found[0].filename() == "s_1");
  CHECK_THROWS_WITH(expand_glob((scratch.path / "u*").string()), ContainsSubstring("no file matches"));
  CHECK(hash_bytes({}) == "2d06800538d394c2");  // XXH3-64 of nothing, seed 0
  CHECK(hash_file(path) == hash_bytes(std::as_bytes(std::span("two", 3))));
  std::ofstream(scratch.path / "empty").flush();
  CHECK(MappedFile(scratch.path / "empty").bytes().empty());
  const std::string text(3000, 'x');
  const std::span<const std::byte> whole = std::as_bytes(std::span(text));
  Hasher hasher;
  for (const std::size_t piece : {0, 1, 700, 2299}) {
    hasher.add(whole.first(piece));
    if (piece == 700) CHECK(hasher.digest() == hash_bytes(whole.first(701)));
  }
  CHECK(hasher.digest() == hash_bytes(whole));
  CHECK_THROWS_AS(MappedFile(scratch.path), Error);
  std::ofstream(scratch.path / "bad.json") << "{\"a\": }";
  CHECK_THROWS_WITH(read_json(scratch.path / "bad.json"), ContainsSubstring("not valid JSON"));
}

TEST_CASE("sizes and words are read and written for people") {
  CHECK(human_bytes(512) == "512 B");
  CHECK(human_bytes(1536) == "1.50 KiB");
  CHECK(human_bytes(std::uint64_t{25} << 30) == "25.0 GiB");
  CHECK(human_count(58'073'600) == "58.1M");
  CHECK(human_seconds(65) == "1:05");
  CHECK(human_seconds(3725) == "1:02:05");
  CHECK(parse_bytes("24GiB", "x") == std::uint64_t{24} << 30);
  CHECK(parse_bytes("1.5 KB", "x") == 1500);
  CHECK(parse_bytes("4096", "x") == 4096);
  CHECK_THROWS_WITH(parse_bytes("24GB5", "memory.budget"), ContainsSubstring("memory.budget: '24GB5' is not a size"));
  CHECK_THROWS_AS(parse_bytes("-3", "x"), Error);
  const std::array<std::string_view, 3> words{"kind", "rank", "alpha"};
  CHECK(nearest("knd", words) == "kind");
  CHECK(nearest("alhpa", words) == "alpha");
  CHECK(nearest("x", {}) == "");
}

TEST_CASE("decays run from 1 to 0 and know their names") {
  for (const DecayShape shape : {DecayShape::linear, DecayShape::cosine, DecayShape::one_minus_sqrt}) {
    CHECK(decay_at(shape, 0) == Approx(1));
    CHECK(std::abs(decay_at(shape, 1)) < 1e-12);
    CHECK(parse_decay_shape(to_string(shape)) == shape);
  }
  CHECK(decay_at(DecayShape::one_minus_sqrt, 0.25) == Approx(0.5));
  CHECK_THROWS_AS(parse_decay_shape("steps"), Error);
}

}  // namespace
}  // namespace kiln
