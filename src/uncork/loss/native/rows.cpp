// The kernel: blocks of tokens over threads. Compiled once for each instruction set (UNCORK_ISA).
#include <atomic>

#include "dense.h"
#include "parallel.h"
#include "sparse.h"

namespace {

// Fixed blocks of tokens, each with its own sums, so that results do not depend on which thread takes which block: up
// to 128 of them, to keep many cores busy; fewer, but at least 4, if their sums would exceed 8 MiB.
inline int64_t tokens_per_block(int64_t tokens, int64_t num_sums) {
  constexpr int64_t kMostBlocks = 128, kFewestBlocks = 4, kNumbers = 1 << 20;
  const int64_t room = std::max(kFewestBlocks, kNumbers / std::max<int64_t>(1, num_sums));
  const int64_t blocks = std::max<int64_t>(1, std::min({kMostBlocks, room, tokens}));
  return (tokens + blocks - 1) / blocks;
}

template <class T>
void add_sums(const UncorkTile& tile, const Chain<T>& chain, const double* partial, int64_t blocks) {
  for (int i = 0; i < chain.size; ++i) {
    const Op<T>& op = chain.ops[i];
    if (!op.wanted) continue;
    double* into = tile.operations[i].sums;
    const int64_t size = op.num_sums();
    for (int64_t s = 0; s < size; ++s) {
      double sum = 0;
      for (int64_t b = 0; b < blocks; ++b) sum += partial[b * chain.num_sums + op.sums + s];
      into[op.piecewise() ? (s % 2) * (size / 2) + s / 2 : s] += sum;
    }
  }
}

template <class T>
void run(const UncorkTile& tile, int32_t mode) {
  const bool gradient = mode == UNCORK_GRADIENT;
  const bool details = tile.entropy || tile.argmax;
  const bool is_sparse = mode != UNCORK_LOG_PROB && !tile.probabilities && tile.uniform == 0 && !tile.grad_entropy &&
                         !(tile.log_prior && (details || !tile.index)) && !(gradient && details);
  const Chain<T> chain(tile, gradient);
  const int64_t size = tokens_per_block(tile.tokens, chain.num_sums), blocks = (tile.tokens + size - 1) / size;
  Array<double> partial(blocks * chain.num_sums);
  std::atomic<bool> failed{false};
  std::atomic<int64_t> next{0};
  in_parallel(tile, [&] {
    try {
      const Worker<T> worker(tile, chain);
      const Array<T> scratch(Dense<T>::scratch(tile.components));
      for (int64_t b; (b = next++) < blocks;) {
        double* sums = partial.get() + b * chain.num_sums;
        std::fill_n(sums, chain.num_sums, 0.0);
        for (int64_t n = b * size; n < std::min(tile.tokens, (b + 1) * size); ++n) {
          if (is_sparse)
            sparse<T>(worker, n, gradient, sums);
          else
            dense<T>(worker, n, mode, scratch.get(), sums);
        }
      }
    } catch (const std::bad_alloc&) {
      failed = true;
    }
  });
  if (failed) throw std::bad_alloc();
  if (chain.wanted) add_sums(tile, chain, partial.get(), blocks);
}

}  // namespace

#define UNCORK_JOIN_(a, b) a##b
#define UNCORK_JOIN(a, b) UNCORK_JOIN_(a, b)

int32_t UNCORK_JOIN(uncork_rows_, UNCORK_ISA)(const UncorkTile* tile, int32_t mode) {
  try {
    if (tile->is_double)
      run<double>(*tile, mode);
    else
      run<float>(*tile, mode);
    return 0;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}

void UNCORK_JOIN(uncork_exp_, UNCORK_ISA)(const float* x, float* y, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) y[i] = exp_(x[i]);
}
