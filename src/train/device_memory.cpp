#include "train/device_memory.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "core/parallel.h"
#include "ops/rope.h"

namespace kiln {
namespace {

/// f32 = (high << 16) + low with a signed low half: high is the value rounded to bf16, which is what GEMMs read.
struct Halves {
  std::uint16_t high, low;
};
Halves split(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  return {static_cast<std::uint16_t>((bits + 0x8000u) >> 16), static_cast<std::uint16_t>(bits)};
}
float joined(Halves halves) {
  const auto low = static_cast<std::int16_t>(halves.low);
  return std::bit_cast<float>((static_cast<std::uint32_t>(halves.high) << 16) + static_cast<std::uint32_t>(low));
}

/// Copies the leading block of `rows` x `row_bytes` between matrices of other row lengths.
void copy_block(std::byte* to, std::size_t to_pitch, const std::byte* from, std::size_t from_pitch, std::int64_t rows,
                std::size_t row_bytes) {
  for (std::int64_t r = 0; r < rows; ++r)
    std::memcpy(to + static_cast<std::size_t>(r) * to_pitch, from + static_cast<std::size_t>(r) * from_pitch,
                row_bytes);
}

std::int64_t columns(const Shape& shape) { return shape.rank() > 1 ? shape[shape.rank() - 1] : 1; }

}  // namespace

DeviceWeights::DeviceWeights(Unfilled, const ModelWeights& host, const StorageLayout& layout, bool masters,
                             Backend& backend)
    : host_(host),
      layout_(layout),
      table_(llama_parameters(host.config(), layout)),
      backend_(backend),
      shared_(backend.is_host() && layout.dtype == host.storage(0).dtype() && layout.multiple == 1) {
  check(shared_ || layout.dtype == DType::bf16, "a device stores weights in bf16, found {}", to_string(layout.dtype));
  if (shared_) return;
  for (const Storage& storage : table_.storages) {
    high_.emplace_back(backend, storage.spec, storage.name);
    if (masters) low_.emplace_back(backend, TensorSpec{storage.spec.shape, DType::u16}, storage.name);
  }
}

DeviceWeights::DeviceWeights(const ModelWeights& host, const StorageLayout& layout, bool masters, Backend& backend)
    : DeviceWeights(Unfilled{}, host, layout, masters, backend) {
  push();
}

DeviceWeights::DeviceWeights(const ModelWeights& host, const StorageLayout& layout, bool masters, Backend& backend,
                             std::uint64_t seed)
    : DeviceWeights(Unfilled{}, host, layout, masters, backend) {
  for (std::size_t s = 0; s < count(); ++s) {
    initialise(host_, s, seed);
    if (shared_) continue;
    push(host_, s);
    host_.zero(s);
  }
}

template <typename F>
void DeviceWeights::for_rows(const ModelWeights& host, std::size_t storage, F&& visit) const {
  const std::vector<Parameter>& parameters = table_.parameters;
  const std::int64_t pitch = columns(table_.storages[storage].spec.shape);
  for (std::size_t p = 0; p < parameters.size(); ++p)
    if (parameters[p].storage == storage)
      visit(host.view(host.table().parameters[p]), parameters[p].row_begin * pitch, pitch);
}

void DeviceWeights::bind(Executor& executor, const LlamaValues& values) const {
  for (std::size_t s = 0; s < count(); ++s) executor.bind(values.storages[s], storage(s));
}

void DeviceWeights::push() const {
  if (!shared_) push(host_);
}

void DeviceWeights::push(const ModelWeights& from) const {
  for (std::size_t s = 0; s < high_.size(); ++s) push(from, s);
}

void DeviceWeights::push(const ModelWeights& from_model, std::size_t s) const {
  std::vector<std::uint16_t> high(static_cast<std::size_t>(high_[s].view().numel())),
      low(low_.empty() ? 0 : high.size());
  for_rows(from_model, s, [&](const Tensor& from, std::int64_t first, std::int64_t pitch) {
    const float* values = from.as<float>();
    const std::int64_t width = columns(from.shape());
    parallel_for(from.numel() / width, 64, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t r = begin; r < end; ++r)
        for (std::int64_t c = 0; c < width; ++c) {
          const auto at = static_cast<std::size_t>(first + r * pitch + c);
          const float value = values[r * width + c];
          if (low.empty()) {
            high[at] = to_bfloat16(value).bits;
            continue;
          }
          const Halves halves = split(value);
          high[at] = halves.high;
          low[at] = halves.low;
        }
    });
  });
  backend_.upload(high_[s].view(), high.data());
  if (!low_.empty()) backend_.upload(low_[s].view(), low.data());
}

void DeviceWeights::pull() const {
  if (shared_) return;
  std::vector<std::uint16_t> high, low;
  for (std::size_t s = 0; s < high_.size(); ++s) {
    high.resize(static_cast<std::size_t>(high_[s].view().numel()));
    low.resize(high.size());
    backend_.download(high.data(), high_[s].view());
    if (!low_.empty()) backend_.download(low.data(), low_[s].view());
    join(s, high.data(), low_.empty() ? nullptr : low.data(), host_);
  }
}

void DeviceWeights::join(std::size_t storage, const std::uint16_t* high, const std::uint16_t* low,
                         const ModelWeights& to_model) const {
  for_rows(to_model, storage, [&](const Tensor& to, std::int64_t first, std::int64_t pitch) {
    float* values = to.as<float>();
    const std::int64_t width = columns(to.shape());
    parallel_for(to.numel() / width, 64, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t r = begin; r < end; ++r)
        for (std::int64_t c = 0; c < width; ++c) {
          const auto at = static_cast<std::size_t>(first + r * pitch + c);
          values[r * width + c] = joined({high[at], low == nullptr ? std::uint16_t{0} : low[at]});
        }
    });
  });
}

std::vector<Tensor> DeviceWeights::parts() const {
  std::vector<Tensor> all;
  for (std::size_t s = 0; s < high_.size(); ++s) {
    all.push_back(high_[s].view());
    if (!low_.empty()) all.push_back(low_[s].view());
  }
  return all;
}

void DeviceWeights::unpack(std::span<const std::byte> parts, const ModelWeights& to) const {
  const auto take = [&](const Tensor& part) {
    const auto* values = reinterpret_cast<const std::uint16_t*>(parts.data());
    parts = parts.subspan(part.bytes());
    return values;
  };
  for (std::size_t s = 0; s < high_.size(); ++s) {
    const std::uint16_t* high = take(high_[s].view());
    join(s, high, low_.empty() ? nullptr : take(low_[s].view()), to);
  }
}

void DeviceWeights::exchange(const ModelWeights& other) const {
  for (std::size_t s = 0; s < count(); ++s) {
    const std::span<float> mine = host_.storage(s).span<float>();
    std::swap_ranges(mine.begin(), mine.end(), other.storage(s).span<float>().begin());
  }
}

void DeviceWeights::show(const ModelWeights& other) const {
  if (shared_) return exchange(other);
  pull();
  push(other);
}

void DeviceWeights::restore(const ModelWeights& other) const {
  if (shared_)
    exchange(other);
  else
    push(host_);
}

ModelInputs::ModelInputs(Backend& backend, const LlamaConfig& config, const StorageLayout& layout,
                         std::int64_t token_count, std::int64_t positions)
    : tokens(backend, {{token_count}, DType::i32}, "tokens"),
      targets(backend, {{token_count}, DType::i32}, "targets"),
      first(backend, {{1}, DType::i32}, "first position"),
      rope_table(backend, {{positions, config.head_dim}, accumulator_of(layout.dtype)}, "RoPE table"),
      scalars(backend, scalars_spec(), "scalars") {
  const HostTensor table(rope_table.view().spec, "RoPE table");
  fill_rope_table(table.view(), config.rope_base);
  backend.upload(rope_table.view(), table.view().data);
}

void ModelInputs::bind(Executor& executor, const LlamaValues& values, std::int64_t first_token) const {
  const std::int64_t count = executor.plan().value(values.tokens).spec.shape[0];
  executor.bind(values.tokens, tokens.view().rows(first_token, count));
  if (values.targets.valid()) executor.bind(values.targets, targets.view().rows(first_token, count));
  executor.bind(values.first, first.view());
  executor.bind(values.rope_table, rope_table.view());
  if (values.scalars.valid()) executor.bind(values.scalars, scalars.view());
}

DeviceStates::DeviceStates(const TrainPlan& plan, const OptimizerStates& host, Backend& backend)
    : host_(host), backend_(backend) {
  if (backend.is_host()) return;
  for (std::size_t p = 0; p < plan.state_specs.size(); ++p) {
    states_.emplace_back();
    for (const StateSpec& state : plan.state_specs[p])
      states_.back().emplace_back(backend, state.spec, plan.table.parameters[p].name + "." + state.name);
  }
}

Tensor DeviceStates::tensor(std::size_t parameter, std::size_t state) const {
  return states_.empty() ? host_.tensor(parameter, state) : states_[parameter][state].view();
}

void DeviceStates::push() const {
  std::vector<std::byte> staging;
  for (std::size_t p = 0; p < states_.size(); ++p)
    for (std::size_t s = 0; s < states_[p].size(); ++s) {
      const Tensor from = host_.tensor(p, s), to = states_[p][s].view();
      const std::size_t size = size_of(from.dtype());
      const std::size_t row = static_cast<std::size_t>(columns(from.shape())) * size;
      staging.assign(to.bytes(), std::byte{0});
      if (from.numel() > 0)
        copy_block(staging.data(), static_cast<std::size_t>(columns(to.shape())) * size,
                   static_cast<const std::byte*>(from.data), row, from.numel() / columns(from.shape()), row);
      backend_.upload(to, staging.data());
    }
}

void DeviceStates::pull() const {
  std::vector<std::byte> staging;
  for (std::size_t p = 0; p < states_.size(); ++p)
    for (std::size_t s = 0; s < states_[p].size(); ++s) {
      const Tensor to = host_.tensor(p, s), from = states_[p][s].view();
      const std::size_t size = size_of(to.dtype());
      const std::size_t row = static_cast<std::size_t>(columns(to.shape())) * size;
      staging.resize(from.bytes());
      backend_.download(staging.data(), from);
      if (to.numel() > 0)
        copy_block(static_cast<std::byte*>(to.data), row, staging.data(),
                   static_cast<std::size_t>(columns(from.shape())) * size, to.numel() / columns(to.shape()), row);
    }
}

void bind_training(Executor& executor, const TrainPlan& plan, const DeviceWeights& weights,
                   const DeviceStates& states) {
  weights.bind(executor, plan.values);
  for (std::size_t s = 0; s < plan.lows.size(); ++s) executor.bind(plan.lows[s], weights.low(s));
  for (std::size_t p = 0; p < plan.states.size(); ++p)
    for (std::size_t s = 0; s < plan.states[p].size(); ++s) executor.bind(plan.states[p][s], states.tensor(p, s));
}

}  // namespace kiln
