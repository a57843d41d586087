#pragma once
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <type_traits>

// The widest vectors of the target as one portable type, through GCC's and Clang's vector extension. Private to the CPU
// kernels: included by sources, never by a public header.
namespace kiln::simd {

#if defined(__AVX512F__)
inline constexpr int kBytes = 64;
#elif defined(__AVX__)
inline constexpr int kBytes = 32;
#else
inline constexpr int kBytes = 16;
#endif

template <typename T>
inline constexpr int kLanes = kBytes / static_cast<int>(sizeof(T));

template <typename T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kBytes)));
  typedef T unaligned __attribute__((vector_size(kBytes), aligned(alignof(T)), may_alias));
};
template <typename T>
using Vector = typename VectorOf<T>::type;
template <typename T>
using Integer = std::conditional_t<sizeof(T) == 4, std::int32_t, std::int64_t>;

template <typename T>
inline Vector<T> load(const T* p) {
  return *reinterpret_cast<const typename VectorOf<T>::unaligned*>(p);
}
template <typename T>
inline void store(T* p, Vector<T> v) {
  *reinterpret_cast<typename VectorOf<T>::unaligned*>(p) = v;
}
template <typename T>
inline Vector<T> broadcast(T x) {
  return x - Vector<T>{};
}
/// The first n lanes from memory, the rest `fill`.
template <typename T>
inline Vector<T> load_partial(const T* p, std::int64_t n, T fill) {
  Vector<T> v = broadcast(fill);
  for (std::int64_t i = 0; i < n; ++i) v[i] = p[i];
  return v;
}
template <typename T>
inline void store_partial(T* p, std::int64_t n, Vector<T> v) {
  for (std::int64_t i = 0; i < n; ++i) p[i] = v[i];
}
template <typename T>
inline Vector<T> max(Vector<T> a, Vector<T> b) {
  return a > b ? a : b;
}
template <typename T>
inline T reduce_sum(Vector<T> v) {
  T sum = 0;
  for (int i = 0; i < kLanes<T>; ++i) sum += v[i];
  return sum;
}
template <typename T>
inline T reduce_max(Vector<T> v) {
  T most = v[0];
  for (int i = 1; i < kLanes<T>; ++i) most = std::max(most, v[i]);
  return most;
}

/// e^x. f32: relative error below 2e-7 on [-87.3, 88], flushed to 0 below and saturated above; NaN stays NaN.
/// Cody-Waite reduction by ln 2 and a degree-6 polynomial. f64: the C library's, lane by lane (gradient checks only).
template <typename T>
inline Vector<T> exp(Vector<T> x) {
  if constexpr (sizeof(T) == 8) {
    for (int i = 0; i < kLanes<T>; ++i) x[i] = std::exp(x[i]);
    return x;
  } else {
    using I = typename VectorOf<std::int32_t>::type;
    constexpr float kLow = -87.33654f, kHigh = 88.0f;  // 2^n stays a normal number between them
    constexpr float kMagic = 12582912.0f;              // 1.5 * 2^23: adding it rounds
    const Vector<float> clamped = x > kHigh ? broadcast(kHigh) : (x < kLow ? broadcast(kLow) : x);
    const Vector<float> n = (clamped * 1.44269504f + kMagic) - kMagic;
    const Vector<float> r = clamped - n * 0.693359375f + n * 2.12194440e-4f;
    Vector<float> p = broadcast(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const Vector<float> power = std::bit_cast<Vector<float>>((__builtin_convertvector(n, I) + 127) << 23);
    return x < kLow ? Vector<float>{} : p * power;
  }
}

template <typename T, int Stage>
inline void transpose_stage(Vector<T> (&row)[kLanes<T>]) {
  using I = typename VectorOf<Integer<T>>::type;
  I low{}, high{};
  for (int j = 0; j < kLanes<T>; ++j) {
    low[j] = (j & Stage) == 0 ? j : kLanes<T> + j - Stage;
    high[j] = (j & Stage) == 0 ? j + Stage : kLanes<T> + j;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kLanes<T>; ++i) {
    if ((i & Stage) != 0) continue;
    const Vector<T> a = row[i], b = row[i + Stage];
    row[i] = __builtin_shuffle(a, b, low);
    row[i + Stage] = __builtin_shuffle(a, b, high);
  }
  if constexpr (Stage > 1) transpose_stage<T, Stage / 2>(row);
}

/// Transposes a kLanes x kLanes block held in registers (Eklundh's exchanges).
template <typename T>
inline void transpose(Vector<T> (&row)[kLanes<T>]) {
  transpose_stage<T, kLanes<T> / 2>(row);
}

}  // namespace kiln::simd
