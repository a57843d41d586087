#pragma once
#include <array>
#include <span>
#include <string>

#include "optim/optimizer.h"

namespace kiln {

/// Elements of the flat tensor that share one scale.
inline constexpr std::int64_t kStateBlock = 256;
/// Blocks that a thread takes at least.
inline constexpr std::int64_t kStateGrain = 16;

enum class StateValues { any, positive };
enum class StateRounding { stochastic, nearest };  // of bf16

/// The 256 values of 8-bit states, ascending, and thresholds[k] between values k and k+1 (the last is infinite).
struct StateMap {
  std::array<float, 256> values, thresholds;
};
/// The dynamic map (Dettmers et al. 2022, arXiv:2110.02861). It holds 0, 1 and in each decade i = 0..6 the numbers
///   10^(i-6) (0.1 + 0.9 (j + 1/2) / n),  j = 0..n-1
/// with n = 2^i of either sign (any), or n = 2^(i+1) (positive); computed in f64 and rounded to f32. A threshold is
/// (values[k] + values[k+1]) * 0.5 in f32. But thresholds[0] of the positive map is 0: a second moment that is not zero
/// never becomes zero, where its step would be m / eps (Li, Chen & Zhu 2023, arXiv:2309.01507, on the zero point).
const StateMap& state_map(StateValues values);
/// Number of thresholds below x, -1 <= x <= 1: the nearest value, of two equally near the lower.
std::uint8_t state_code(const StateMap& map, float x);

/// A state as one step sees it: decoded and encoded in blocks. Borrows the tensors.
template <typename T>
class StateView {
 public:
  std::int64_t numel() const { return numel_; }
  /// Elements [first, first + count), first a multiple of kStateBlock and count at most that: where they lie when they
  /// are stored in full precision, else decoded into `buffer`.
  T* load(std::int64_t first, std::int64_t count, T* buffer) const;
  /// Stores what load() gave. `values` may be the state itself.
  void store(std::int64_t first, std::int64_t count, const T* values) const;
  /// All elements, with all threads: the state itself in full precision, else decoded into `buffer` [numel].
  T* load_all(T* buffer) const;
  void store_all(const T* values) const;

 private:
  friend class StateStore;
  void* data_ = nullptr;
  T* scales_ = nullptr;
  std::int64_t numel_ = 0;
  StatePrecision precision_ = StatePrecision::fp32;
  StateValues values_ = StateValues::any;
  StateRounding rounding_ = StateRounding::stochastic;
  std::uint64_t seed_ = 0, stream_ = 0;
};

/// How one state of a parameter is stored.
///
/// fp32  as computed (f64 where weights are f64)
/// bf16  element e of step t: the upper half of the f32 bits + 16 random bits. These are half e%2 (low half first) of
///       word (e/2)%4 of Philox(seed ^ t * 0x9E3779B97F4A7C15, stream_of("PARAMETER.STATE")).block(e/8). Or rounded to
///       nearest, for a state that is written whole and not added to.
/// int8  u8 codes, and in a tensor STATE_scale [ceil(numel / 256)] the largest magnitude of each block, f32:
///       code = state_code(map, x / scale), value = map[code] * scale, with f32 division and product. A block of zeros
///       has scale 0 and the code of 0.
class StateStore {
 public:
  struct Options {
    std::string name;  // "exp_avg"
    Shape shape;
    StatePrecision precision = StatePrecision::fp32;
    StateValues values = StateValues::any;
    StateRounding rounding = StateRounding::stochastic;
    std::uint64_t seed = 1;
  };
  StateStore(const Parameter& parameter, const Options& options);
  /// One tensor, or codes and scales.
  void append_specs(std::vector<StateSpec>& list) const;
  /// Takes its tensors off the front of `states`.
  template <typename T>
  StateView<T> view(std::span<const Tensor>& states, std::int64_t step) const;
  StatePrecision precision() const { return options_.precision; }
  std::uint64_t stream() const { return stream_; }

 private:
  Options options_;
  std::uint64_t stream_;
};

/// Precision of a parameter's states: instead of int8, vectors (norms) have fp32, which costs nothing beside the
/// matrices.
StatePrecision stored_precision(const Parameter& parameter, StatePrecision wanted);

}  // namespace kiln
