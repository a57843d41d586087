#include "merge/write_averages.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>

#include "core/parallel.h"
#include "core/tensor.h"

namespace kiln {
namespace {

// Elements averaged before they are written: they are still in the second-level cache then.
constexpr std::size_t kPart = 1 << 16;
constexpr std::uint64_t kWriteback = std::uint64_t{2} << 20;
constexpr std::size_t kMappedBytes = std::size_t{48} << 20;

struct Piece {
  std::size_t item;  // of the writer's layout
  const Sources* sources;
  std::uint64_t first, count;
  std::uint64_t position;  // of the first in the file, in elements
};

/// Pieces, and parts of them, end at multiples of their size in the file: pages that two writes share cost twice.
std::vector<Piece> pieces_of(const AverageSink& sink, const std::map<std::string, Sources>& sources,
                             std::size_t piece_elements) {
  std::vector<Piece> pieces;
  for (std::size_t i = 0; i < sink.layout().size(); ++i) {
    const Sources& tensor = sources.at(sink.layout()[i].name);
    const SafetensorEntry& entry = *tensor.front().entry;
    const std::uint64_t elements = (entry.end - entry.begin) / size_of(entry.dtype);
    const std::uint64_t begin = sink.offset(i) / size_of(sink.layout()[i].dtype);
    for (std::uint64_t first = 0, count = 0; first < elements; first += count) {
      count = std::min<std::uint64_t>(piece_elements - (begin + first) % piece_elements, elements - first);
      pieces.push_back({i, &tensor, first, count, begin + first});
    }
  }
  return pieces;
}

/// As many elements that all threads together hold kMappedBytes of inputs at most, unless they are very many.
std::size_t bounded(std::size_t piece_elements, const std::map<std::string, Sources>& sources) {
  std::size_t bytes = 1;  // of one element in all inputs
  for (const auto& [name, tensor] : sources) {
    std::size_t here = 0;
    for (const ModelTensors::Source& source : tensor) here += size_of(source.entry->dtype);
    bytes = std::max(bytes, here);
  }
  const std::size_t fitting = kMappedBytes / bytes / static_cast<std::size_t>(thread_count());
  return std::min(piece_elements, std::max(fitting, kPart));
}

/// The pieces and what the threads that take them share.
class PieceQueue {
 public:
  PieceQueue(AverageSink& sink, std::vector<Piece> pieces, std::span<const double> weights, std::size_t piece_elements,
             InputHashes* hashes)
      : sink_(sink),
        hashes_(hashes),
        pieces_(std::move(pieces)),
        weights_(weights),
        part_elements_(std::min(piece_elements, kPart)),
        buffer_bytes_(part_elements_ * sizeof(double)),
        first_fault_(pieces_.size()) {}

  /// What every thread runs: takes pieces in order until none is left or one has failed.
  void work() {
    try {
      const Buffer buffer(buffer_bytes_, "part of an average");
      while (!failed_) {
        const std::size_t at = next_.fetch_add(1);
        if (at >= pieces_.size()) return;
        if (!write_piece(pieces_[at], buffer)) note_fault(at);
      }
    } catch (...) {  // must not leave the thread; finish() throws it
      const std::lock_guard lock(mutex_);
      if (!error_) error_ = std::current_exception();
      failed_ = true;
    }
  }

  void finish() const {
    if (error_) std::rethrow_exception(error_);
    if (first_fault_ == pieces_.size()) return;
    const Piece& piece = pieces_[first_fault_];
    fail_not_finite(*piece.sources, piece.first, piece.count, sink_.layout()[piece.item].dtype);
  }

 private:
  bool write_piece(const Piece& piece, const Buffer& buffer) {
    const DType dtype = sink_.layout()[piece.item].dtype;
    for (std::uint64_t at = 0, count = 0; at < piece.count; at += count) {
      const std::uint64_t first = piece.first + at;
      count = std::min<std::uint64_t>(part_elements_ - (piece.position + at) % part_elements_, piece.count - at);
      const std::span<std::byte> out(buffer.data(), count * size_of(dtype));
      if (!average(*piece.sources, weights_, first, dtype, out)) return false;
      if (hashes_ != nullptr)
        for (const ModelTensors::Source& source : *piece.sources) hashes_->add(source, first, count);
      sink_.put(piece.item, first * size_of(dtype), out);
    }
    const std::uint64_t begin = piece.position * size_of(dtype), end = begin + piece.count * size_of(dtype);
    if (begin / kWriteback < end / kWriteback)
      sink_.done(begin / kWriteback * kWriteback, end / kWriteback * kWriteback);
    memory_.done(*piece.sources, piece.first, piece.count);
    return true;
  }

  /// Pieces before a faulty one were taken before it and get finished, so the first of all is found on any number of
  /// threads.
  void note_fault(std::size_t at) {
    const std::lock_guard lock(mutex_);
    first_fault_ = std::min(first_fault_, at);
    failed_ = true;
  }

  AverageSink& sink_;
  InputHashes* hashes_;
  std::vector<Piece> pieces_;
  std::span<const double> weights_;
  std::size_t part_elements_, buffer_bytes_;  // of a thread
  InputMemory memory_;
  std::atomic<std::size_t> next_ = 0;
  std::atomic<bool> failed_ = false;
  std::mutex mutex_;  // guards what follows
  std::size_t first_fault_;
  std::exception_ptr error_;
};

}  // namespace

void write_averages(AverageSink& sink, const std::map<std::string, Sources>& sources, std::span<const double> weights,
                    std::size_t piece_elements, InputHashes* hashes) {
  piece_elements = bounded(piece_elements, sources);
  if (hashes != nullptr && hashes->empty()) hashes = nullptr;
  // Threads that hash follow each other closely, so that a piece whose turn comes later is still in a shared cache.
  if (hashes != nullptr) piece_elements = std::min(piece_elements, kPart);
  PieceQueue queue(sink, pieces_of(sink, sources, piece_elements), weights, piece_elements, hashes);
  parallel_for(thread_count(), 1, [&](std::int64_t, std::int64_t) { queue.work(); });
  queue.finish();
}

}  // namespace kiln
