#include "io/safetensors.h"

#include <cstring>
#include <fstream>

#include "catch.h"

namespace kiln {
namespace {

namespace fs = std::filesystem;

struct Scratch {
  fs::path path;
  Scratch() {
    std::string pattern = (fs::temp_directory_path() / "kiln-safetensors-XXXXXX").string();
    path = ::mkdtemp(pattern.data());
  }
  ~Scratch() { fs::remove_all(path); }
};

template <typename T>
std::vector<std::byte> raw(std::vector<T> values) {
  const auto bytes = std::as_bytes(std::span(values));
  return {bytes.begin(), bytes.end()};
}

fs::path reference() { return fs::path(KILN_GOLDEN_DIR) / "reference.safetensors"; }

TEST_CASE("files of the reference writer are read") {
  const SafetensorsReader file(reference());
  CHECK(file.metadata().at("format") == "pt");
  CHECK(file.entries().size() == 6);
  const SafetensorEntry* weight = file.find("weight");
  REQUIRE(weight != nullptr);
  CHECK(weight->shape == std::vector<std::int64_t>{2, 3});
  std::vector<float> part(2);
  file.read_floats(*weight, 3, part);
  CHECK(part == std::vector<float>{0.75f, 1.0f});
  std::vector<double> half(3);
  file.read_floats(*file.find("half"), 0, half);
  CHECK(half == std::vector<double>{1.5, -2.25, 65504.0});
  CHECK(file.find("scalar")->shape.empty());
  CHECK(file.find("none") == nullptr);
  CHECK_THROWS_AS(file.read_floats(*weight, 5, part), Error);
  CHECK_THROWS_WITH(file.read_floats(*file.find("index"), 0, part), ContainsSubstring("'index' is I64"));
}

TEST_CASE("the writer lays a file out byte for byte as the reference does") {
  const Scratch scratch;
  const fs::path path = scratch.path / "x.safetensors";
  SafetensorsWriter writer(path, {{"weight", DType::f32, {2, 3}},
                                  {"half", DType::f16, {3}},
                                  {"wide", DType::f64, {1, 2}},
                                  {"index", DType::i64, {3}},
                                  {"bytes", DType::u8, {1}},
                                  {"scalar", DType::f32, {}}});
  const SafetensorsReader golden(reference());
  for (const SafetensorsWriter::Item& item : writer.layout()) {
    const auto bytes = golden.bytes(*golden.find(item.name));
    writer.append(bytes.first(bytes.size() / 2));  // in pieces
    writer.append(bytes.subspan(bytes.size() / 2));
  }
  writer.finish();
  CHECK(read_text(path) == read_text(reference()));
}

TEST_CASE("pieces written in place, in any order, make the same file") {
  const Scratch scratch;
  const SafetensorsReader golden(reference());
  std::vector<SafetensorsWriter::Item> items;
  for (const SafetensorEntry& entry : golden.entries()) items.push_back({entry.name, entry.dtype, entry.shape});
  SafetensorsWriter writer(scratch.path / "x.safetensors", items);
  for (std::size_t i = items.size(); i-- > 0;) {
    const auto bytes = golden.bytes(*golden.find(writer.layout()[i].name));
    const std::size_t half = bytes.size() / 2;
    writer.write_at(i, half, bytes.subspan(half));
    writer.write_at(i, 0, bytes.first(half));
  }
  CHECK_THROWS_WITH(writer.write_at(0, 1, golden.bytes(*golden.find(writer.layout()[0].name))),
                    ContainsSubstring("more bytes of"));
  writer.finish();
  CHECK(read_text(scratch.path / "x.safetensors") == read_text(reference()));
}

TEST_CASE("a file that is torn, damaged or hostile is refused with its fault") {
  const Scratch scratch;
  const fs::path path = scratch.path / "bad.safetensors";
  auto error = [&](const std::string& header, std::size_t data, std::optional<std::uint64_t> length = {}) {
    std::ofstream out(path, std::ios::binary);
    const std::uint64_t size = length.value_or(header.size());
    out.write(reinterpret_cast<const char*>(&size), sizeof(size));
    out << header << std::string(data, 'x');
    out.close();
    try {
      SafetensorsReader reader(path);
    } catch (const Error& e) {
      CHECK(e.code() == ExitCode::data);
      return std::string(e.what());
    }
    return std::string("no error");
  };
  const std::string a = R"("a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]})";
  CHECK(error("{" + a + "}", 8) == "no error");
  CHECK_THAT(error("{" + a + "}", 7), ContainsSubstring("7 bytes of tensors, the header describes 8"));
  CHECK_THAT(error("{" + a + "}", 8, 1u << 30), ContainsSubstring("torn or no safetensors file"));
  CHECK_THAT(error("{" + a, 8), ContainsSubstring("not a JSON object"));
  CHECK_THAT(error(R"({"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}})", 8),
             ContainsSubstring("expected 12 bytes"));
  CHECK_THAT(error(R"({"a":{"dtype":"F9","shape":[2],"data_offsets":[0,8]}})", 8), ContainsSubstring("dtype 'F9'"));
  CHECK_THAT(error(R"({"a":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}})", 8), ContainsSubstring("not possible"));
  CHECK_THAT(error(R"({"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,8]}})", 8),
             ContainsSubstring("not possible"));
  CHECK_THAT(error(R"({"a":{"dtype":"F32","data_offsets":[0,8]}})", 8), ContainsSubstring("lacks a valid"));
  CHECK_THAT(error("{" + a + R"(,"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}})", 12),
             ContainsSubstring("begins at byte 4, expected 8"));
  CHECK_THAT(error("{" + a + R"(,"b":{"dtype":"F32","shape":[2],"data_offsets":[12,20]}})", 20),
             ContainsSubstring("begins at byte 12, expected 8"));
  fs::resize_file(path, 5);
  CHECK_THROWS_WITH(SafetensorsReader(path), ContainsSubstring("expected at least 8"));
  CHECK_THROWS_WITH(SafetensorsReader(scratch.path / "none"), ContainsSubstring("cannot be opened"));
}

TEST_CASE("a writer refuses too many bytes and too few") {
  const Scratch scratch;
  SafetensorsWriter writer(scratch.path / "x", {{"a", DType::f32, {2}}});
  writer.append(raw<float>({1}));
  CHECK_THROWS_AS(writer.finish(), Error);
  CHECK_THROWS_AS(writer.append(raw<float>({1, 2})), Error);
}

}  // namespace
}  // namespace kiln
