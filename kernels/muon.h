#pragma once
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "kernels/state_pointer.h"

/// Muon's elementwise passes on the GPU (optim/muon.h), all matrices of a launch at once. The products between them are
/// cuBLASLt's: kernels/muon.cpp.
namespace kiln::cuda {

/// One matrix [m,n] as its elements, whose number is a multiple of eight.
struct MuonMatrix {
  std::uint16_t* w;               // bf16
  std::uint16_t* low;             // lower halves of the f32 masters; null: stochastic rounding
  const void* g;                  // f32 or bf16: MuonTable::half_gradient
  StatePointer momentum;          // MuonTable::states
  std::uint16_t *start, *result;  // bf16, workspace: U / (||U|| + 1e-7), and what the iteration makes of it
  float* inverse;                 // [1], workspace: 1 / (||U|| + 1e-7)
  double* parts;                  // workspace: squares of U by piece
  std::int32_t piece_count;       // of this matrix
  std::uint64_t stream;           // of the weights' stochastic rounding
  std::int64_t n;                 // elements
  double scale;                   // MuonUpdate::scale()
  bool decay;
};
/// kMuonPiece elements of one matrix from `first`, its piece number `index`.
inline constexpr int kMuonPiece = 8192;
struct MuonPiece {
  std::int32_t matrix, index;
};

/// A launch's tables in device memory: `count` pieces.
struct MuonTable {
  const MuonMatrix* matrices;
  const MuonPiece* pieces;
  int count;
  bool half_gradient;
  StatePrecision states;
  const CodeMaps* maps;  // in device memory, where states are int8
  const double* scalars;
  double momentum, weight_decay;
  std::uint64_t seed;
  cudaStream_t stream;
};

/// inverse of the first `matrices` of the table; its pieces are those of all of them. Sums of a fixed order: f32 within
/// a thread's 32 elements, f64 across.
/// floor  reads G and the momentum: 8 bytes a parameter in f32, 4 in bf16; of the momentum 1 in int8
void muon_norm(const MuonTable& table, int matrices);
/// B <- mu B + G and start = (G + mu B) inverse.
/// floor  14 bytes a parameter in f32, 8 in bf16; of the momentum 2 in int8
void muon_momentum(const MuonTable& table);
/// W <- (1 - lr wd) W - lr scale result.
/// floor  10 bytes a parameter, 6 without masters
void muon_apply(const MuonTable& table);

}  // namespace kiln::cuda
