#include "report/tensorboard.h"

#include <cstring>
#include <limits>
#include <set>
#include <vector>

#include "base/error.h"
#include "catch.h"
#include "support.h"

using namespace kiln;

namespace {

/// The payloads of a file of TFRecords; fails the test on a wrong length or checksum.
std::vector<std::string> records(const std::string& file) {
  std::vector<std::string> all;
  const auto masked = [](std::string_view bytes) {
    const std::uint32_t crc = crc32c(bytes);
    return static_cast<std::uint32_t>((crc >> 15 | crc << 17) + 0xA282EAD8U);
  };
  const auto read32 = [&](std::size_t at) {
    std::uint32_t value = 0;
    std::memcpy(&value, file.data() + at, 4);
    return value;
  };
  for (std::size_t at = 0; at < file.size();) {
    std::uint64_t length = 0;
    REQUIRE(at + 16 <= file.size());
    std::memcpy(&length, file.data() + at, 8);
    REQUIRE(at + 16 + length <= file.size());
    CHECK(read32(at + 8) == masked(std::string_view(file).substr(at, 8)));
    all.push_back(file.substr(at + 12, length));
    CHECK(read32(at + 12 + length) == masked(all.back()));
    at += 16 + length;
  }
  return all;
}

std::set<std::filesystem::path> files_in(const std::filesystem::path& dir) {
  std::set<std::filesystem::path> files;
  for (const auto& entry : std::filesystem::directory_iterator(dir)) files.insert(entry.path());
  return files;
}

}  // namespace

TEST_CASE("crc32c: known answers of RFC 3720, appendix B.4") {
  std::string ascending(32, '\0');
  for (std::size_t i = 0; i < 32; ++i) ascending[i] = static_cast<char>(i);
  CHECK(crc32c("") == 0);
  CHECK(crc32c("123456789") == 0xE3069283);
  CHECK(crc32c(std::string(32, '\0')) == 0x8A9136AA);
  CHECK(crc32c(std::string(32, '\xFF')) == 0x62A8AB43);
  CHECK(crc32c(ascending) == 0x46DD794E);
}

TEST_CASE("tensorboard: records equal those of the Python package, byte for byte") {
  constexpr double kWallTime = 1700000000.25;
  EventRecord record;
  std::string bytes(record.file_version(kWallTime));
  bytes += record.session_start(kWallTime, 301);
  bytes += record.scalar(kWallTime, 0, "train/loss", 10.375F);
  bytes += record.scalar(kWallTime, 1, "train/loss", 0.0F);
  bytes += record.scalar(kWallTime, 300, "train/lr", 0.001F);
  bytes += record.scalar(kWallTime, std::int64_t{1} << 40, "valid/loss", std::numeric_limits<float>::infinity());
  bytes += record.scalar(kWallTime, 7, std::string(200, 'x'), -1.5F);
  CHECK(bytes == slurp(std::filesystem::path(KILN_GOLDEN_DIR) / "report/scalars.tfevents"));
}

TEST_CASE("tensorboard: a tag that does not fit is a usage error, the longest fits") {
  EventRecord record;
  CHECK(records(std::string(record.scalar(1, 1, std::string(512, 'x'), 1.0F))).size() == 1);
  CHECK_THROWS_AS(record.scalar(1, 1, std::string(513, 'x'), 1.0F), Error);
}

TEST_CASE("tensorboard: a resumed run writes a later file that hides the steps after the checkpoint") {
  TempDir dir;
  TensorBoardWriter(dir.path / "tb", 0).scalar("a", 1.0, 1);
  const auto first = files_in(dir.path / "tb");
  REQUIRE(first.size() == 1);
  const auto fresh = records(slurp(*first.begin()));
  REQUIRE(fresh.size() == 2);
  CHECK_THAT(fresh[0], ContainsSubstring("brain.Event:2"));

  TensorBoardWriter(dir.path / "tb", 300).scalar("a", 2.0, 301);
  const auto both = files_in(dir.path / "tb");
  REQUIRE(both.size() == 2);
  CHECK(*both.begin() == *first.begin());
  const auto resumed = records(slurp(*both.rbegin()));
  REQUIRE(resumed.size() == 3);
  CHECK_THAT(resumed[0], ContainsSubstring("brain.Event:2"));
  CHECK(resumed[1].substr(9) == "\x10\xAD\x02\x3A\x02\x08\x01");  // step 301, session_log {status: START}

  TensorBoardWriter again(dir.path / "tb", 0);
  CHECK(records(slurp(*files_in(dir.path / "tb").rbegin()))[1].substr(9) == "\x3A\x02\x08\x01");  // step 0 and later
}

TEST_CASE("tensorboard: a step's fields each have their tag, and nothing is allocated") {
  TempDir dir;
  TensorBoardWriter writer(dir.path, 0);
  StepMetrics m = metrics_at(5);
  writer.step(m);
  m.valid_loss = 3.0;
  const long before = allocations;
  for (int i = 0; i < 100; ++i) writer.step(m);
  CHECK(allocations == before);
  const std::string file = slurp(*files_in(dir.path).begin());
  CHECK(records(file).size() == 1 + 8 + 100 * 9);
  for (const char* tag : {"train/loss", "train/tokens_per_s", "train/memory_bytes", "valid/loss"})
    CHECK_THAT(file, ContainsSubstring(tag));
  CHECK(file.find("train/step\x15") == std::string::npos);
  CHECK(file.find("rescue") == std::string::npos);
  m.rescue = RescueEvent{.number = 3};
  writer.step(m);
  const auto all = records(slurp(*files_in(dir.path).begin()));
  CHECK(all.size() == 1 + 8 + 100 * 9 + 10);
  const std::string three("\x15\x00\x00\x40\x40", 5);  // simple_value 3.0f
  CHECK_THAT(all.back(), ContainsSubstring("train/rescue" + three));
}
