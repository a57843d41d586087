#include "merge/merge_bench.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <exception>
#include <functional>
#include <mutex>

#include "base/error.h"
#include "core/parallel.h"
#include "merge/input_hashes.h"
#include "merge/model_shards.h"
#include "merge/streaming_merge.h"
#include "merge/write_averages.h"

namespace kiln {
namespace {

/// Takes averages and keeps nothing, as a file without a header would lay them out.
class DiscardingSink : public AverageSink {
 public:
  explicit DiscardingSink(std::vector<SafetensorsWriter::Item> items) : items_(std::move(items)) {
    std::uint64_t at = 0;
    for (const SafetensorsWriter::Item& item : items_) {
      offsets_.push_back(at);
      std::uint64_t bytes = size_of(item.dtype);
      for (const std::int64_t size : item.shape) bytes *= static_cast<std::uint64_t>(size);
      at += bytes;
    }
  }
  const std::vector<SafetensorsWriter::Item>& layout() const override { return items_; }
  std::uint64_t offset(std::size_t index) const override { return offsets_.at(index); }
  void put(std::size_t, std::uint64_t, std::span<const std::byte> bytes) override { bytes_ += bytes.size(); }
  void done(std::uint64_t, std::uint64_t) override {}
  std::uint64_t bytes() const { return bytes_; }

 private:
  std::vector<SafetensorsWriter::Item> items_;
  std::vector<std::uint64_t> offsets_;
  std::atomic<std::uint64_t> bytes_ = 0;
};

double seconds_of(const std::function<void()>& work) {
  const auto begin = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

/// Every tensor of every input by preads, each thread into 1 MiB of its own.
void read_all(const std::vector<MergeInput>& inputs) {
  constexpr std::uint64_t kPiece = std::uint64_t{1} << 20;
  struct Part {
    const ModelTensors::Source* source;
    std::uint64_t first, bytes;
  };
  std::vector<Part> parts;
  for (const MergeInput& input : inputs)
    for (const auto& [name, source] : input.model->all()) {
      const std::uint64_t bytes = source.entry->end - source.entry->begin;
      for (std::uint64_t at = 0; at < bytes; at += kPiece) parts.push_back({&source, at, std::min(kPiece, bytes - at)});
    }
  std::atomic<std::size_t> next = 0;
  std::mutex mutex;
  std::exception_ptr error;
  parallel_for(thread_count(), 1, [&](std::int64_t, std::int64_t) {
    try {
      std::vector<std::byte> buffer(kPiece);
      for (std::size_t i = next.fetch_add(1); i < parts.size(); i = next.fetch_add(1))
        parts[i].source->file->read_bytes(*parts[i].source->entry, parts[i].first,
                                          std::span(buffer).first(parts[i].bytes));
    } catch (...) {  // must not leave the thread
      const std::lock_guard lock(mutex);
      error = std::current_exception();
    }
  });
  if (error) std::rethrow_exception(error);
}

double median(std::vector<double> x) {
  std::sort(x.begin(), x.end());
  return (x[(x.size() - 1) / 2] + x[x.size() / 2]) / 2;
}

}  // namespace

MergeBench bench_merge(const std::vector<std::filesystem::path>& directories, int rounds) {
  check(rounds >= 1, "{} rounds; measure 1 or more", rounds);
  const std::vector<MergeInput> inputs = open_inputs(directories, Hashes::none);
  const std::vector<double> weights = merge_weights({}, inputs.size());
  std::vector<SafetensorsWriter::Item> items;
  std::map<std::string, Sources> sources;
  MergeBench bench;
  for (const auto& [name, first] : inputs.front().model->all()) {
    items.push_back({name, DType::f32, first.entry->shape});
    for (const MergeInput& input : inputs) {
      sources[name].push_back(input.model->all().at(name));
      bench.bytes += sources[name].back().entry->end - sources[name].back().entry->begin;
    }
  }
  items = in_layout_order(std::move(items));
  const auto merge = [&](bool hashed) {
    DiscardingSink sink(items);
    InputHashes hashes;
    for (const MergeInput& input : inputs)
      for (const auto& file : input.model->files())
        if (hashed)
          check(hashes.follow(*file, items),
                "{}: its tensors lie in another order than they are averaged in; save the model again",
                file->path().string());
    write_averages(sink, sources, weights, MergeOptions{}.chunk_elements, &hashes);
  };
  std::vector<double> read, average, with_hashes, average_fraction, hashed_fraction;
  for (int round = 0; round <= rounds; ++round) {
    const double r = seconds_of([&] { read_all(inputs); }), a = seconds_of([&] { merge(false); }),
                 h = seconds_of([&] { merge(true); });
    if (round == 0) continue;
    read.push_back(r);
    average.push_back(a);
    with_hashes.push_back(h);
    average_fraction.push_back(r / a);
    hashed_fraction.push_back(r / h);
  }
  bench.read_seconds = median(read);
  bench.average_seconds = median(average);
  bench.hashed_seconds = median(with_hashes);
  bench.average_fraction = median(average_fraction);
  bench.hashed_fraction = median(hashed_fraction);
  return bench;
}

}  // namespace kiln
