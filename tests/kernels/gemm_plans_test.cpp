// GEMMs by cuBLASLt: a matrix that is added, and the file of choices.
#include "kernels/gemm_plans.h"

#include <fcntl.h>
#include <unistd.h>

#include <cstdio>

#include "base/files.h"
#include "base/json.h"
#include "catch.h"
#include "io/corpus_fixture.h"
#include "kernels/cuda_backend.h"
#include "kernels/update_family.h"

namespace kiln::test {
namespace {

namespace fs = std::filesystem;
using cuda::GemmPlans;

/// C [m,n] = alpha A [m,k] B [n,k]' + beta D, `batch` times.
struct Sizes {
  std::int64_t m, n, k, batch = 1;
};

/// The matrices of a product on the device, A and B in bf16, C and D in `type`, and its workspace.
class Product {
 public:
  Product(Backend& gpu, const Sizes& s, DType type)
      : sizes_(s),
        a_(gpu, {{s.batch, s.m, s.k}, DType::bf16}),
        b_(gpu, {{s.batch, s.n, s.k}, DType::bf16}),
        c_(gpu, {{s.batch, s.m, s.n}, type}),
        d_(gpu, {{s.batch, s.m, s.n}, type}),
        workspace_(gpu.allocate(GemmPlans::kWorkspaceBytes, "workspace")) {
    const auto fill = [](const DeviceArray& x, std::uint64_t seed) {
      return set_values(x, normals(x.view().numel(), seed, 1));
    };
    left_ = fill(a_, 1);
    right_ = fill(b_, 2);
    added_ = fill(d_, 3);
    fill(c_, 4);  // what a product that reads C would add
  }

  /// C, which `plans` gives it.
  std::vector<float> run(GemmPlans& plans, float alpha, float beta) {
    const auto [m, n, k, batch] = sizes_;
    plans.run({.trans_b = Trans::yes,
               .m = m,
               .n = n,
               .k = k,
               .a = a_.view().data,
               .lda = k,
               .b = b_.view().data,
               .ldb = k,
               .c = c_.view().data,
               .ldc = n,
               .c_type = c_.view().dtype(),
               .add = d_.view().data,
               .alpha = alpha,
               .beta = beta,
               .batch = batch,
               .stride_a = m * k,
               .stride_b = n * k,
               .stride_c = m * n},
              workspace_.data());
    CHECK(values_of(d_) == added_);
    return values_of(c_);
  }
  /// In f64.
  std::vector<double> expected(double alpha, double beta) const {
    std::vector<double> out;
    const auto at = [](const std::vector<float>& x, std::int64_t i) {
      return static_cast<double>(x[static_cast<std::size_t>(i)]);
    };
    for (std::int64_t row = 0; row < sizes_.batch * sizes_.m; ++row)
      for (std::int64_t j = 0; j < sizes_.n; ++j) {
        double sum = 0;
        for (std::int64_t p = 0; p < sizes_.k; ++p)
          sum += at(left_, row * sizes_.k + p) * at(right_, (row / sizes_.m * sizes_.n + j) * sizes_.k + p);
        out.push_back(alpha * sum + beta * at(added_, row * sizes_.n + j));
      }
    return out;
  }

 private:
  Sizes sizes_;
  DeviceArray a_, b_, c_, d_;
  Buffer workspace_;
  std::vector<float> left_, right_, added_;
};

cudaStream_t stream_of(const Backend& gpu) { return static_cast<cudaStream_t>(gpu.native_stream()); }

TEST_CASE("a product on the GPU adds a matrix that is not its own", "[gpu]") {
  const auto gpu = cuda::make_backend(0);
  GemmPlans plans(stream_of(*gpu));
  struct Factors {
    float alpha, beta;
  };
  for (const Sizes& s : {Sizes{8, 8, 8}, Sizes{65, 136, 72}, Sizes{300, 512, 1376}, Sizes{128, 64, 40, 3}})
    for (const DType type : {DType::bf16, DType::f32}) {
      Product product(*gpu, s, type);
      for (const Factors& f : {Factors{1, 1}, Factors{0.5f, -1.5f}}) {
        INFO(s.m << " x " << s.n << " x " << s.k << ", " << s.batch << " of them, to " << to_string(type) << ", "
                 << f.alpha << " and " << f.beta);
        const std::vector<double> expected =
            product.expected(static_cast<double>(f.alpha), static_cast<double>(f.beta));
        const std::vector<float> chosen = product.run(plans, f.alpha, f.beta);  // the first times candidates in C
        const double limit =
            (type == DType::f32 ? kFloat : kOneRounding) * (1 + 2 / std::sqrt(static_cast<double>(chosen.size())));
        CHECK(relative_error({chosen.begin(), chosen.end()}, expected) <= limit);
        CHECK(product.run(plans, f.alpha, f.beta) == chosen);
      }
    }
}

/// What `action` writes to standard error, where warnings go.
std::string errors_of(const Scratch& scratch, const std::function<void()>& action) {
  const fs::path file = scratch / "errors.txt";
  std::fflush(stderr);
  const int kept = ::dup(STDERR_FILENO), to = ::open(file.c_str(), O_CREAT | O_WRONLY | O_TRUNC, 0600);
  REQUIRE(kept >= 0);
  REQUIRE(::dup2(to, STDERR_FILENO) == STDERR_FILENO);
  ::close(to);
  try {
    action();
  } catch (...) {
    ::dup2(kept, STDERR_FILENO);
    throw;
  }
  std::fflush(stderr);
  ::dup2(kept, STDERR_FILENO);
  ::close(kept);
  return read_text(file);
}

/// A few products, whose plans and bits are compared.
class Products {
 public:
  explicit Products(Backend& gpu) {
    for (const Sizes& s : {Sizes{65, 136, 72}, Sizes{300, 512, 1376}, Sizes{128, 64, 40, 3}})
      list_.emplace_back(gpu, s, DType::bf16);
  }
  std::vector<std::vector<float>> run(GemmPlans& plans) {
    std::vector<std::vector<float>> all;
    for (Product& product : list_) all.push_back(product.run(plans, 1, 1));
    return all;
  }

 private:
  std::vector<Product> list_;
};

TEST_CASE("plans of GEMMs are kept in a file, and give the same bits when they are read again", "[gpu]") {
  const auto gpu = cuda::make_backend(0);
  const Scratch scratch;
  const fs::path file = scratch / "cache" / "gemm.json";
  Products products(*gpu);
  GemmPlans first(stream_of(*gpu));
  CHECK(errors_of(scratch, [&] { first.load(file); }).empty());  // none there yet
  CHECK_FALSE(first.changed());
  const std::vector<std::vector<float>> bits = products.run(first);
  CHECK(first.changed());
  first.save(file);
  CHECK_FALSE(first.changed());

  GemmPlans second(stream_of(*gpu));
  CHECK(errors_of(scratch, [&] { second.load(file); }).empty());
  CHECK(products.run(second) == bits);
  CHECK_FALSE(second.changed());  // nothing was timed
  // What is chosen later joins what the file has.
  Product more(*gpu, {24, 40, 56}, DType::f32);
  const std::vector<float> others = more.run(second, 1, 1);
  CHECK(second.changed());
  second.save(file);
  GemmPlans third(stream_of(*gpu));
  third.load(file);
  CHECK(products.run(third) == bits);
  CHECK(more.run(third, 1, 1) == others);
  CHECK_FALSE(third.changed());
}

TEST_CASE("a file of GEMM plans that is damaged or another device's is refused, and timed again", "[gpu]") {
  const auto gpu = cuda::make_backend(0);
  const Scratch scratch;
  const fs::path file = scratch / "gemm.json";
  Products products(*gpu);
  {
    GemmPlans plans(stream_of(*gpu));
    products.run(plans);
    plans.save(file);
  }
  const Json whole = read_json(file);
  Json other_device = whole, other_library = whole, no_number = whole, cut = whole, no_text = whole;
  other_device["made_for"]["device"] = "another";
  other_library["made_for"]["cublasLt"] = 1;
  std::string algorithm = whole["plans"].begin()->get<std::string>();
  cut["plans"].begin().value() = algorithm.substr(1);
  algorithm.front() = 'z';
  no_number["plans"].begin().value() = algorithm;
  no_text["plans"].begin().value() = 7;
  const std::string text = read_text(file), another = "GEMM plans of another device or cuBLASLt",
                    damaged = "not a file of GEMM plans";
  struct Case {
    std::string text, warning;
  };
  for (const Case& c : {Case{other_device.dump(), another}, Case{other_library.dump(), another},
                        Case{no_number.dump(), damaged}, Case{cut.dump(), damaged}, Case{no_text.dump(), damaged},
                        Case{text.substr(0, text.size() / 2), damaged}, Case{"", damaged}, Case{"{}", damaged}}) {
    INFO(c.text);
    write_file(file, c.text);
    GemmPlans plans(stream_of(*gpu));
    const std::string warning = errors_of(scratch, [&] { plans.load(file); });
    CHECK_THAT(warning, ContainsSubstring(file.string() + ": " + c.warning) &&
                            ContainsSubstring("they are timed again, and runs may round differently"));
    const std::vector<std::vector<float>> bits = products.run(plans);
    CHECK(plans.changed());
    CHECK_THAT(errors_of(scratch, [&] { plans.save(file); }), ContainsSubstring(c.warning));  // replaces it
    GemmPlans again(stream_of(*gpu));
    CHECK(errors_of(scratch, [&] { again.load(file); }).empty());
    CHECK(products.run(again) == bits);
    CHECK_FALSE(again.changed());
  }
}

}  // namespace
}  // namespace kiln::test
