// Index targets without smoothing, in two passes: the first finds the largest score; the second computes exp and its
// sum, writes exp f' into the row, and gathers the gradients to the tables. The division by the sum is left to the
// matrix products (`scale`).
#pragma once

#include "token.h"

namespace {

// The gradient to one row of scores, which holds exp f': a p - c onehot, times f', with p = exp / sum.
template <class T>
void finish_row(const Worker<T>& w, int64_t r, int k, double a, double c, int64_t index, T z_target, double* sums) {
  const Row<T>& row = w.rows.get()[k];
  T* e = w.row(r);
  const double weight = row.sum > 0 || row.sum != row.sum ? a / row.sum : 0;
  T slope = 0;
  if (c != 0 && z_target != -kInfinity<T>) {
    w.logit(k, z_target, &slope);
    if (w.chain.wanted) w.add_single(k, -c, sums);
  }
  if (w.chain.wanted) w.flush(k, weight, sums);
  double scale = weight;
  if (weight != weight) {  // in a row of NaN, too, impossible words get 0: -0 marks them (see `exponentials`)
    for (int64_t v = 0; v < w.tile.vocab; ++v)
      e[v] = e[v] == T(0) && std::signbit(e[v]) ? T(0) : static_cast<T>(weight);
    put<T>(w.tile.scale, r, 1);
    return;
  }
  // The one-hot part is divided by the scale, which the products multiply by again, unless the scale is too small.
  if (std::abs(a) < 0.25 * std::abs(c) || row.sum == 0) {
    const T factor = static_cast<T>(weight);
    for (int64_t v = 0; v < w.tile.vocab; ++v) e[v] *= factor;
    scale = 1;
    if (slope != T(0)) e[index] -= static_cast<T>(c * slope);
  } else if (slope != T(0)) {
    e[index] -= static_cast<T>(c / a * row.sum) * slope;
  }
  put<T>(w.tile.scale, r, scale);
}

// log of a sum of exponentials of K numbers.
inline double log_sum(const double* x, int64_t n) {
  double top = x[0], sum = 0;
  for (int64_t k = 1; k < n; ++k) top = x[k] > top ? x[k] : top;
  if (!(top > -kInfinity<double>)) top = 0;
  for (int64_t k = 0; k < n; ++k) sum += std::exp(x[k] - top);
  return top + std::log(sum);
}

// A token with an index target and no smoothing.
template <class T>
void sparse(const Worker<T>& w, int64_t n, bool gradient, double* sums) {
  const UncorkTile& tile = w.tile;
  const Upstream up = upstream_of<T>(tile, n);
  if (gradient && !up.kept && up.none()) return skip_token(w, n);
  const int64_t components = tile.components;
  double* joint = w.joint.get();  // log prior + log p of the target in each component
  T* targets = w.targets.get();   // the target's score in each component
  double lse = 0, loss = 0;
  for (int64_t k = 0; k < components; ++k) {
    T* z = w.row(n * components + k);
    targets[k] = up.index >= 0 ? w.score(z, up.index) : -kInfinity<T>;
    Row<T>& row = w.rows.get()[k] = sweep(w, int(k), z, gradient, tile.entropy != nullptr);
    const double log_of_sum = std::log(row.sum);
    lse = double(row.top) + log_of_sum;
    T slope;
    const T target = targets[k] == -kInfinity<T> ? targets[k] : w.logit(int(k), targets[k], &slope);
    loss = log_of_sum - double(target - row.top);
    if (tile.log_prior) joint[k] = double(at<T>(tile.log_prior, n * components + k, T(0))) - loss;
  }
  if (tile.entropy) {
    const Row<T>& row = w.rows.get()[0];
    put<T>(tile.entropy, n, std::log(row.sum) - row.weighted / row.sum);
    if (tile.argmax) tile.argmax[n] = w.argmax(w.row(n), row);
  }
  if (tile.log_prior) lse = 0, loss = -log_sum(joint, components);
  // A word of weight 0 costs nothing, not even where it is impossible.
  const bool costs = up.kept && up.index >= 0 && !(up.hit == 0 && loss == kInfinity<double>);
  put<T>(tile.cross_entropy, n, costs ? up.hit * loss : 0);
  put<T>(tile.lse, n, lse);
  if (!gradient) return;
  const double c = up.cross_entropy * up.hit;
  if (!tile.log_prior) {
    finish_row(w, n, 0, c + up.lse + 2 * up.square * lse, c, up.index, targets[0], sums);
    return;
  }
  for (int64_t k = 0; k < components; ++k) {
    const int64_t r = n * components + k;
    // An impossible target has no posterior: no component gets a gradient.
    const double factor = c == 0 || loss == kInfinity<double> ? 0 : c * std::exp(joint[k] + loss);
    finish_row(w, r, int(k), factor, factor, up.index, targets[k], sums);
    put<T>(tile.grad_prior, r, loss == kInfinity<double> ? 0 : c * std::exp(double(at<T>(tile.log_prior, r, T(0)))) - factor);
  }
}

}  // namespace
