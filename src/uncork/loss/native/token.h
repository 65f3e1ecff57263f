// What sparse.h and dense.h share: a token's upstream gradients, and the pass over a row that finds the largest logit
// and the sum of the exponentials.
#pragma once

#include "worker.h"

namespace {

// Upstream gradients of one token, and the parts of its target that do not depend on the word.
struct Upstream {
  double cross_entropy = 0, lse = 0, square = 0, entropy = 0, hit = 0;
  int64_t index = -1;
  bool kept = true;
  bool none() const { return cross_entropy == 0 && lse == 0 && square == 0 && entropy == 0; }
};

template <class T>
Upstream upstream_of(const UncorkTile& tile, int64_t n) {
  Upstream up;
  up.kept = !tile.kept || tile.kept[n];
  if (tile.index) up.index = tile.index[n], up.hit = up.kept ? at<T>(tile.hit, n, T(1)) : T(0);
  up.cross_entropy = up.kept ? at<T>(tile.grad_cross_entropy, n, T(0)) : T(0);
  up.lse = at<T>(tile.grad_lse, n, T(0));
  up.square = at<T>(tile.grad_square, n, T(0));
  up.entropy = at<T>(tile.grad_entropy, n, T(0));
  return up;
}

template <class T>
void put(void* array, int64_t i, double value) {
  if (array) static_cast<T*>(array)[i] = static_cast<T>(value);
}

// Writes exp(logit - top) of a block into e and returns their sum. Impossible words get -0, which tells them apart from
// words whose exp is 0: slopes and exponentials are not negative.
template <class T>
double exponentials(const Worker<T>& w, int k, const T* y, T* e, int n, const Row<T>& row) {
  const T top = row.top;
  const int full = padded(n);
  if (row.masked || full != n) {
#pragma omp simd
    for (int j = 0; j < full; ++j) e[j] = exp_(y[j] - top);
    w.fill(k, e, n, row.masked, T(-0.0));
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int j = 0; j < full; ++j) sum += e[j];
    return static_cast<double>(sum);
  }
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int j = 0; j < full; ++j) {
    e[j] = exp_(y[j] - top);
    sum += e[j];
  }
  return static_cast<double>(sum);
}

// Largest logit and the sum of the exponentials; with `gradient` exp f' is left in the row and the tables' sums in the
// worker; with `entropy` the sum of e (l - top) too.
template <class T>
Row<T> sweep(const Worker<T>& w, int k, T* z, bool gradient, bool entropy) {
  Row<T> row = w.extremes(z);
  T slope;
  row.top = row.best == -kInfinity<T> ? T(0) : w.logit(k, row.best, &slope);
  // If the largest logit is inf, inf - inf is undefined: every possible word of the row becomes nan.
  if (row.top == kInfinity<T>) row.top = std::numeric_limits<T>::quiet_NaN();
  T* e = w.grads.get() + k * kBlock;
  const int64_t vocab = w.tile.vocab;
  for (int64_t start = 0; start < vocab; start += kBlock) {
    const int n = static_cast<int>(std::min<int64_t>(kBlock, vocab - start));
    const T* y = w.logits_of(k, z, start, n, row.masked);
    row.sum += exponentials(w, k, y, e, n, row);
    if (entropy) {
      double weighted = 0;
#pragma omp simd reduction(+ : weighted)
      for (int j = 0; j < n; ++j) weighted += e[j] == T(0) ? 0.0 : double(e[j]) * double(y[j] - row.top);
      row.weighted += weighted;
    }
    if (!gradient) continue;
    w.backward(k, e, start, n);
    std::memcpy(z + start, e, sizeof(T) * n);
  }
  return row;
}

template <class T>
void skip_token(const Worker<T>& w, int64_t n) {
  const int64_t components = w.tile.components;
  put<T>(w.tile.cross_entropy, n, 0);
  put<T>(w.tile.lse, n, 0);
  for (int64_t r = n * components; r < (n + 1) * components; ++r) {
    std::fill_n(w.row(r), w.tile.vocab, T(0));
    put<T>(w.tile.scale, r, 0);
    put<T>(w.tile.grad_prior, r, 0);
  }
}

}  // namespace
