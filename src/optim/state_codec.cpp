#include "optim/state_codec.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "base/rng.h"
#include "core/parallel.h"

namespace kiln {
namespace {

constexpr std::uint64_t kStepMix = 0x9E3779B97F4A7C15u;

StateMap make_map(StateValues kind) {
  const bool positive = kind == StateValues::positive;
  StateMap map;
  std::size_t size = 0;
  map.values[size++] = 0.0f;
  map.values[size++] = 1.0f;
  for (int i = 0; i < 7; ++i) {
    const int n = positive ? 2 << i : 1 << i;
    for (int j = 0; j < n; ++j) {
      const double value = std::pow(10.0, i - 6) * (0.1 + 0.9 * (j + 0.5) / n);
      map.values[size++] = static_cast<float>(value);
      if (!positive) map.values[size++] = static_cast<float>(-value);
    }
  }
  std::sort(map.values.begin(), map.values.end());
  for (std::size_t k = 0; k + 1 < 256; ++k) map.thresholds[k] = (map.values[k] + map.values[k + 1]) * 0.5f;
  map.thresholds[255] = std::numeric_limits<float>::infinity();
  if (positive) map.thresholds[0] = 0.0f;
  return map;
}

/// Codes by the upper 16 bits of x: that of the least float with these bits. Two thresholds are further apart than such
/// floats, so one more comparison gives the code.
class CodeTable {
 public:
  explicit CodeTable(const StateMap& map) : map_(map) {
    for (std::uint32_t top = 0; top < table_.size(); ++top) {
      const std::uint32_t least = (top << 16) | ((top & 0x8000u) != 0 ? 0xffffu : 0u);
      const float x = std::bit_cast<float>(least);
      table_[top] = std::abs(x) <= 1.0f ? state_code(map, x) : std::uint8_t{0};
    }
  }
  std::uint8_t code(float x) const {
    const std::uint8_t low = table_[std::bit_cast<std::uint32_t>(x) >> 16];
    return static_cast<std::uint8_t>(low + (x > map_.thresholds[low] ? 1 : 0));
  }

 private:
  const StateMap& map_;
  std::array<std::uint8_t, 65536> table_;
};

const CodeTable& code_table(StateValues values) {
  static const CodeTable any(state_map(StateValues::any)), positive(state_map(StateValues::positive));
  return values == StateValues::positive ? positive : any;
}

/// 16 random bits for each element of a block, as StateStore says; many counters at a time, so that it vectorises.
void random_halves(std::uint64_t seed, std::uint64_t stream, std::int64_t first, std::uint16_t* out) {
  constexpr std::size_t kCounters = kStateBlock / 8;
  constexpr std::uint64_t kMul0 = 0xD2511F53u, kMul1 = 0xCD9E8D57u;
  std::uint32_t c0[kCounters], c1[kCounters], c2[kCounters], c3[kCounters];
  for (std::size_t l = 0; l < kCounters; ++l) {
    const std::uint64_t n = static_cast<std::uint64_t>(first) / 8 + l;
    c0[l] = static_cast<std::uint32_t>(n);
    c1[l] = static_cast<std::uint32_t>(n >> 32);
    c2[l] = static_cast<std::uint32_t>(stream);
    c3[l] = static_cast<std::uint32_t>(stream >> 32);
  }
  std::uint32_t key0 = static_cast<std::uint32_t>(seed), key1 = static_cast<std::uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    for (std::size_t l = 0; l < kCounters; ++l) {
      const std::uint64_t p0 = kMul0 * c0[l], p1 = kMul1 * c2[l];
      c0[l] = static_cast<std::uint32_t>(p1 >> 32) ^ c1[l] ^ key0;
      c1[l] = static_cast<std::uint32_t>(p1);
      c2[l] = static_cast<std::uint32_t>(p0 >> 32) ^ c3[l] ^ key1;
      c3[l] = static_cast<std::uint32_t>(p0);
    }
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  for (std::size_t l = 0; l < kCounters; ++l) {
    const std::uint32_t words[4] = {c0[l], c1[l], c2[l], c3[l]};
    for (std::size_t w = 0; w < 4; ++w) {
      out[8 * l + 2 * w] = static_cast<std::uint16_t>(words[w]);
      out[8 * l + 2 * w + 1] = static_cast<std::uint16_t>(words[w] >> 16);
    }
  }
}

template <typename T>
void round_stochastically(std::uint64_t seed, std::uint64_t stream, std::int64_t first, std::int64_t count,
                          const T* values, bfloat16* out) {
  std::uint16_t random[kStateBlock];
  random_halves(seed, stream, first, random);
  for (std::int64_t i = 0; i < count; ++i) {
    const std::uint32_t bits = std::bit_cast<std::uint32_t>(static_cast<float>(values[i]));
    const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
    out[i].bits = static_cast<std::uint16_t>((bits + (finite ? random[i] : std::uint16_t{0})) >> 16);
  }
}

template <typename T>
T encode_block(StateValues kind, std::int64_t count, const T* values, std::uint8_t* codes) {
  const CodeTable& table = code_table(kind);
  float x[kStateBlock], largest = 0;
  for (std::int64_t i = 0; i < count; ++i) x[i] = static_cast<float>(values[i]);
  for (std::int64_t i = 0; i < count; ++i) largest = std::max(largest, std::abs(x[i]));
  const float divisor = largest > 0 ? largest : 1.0f;
  for (std::int64_t i = 0; i < count; ++i) x[i] /= divisor;
  for (std::int64_t i = 0; i < count; ++i) codes[i] = table.code(x[i]);
  return static_cast<T>(largest);
}

template <typename T>
void decode_block(StateValues kind, std::int64_t count, const std::uint8_t* codes, T scale, T* out) {
  const std::array<float, 256>& map = state_map(kind).values;
  const float factor = static_cast<float>(scale);
  for (std::int64_t i = 0; i < count; ++i) out[i] = static_cast<T>(map[codes[i]] * factor);
}

std::int64_t block_count(std::int64_t elements) { return (elements + kStateBlock - 1) / kStateBlock; }

}  // namespace

const StateMap& state_map(StateValues values) {
  static const StateMap any = make_map(StateValues::any), positive = make_map(StateValues::positive);
  return values == StateValues::positive ? positive : any;
}

std::uint8_t state_code(const StateMap& map, float x) {
  const auto found = std::lower_bound(map.thresholds.begin(), map.thresholds.end(), x);
  return static_cast<std::uint8_t>(found - map.thresholds.begin());
}

template <typename T>
T* StateView<T>::load(std::int64_t first, std::int64_t count, T* buffer) const {
  if (precision_ == StatePrecision::fp32) return static_cast<T*>(data_) + first;
  if (precision_ == StatePrecision::bf16) {
    const bfloat16* half = static_cast<const bfloat16*>(data_) + first;
    for (std::int64_t i = 0; i < count; ++i)
      buffer[i] = static_cast<T>(std::bit_cast<float>(static_cast<std::uint32_t>(half[i].bits) << 16));
  } else {
    decode_block(values_, count, static_cast<const std::uint8_t*>(data_) + first, scales_[first / kStateBlock], buffer);
  }
  return buffer;
}

template <typename T>
void StateView<T>::store(std::int64_t first, std::int64_t count, const T* values) const {
  if (precision_ == StatePrecision::fp32) {
    T* own = static_cast<T*>(data_) + first;
    if (own != values) std::copy(values, values + count, own);
  } else if (precision_ == StatePrecision::int8) {
    scales_[first / kStateBlock] = encode_block(values_, count, values, static_cast<std::uint8_t*>(data_) + first);
  } else if (rounding_ == StateRounding::stochastic) {
    round_stochastically(seed_, stream_, first, count, values, static_cast<bfloat16*>(data_) + first);
  } else {
    for (std::int64_t i = 0; i < count; ++i)
      static_cast<bfloat16*>(data_)[first + i] = to_bfloat16(static_cast<float>(values[i]));
  }
}

template <typename T>
T* StateView<T>::load_all(T* buffer) const {
  if (precision_ == StatePrecision::fp32) return static_cast<T*>(data_);
  parallel_for(block_count(numel_), kStateGrain, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t first = begin * kStateBlock; first < std::min(end * kStateBlock, numel_); first += kStateBlock)
      load(first, std::min(kStateBlock, numel_ - first), buffer + first);
  });
  return buffer;
}

template <typename T>
void StateView<T>::store_all(const T* values) const {
  parallel_for(block_count(numel_), kStateGrain, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t first = begin * kStateBlock; first < std::min(end * kStateBlock, numel_); first += kStateBlock)
      store(first, std::min(kStateBlock, numel_ - first), values + first);
  });
}

StateStore::StateStore(const Parameter& parameter, const Options& options)
    : options_(options), stream_(stream_of((parameter.name + "." + options.name).c_str())) {}

void StateStore::append_specs(std::vector<StateSpec>& list) const {
  const DType dtype = options_.precision == StatePrecision::fp32   ? DType::f32
                      : options_.precision == StatePrecision::bf16 ? DType::bf16
                                                                   : DType::u8;
  list.push_back({options_.name, {options_.shape, dtype}});
  if (options_.precision == StatePrecision::int8)
    list.push_back({options_.name + "_scale", {{block_count(options_.shape.numel())}, DType::f32}});
}

template <typename T>
StateView<T> StateStore::view(std::span<const Tensor>& states, std::int64_t step) const {
  StateView<T> view;
  view.data_ = states[0].data;
  view.numel_ = options_.shape.numel();
  view.precision_ = options_.precision;
  view.values_ = options_.values;
  view.rounding_ = options_.rounding;
  view.seed_ = options_.seed ^ static_cast<std::uint64_t>(step) * kStepMix;
  view.stream_ = stream_;
  const bool scaled = options_.precision == StatePrecision::int8;
  if (scaled) view.scales_ = states[1].as<T>();
  states = states.subspan(scaled ? 2 : 1);
  return view;
}

StatePrecision stored_precision(const Parameter& parameter, StatePrecision wanted) {
  return parameter.shape.rank() == 1 && wanted == StatePrecision::int8 ? StatePrecision::fp32 : wanted;
}

template class StateView<float>;
template class StateView<double>;
template StateView<float> StateStore::view(std::span<const Tensor>&, std::int64_t) const;
template StateView<double> StateStore::view(std::span<const Tensor>&, std::int64_t) const;

}  // namespace kiln
