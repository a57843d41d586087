#include "io/safetensors.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <set>

namespace kiln {
namespace {

struct NamedDType {
  std::string_view name;
  DType dtype;
};
constexpr std::array<NamedDType, 10> kNames{{{"F32", DType::f32},
                                             {"F64", DType::f64},
                                             {"BF16", DType::bf16},
                                             {"F16", DType::f16},
                                             {"I8", DType::i8},
                                             {"U8", DType::u8},
                                             {"U16", DType::u16},
                                             {"I32", DType::i32},
                                             {"U32", DType::u32},
                                             {"I64", DType::i64}}};

/// Elements of a shape; a data Error when a size is negative or the product overflows.
std::uint64_t element_count(const std::vector<std::int64_t>& shape, const std::string& what) {
  std::uint64_t count = 1;
  for (const std::int64_t size : shape)
    if (size < 0 || __builtin_mul_overflow(count, static_cast<std::uint64_t>(size), &count))
      fail(ExitCode::data, "{}: shape [{}] is not possible; the file is damaged", what, fmt::join(shape, ","));
  return count;
}

/// The JSON header of a file, after checking that it is whole.
Json parse_header(std::span<const std::byte> bytes, const std::string& path, std::uint64_t& data_begin) {
  std::uint64_t length = 0;
  if (bytes.size() < sizeof(length))
    fail(ExitCode::data, "{}: {} bytes, expected at least 8; the file is torn", path, bytes.size());
  std::memcpy(&length, bytes.data(), sizeof(length));
  if (length > bytes.size() - sizeof(length))
    fail(ExitCode::data, "{}: the header says {} bytes, the file has {}; it is torn or no safetensors file", path,
         length, bytes.size() - sizeof(length));
  data_begin = sizeof(length) + length;
  const auto* text = reinterpret_cast<const char*>(bytes.data()) + sizeof(length);
  Json header = Json::parse(text, text + length, nullptr, false);
  if (!header.is_object()) fail(ExitCode::data, "{}: the header is not a JSON object; the file is damaged", path);
  return header;
}

SafetensorEntry parse_entry(const std::string& name, const Json& json, const std::string& path) {
  const std::string what = fmt::format("{}: tensor '{}'", path, name);
  SafetensorEntry entry;
  entry.name = name;
  std::string dtype;
  try {
    dtype = json.at("dtype").get<std::string>();
    entry.shape = json.at("shape").get<std::vector<std::int64_t>>();
    const Json& offsets = json.at("data_offsets");
    entry.begin = offsets.at(0).get<std::uint64_t>();
    entry.end = offsets.at(1).get<std::uint64_t>();
  } catch (const nlohmann::json::exception&) {
    fail(ExitCode::data, "{} lacks a valid dtype, shape or data_offsets; the file is damaged", what);
  }
  const auto* known = std::find_if(kNames.begin(), kNames.end(), [&](const NamedDType& n) { return n.name == dtype; });
  if (known == kNames.end()) fail(ExitCode::data, "{} has dtype '{}', which kiln does not read", what, dtype);
  entry.dtype = known->dtype;
  const std::uint64_t bytes = element_count(entry.shape, what) * size_of(entry.dtype);
  if (entry.end < entry.begin || entry.end - entry.begin != bytes)
    fail(ExitCode::data, "{} spans bytes [{}, {}), expected {} bytes for {} [{}]", what, entry.begin, entry.end, bytes,
         dtype, fmt::join(entry.shape, ","));
  return entry;
}

template <typename From, typename To>
void convert(const std::byte* source, std::span<To> out) {
  for (std::size_t i = 0; i < out.size(); ++i) {
    From value;
    std::memcpy(&value, source + i * sizeof(From), sizeof(From));
    if constexpr (std::is_same_v<From, float> || std::is_same_v<From, double>)
      out[i] = static_cast<To>(value);
    else
      out[i] = static_cast<To>(to_float(value));
  }
}

template <typename To>
void read_as(const SafetensorsReader& reader, const SafetensorEntry& entry, std::uint64_t first, std::span<To> out) {
  const std::span<const std::byte> bytes = reader.bytes(entry);
  const std::size_t size = size_of(entry.dtype);
  check((first + out.size()) * size <= bytes.size(), "tensor '{}': elements [{}, {}) of {}", entry.name, first,
        first + out.size(), bytes.size() / size);
  const std::byte* source = bytes.data() + first * size;
  switch (entry.dtype) {
    case DType::f32:
      return convert<float>(source, out);
    case DType::f64:
      return convert<double>(source, out);
    case DType::bf16:
      return convert<bfloat16>(source, out);
    case DType::f16:
      return convert<float16>(source, out);
    default:
      fail(ExitCode::data, "{}: tensor '{}' is {}, expected floating-point weights", reader.path().string(), entry.name,
           safetensors_name(entry.dtype));
  }
}

/// `offsets` and `total` count from the end of the header.
Json header_of(const std::vector<SafetensorsWriter::Item>& items, const std::map<std::string, std::string>& metadata,
               std::vector<std::uint64_t>& offsets, std::uint64_t& total) {
  Json header = Json::object();
  if (!metadata.empty()) header["__metadata__"] = metadata;
  total = 0;
  for (const SafetensorsWriter::Item& item : items) {
    offsets.push_back(total);
    const std::uint64_t bytes = element_count(item.shape, item.name) * size_of(item.dtype);
    header[item.name] = {
        {"dtype", safetensors_name(item.dtype)}, {"shape", item.shape}, {"data_offsets", {total, total + bytes}}};
    total += bytes;
  }
  return header;
}

}  // namespace

std::string_view safetensors_name(DType dtype) {
  for (const NamedDType& named : kNames)
    if (named.dtype == dtype) return named.name;
  fail(ExitCode::usage, "dtype {} has no safetensors name", to_string(dtype));
}

DType safetensors_dtype(std::string_view name) {
  for (const NamedDType& named : kNames)
    if (named.name == name) return named.dtype;
  fail(ExitCode::data, "safetensors dtype '{}' is not known", name);
}

SafetensorsReader::SafetensorsReader(const std::filesystem::path& path) : path_(path), file_(path), reads_(path) {
  file_.expect_sequential();
  const Json header = parse_header(file_.bytes(), path.string(), data_begin_);
  std::set<std::string> names;
  for (const auto& [name, value] : header.items()) {
    if (!names.insert(name).second)
      fail(ExitCode::data, "{}: tensor '{}' appears twice; the file is damaged", path.string(), name);
    if (name != "__metadata__") {
      entries_.push_back(parse_entry(name, value, path.string()));
      continue;
    }
    for (const auto& [key, text] : value.items())
      metadata_[key] = text.is_string() ? text.get<std::string>() : text.dump();
  }
  std::sort(entries_.begin(), entries_.end(), [](const SafetensorEntry& a, const SafetensorEntry& b) {
    return std::pair(a.begin, a.end) < std::pair(b.begin, b.end);
  });
  std::uint64_t expected = 0;
  for (const SafetensorEntry& entry : entries_) {
    if (entry.begin != expected)
      fail(ExitCode::data, "{}: tensor '{}' begins at byte {}, expected {}; the file is damaged", path.string(),
           entry.name, entry.begin, expected);
    expected = entry.end;
  }
  if (expected != file_.bytes().size() - data_begin_)
    fail(ExitCode::data, "{}: {} bytes of tensors, the header describes {}; the file is torn, copy it again",
         path.string(), file_.bytes().size() - data_begin_, expected);
}

const SafetensorEntry* SafetensorsReader::find(const std::string& name) const {
  const auto found =
      std::find_if(entries_.begin(), entries_.end(), [&](const SafetensorEntry& e) { return e.name == name; });
  return found == entries_.end() ? nullptr : &*found;
}

std::span<const std::byte> SafetensorsReader::bytes(const SafetensorEntry& entry) const {
  return file_.bytes().subspan(data_begin_ + entry.begin, entry.end - entry.begin);
}

void SafetensorsReader::read_bytes(const SafetensorEntry& entry, std::uint64_t offset, std::span<std::byte> out) const {
  check(offset + out.size() <= entry.end - entry.begin, "tensor '{}': bytes [{}, {}) of {}", entry.name, offset,
        offset + out.size(), entry.end - entry.begin);
  reads_.read(data_begin_ + entry.begin + offset, out);
}

void SafetensorsReader::read_floats(const SafetensorEntry& entry, std::uint64_t first, std::span<float> out) const {
  read_as(*this, entry, first, out);
}

void SafetensorsReader::read_floats(const SafetensorEntry& entry, std::uint64_t first, std::span<double> out) const {
  read_as(*this, entry, first, out);
}

std::vector<SafetensorsWriter::Item> in_layout_order(std::vector<SafetensorsWriter::Item> items) {
  using Item = SafetensorsWriter::Item;
  std::stable_sort(items.begin(), items.end(), [](const Item& a, const Item& b) {
    return std::pair(-static_cast<int>(size_of(a.dtype)), std::string_view(a.name)) <
           std::pair(-static_cast<int>(size_of(b.dtype)), std::string_view(b.name));
  });
  return items;
}

SafetensorsWriter::SafetensorsWriter(const std::filesystem::path& path, std::vector<Item> items,
                                     std::map<std::string, std::string> metadata)
    : path_(path), items_(in_layout_order(std::move(items))) {
  std::string header = header_of(items_, metadata, offsets_, expected_).dump();
  header.resize((header.size() + 7) / 8 * 8, ' ');
  descriptor_ = ::open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  if (descriptor_ < 0) fail(ExitCode::data, "{}: cannot be written ({})", path.string(), std::strerror(errno));
  const std::uint64_t length = header.size();
  expected_ += sizeof(length) + length;
  for (std::uint64_t& offset : offsets_) offset += sizeof(length) + length;
  reserve();
  append(std::as_bytes(std::span(&length, 1)));
  append(std::as_bytes(std::span(header)));
}

/// Finds a full disk out before the work, and spares each write its search for blocks. The size stays what was written,
/// by which readers know a torn file.
void SafetensorsWriter::reserve() {
  if (expected_ == 0 || ::fallocate(descriptor_, FALLOC_FL_KEEP_SIZE, 0, static_cast<off_t>(expected_)) == 0) return;
  if (errno != ENOSPC && errno != EDQUOT) return;  // not every file system can; then writes find out
  fail(ExitCode::resource, "{}: {} bytes do not fit on the disk ({}); free some space and try again", path_.string(),
       expected_, std::strerror(errno));
}

SafetensorsWriter::~SafetensorsWriter() {
  if (descriptor_ >= 0) ::close(descriptor_);
}

void SafetensorsWriter::append(std::span<const std::byte> bytes) { put(written_, bytes); }

void SafetensorsWriter::write_at(std::size_t index, std::uint64_t offset, std::span<const std::byte> bytes) {
  const std::uint64_t end = index + 1 < offsets_.size() ? offsets_[index + 1] : expected_;
  check(offsets_.at(index) + offset + bytes.size() <= end, "{}: more bytes of '{}' than the header describes",
        path_.string(), items_[index].name);
  put(offsets_[index] + offset, bytes);
}

void SafetensorsWriter::start_writeback(std::uint64_t begin, std::uint64_t end) const {
  // Where a file system cannot, finish() does it all.
  ::sync_file_range(descriptor_, static_cast<off_t>(begin), static_cast<off_t>(end - begin), SYNC_FILE_RANGE_WRITE);
}

void SafetensorsWriter::put(std::uint64_t at, std::span<const std::byte> bytes) {
  check(at + bytes.size() <= expected_, "{}: more bytes than the header describes", path_.string());
  written_ += bytes.size();
  while (!bytes.empty()) {
    const ssize_t n = ::pwrite(descriptor_, bytes.data(), bytes.size(), static_cast<off_t>(at));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0)
      fail(ExitCode::resource, "{}: writing failed ({}); free some space and try again", path_.string(),
           std::strerror(errno));
    bytes = bytes.subspan(static_cast<std::size_t>(n));
    at += static_cast<std::uint64_t>(n);
  }
}

void SafetensorsWriter::finish() {
  check(written_ == expected_, "{}: {} bytes written, the header describes {}", path_.string(), written_.load(),
        expected_);
  if (::fsync(descriptor_) != 0)
    fail(ExitCode::resource, "{}: fsync failed ({})", path_.string(), std::strerror(errno));
  ::close(descriptor_);
  descriptor_ = -1;
}

}  // namespace kiln
