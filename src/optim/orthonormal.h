#pragma once
#include <cstdint>

namespace kiln {

/// Replaces the columns of a [rows, columns] (row-major, rows >= columns) by an orthonormal basis of what they span,
/// each pointing along the column that it came from: the Q of a QR factorisation whose R has a positive diagonal.
///
/// CholeskyQR2 (Yamamoto et al. 2015): R from the Cholesky factor of the Gram matrix, and once more on the result,
/// which makes up for the square of the condition number. Where a pivot is lost to rounding, as with a gradient of
/// lower rank, by Householder reflections, which give a basis of any columns. workspace  orthonormal_workspace(columns)
/// doubles; nothing is allocated
void orthonormalise(std::int64_t rows, std::int64_t columns, double* a, double* workspace);
constexpr std::int64_t orthonormal_workspace(std::int64_t columns) { return columns * columns + 2 * columns; }

/// The fall-back alone; workspace of 2 * columns.
void orthonormalise_householder(std::int64_t rows, std::int64_t columns, double* a, double* workspace);

}  // namespace kiln
