#pragma once
#include <functional>
#include <initializer_list>
#include <string>
#include <vector>

#include "base/rng.h"
#include "graph/executor.h"

namespace kiln::test {

// Largest relative errors ||found - expected|| / ||expected|| that a kernel may have on inputs that bf16 holds exactly.
// Rounding a tensor to bf16 alone costs 0.8 * 2^-9, measured so.
inline constexpr double kOneRounding = 1.25 * 0x1p-9, kTwoRoundings = 2 * 0x1p-9, kThreeRoundings = 3 * 0x1p-9;
inline constexpr double kFloat = 1e-4;  // f32 results of bf16 products

/// One input of a case. Real ones are filled uniformly in [-1, 1]; those of bf16 are rounded, so that both devices read
/// the same numbers.
struct Input {
  TensorSpec spec;  // as the GPU reads it; the CPU has f64 for bf16 and f32
  Role role = Role::input;
};
inline Input bf16(std::initializer_list<std::int64_t> sizes) { return {{Shape(sizes), DType::bf16}}; }
inline Input f32(std::initializer_list<std::int64_t> sizes) { return {{Shape(sizes), DType::f32}}; }
inline Input i32(std::int64_t count) { return {{{count}, DType::i32}}; }
Input scalars();

/// A value to compare, and how close it must be.
struct Compared {
  ValueId value;
  double limit;
  std::vector<std::int64_t> columns{};  // of a matrix: where a part begins that is measured apart, such as keys
};

/// A little plan, run on the GPU in bf16 and on the CPU in fp64. What it compares is kept, or is an input that an op
/// writes.
struct DeviceCase {
  std::string name;
  std::vector<Input> inputs;
  std::function<std::vector<Compared>(Plan&, const std::vector<ValueId>&)> record;
  /// Changes the inputs, which are f64 (i32) on the host, before they are rounded.
  std::function<void(std::vector<HostTensor>&)> prepare{};
  int micro_batches = 1;  // runs; parameter gradients of later ones add to the first
};

/// What one run left in the compared values, and the groups that its nodes formed.
struct DeviceRun {
  struct Result {
    std::vector<double> values;
    Shape shape;
    Compared compared;
  };
  std::vector<Result> results;
  std::size_t groups = 0;
};
/// Runs a case over a poisoned arena; checks that inputs which no op writes keep their bytes.
DeviceRun run_case(const DeviceCase& c, Backend& backend);

/// ||found - expected|| / ||expected||; infinite where something is not finite.
double relative_error(const std::vector<double>& found, const std::vector<double>& expected);
/// Every result of `found` within its limit of `expected`.
void check_close(const std::string& name, const DeviceRun& found, const DeviceRun& expected);
/// The GPU against the CPU.
void check_case(const DeviceCase& c, Backend& gpu);
/// Both orders of the rows (kernels/row_order.h) leave the same bits. A kernel that has an order takes the opposite of
/// the one before it, and a product by cuBLASLt counts as ascending. So the case runs twice: right after such a
/// product, and after a product and one kernel that turns, which has each kernel of the case turn the other way.
void check_row_order(const DeviceCase& c, Backend& gpu);

/// Records `op` on `inputs` as what gives the gradient of a parameter, its output `gradient`, so that it adds up over
/// micro-batches as in training. Returns the op's outputs.
std::vector<ValueId> add_parameter_gradient(Plan& plan, const OpPtr& op, const std::vector<ValueId>& inputs,
                                            ValueId parameter, int gradient);
/// A node between two others, which therefore do not fuse.
void separate(Plan& plan, ValueId matrix);

/// Shapes drawn from a seed.
class Draw {
 public:
  explicit Draw(std::uint64_t seed) : random_(seed, stream_of("shapes")) {}
  std::int64_t between(std::int64_t first, std::int64_t last);
  std::int64_t pick(std::initializer_list<std::int64_t> choices);

 private:
  Philox random_;
  std::uint64_t next_ = 0;
};

}  // namespace kiln::test
