// The eigenbasis of a Kronecker factor, by subspace iteration with Cholesky-QR, in double.
#pragma once

#include "scratch.h"

namespace adaqn::cpu {

/// Bytes of scratch memory that refresh_basis takes.
int64_t basis_scratch_bytes(int64_t side);

/// The basis, in place, after some iterations; order[k] is the old place of column k.
template <class T>
void refresh_basis(Scratch scratch, int64_t side, int iterations, const T* factor, T* basis,
                   int32_t* order);

}  // namespace adaqn::cpu
