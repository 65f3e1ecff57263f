// Any target, entropy, and a mixture's log-probabilities, in up to three passes over a token's rows: the first is
// `sweep` of token.h, the second gathers the sums over words, and the third writes the gradient.
#pragma once

#include "token.h"

namespace {

template <class T>
struct Dense {
  const Worker<T>& w;
  const int64_t n, components;
  const Upstream up;
  // (K,) each, then blocks: (K, block) of log p in each component, and one block each.
  T *log_prior, *grad_component;
  T *log_prob, *mixed, *prob, *target, *upstream, *share;
  double loss = 0, entropy = 0;
  T best = -kInfinity<T>;
  int64_t argmax = -1;

  static int64_t scratch(int64_t components) { return components * (kBlock + 2) + 5 * kBlock; }

  Dense(const Worker<T>& worker, int64_t token, const Upstream& upstream_, T* memory)
      : w(worker), n(token), components(worker.tile.components), up(upstream_) {
    log_prior = memory, grad_component = memory + components, log_prob = memory + 2 * components;
    mixed = log_prob + components * kBlock;
    prob = mixed + kBlock, target = prob + kBlock, upstream = target + kBlock, share = upstream + kBlock;
    for (int64_t k = 0; k < components; ++k) {
      log_prior[k] = at<T>(w.tile.log_prior, n * components + k, T(0));
      grad_component[k] = 0;
    }
  }

  bool mixture() const { return w.tile.log_prior != nullptr; }

  // For a block of words: log p of the components and of their mixture, the target, the gradient to the mixed log p.
  void block(int64_t start, int count) {
    for (int64_t k = 0; k < components; ++k) {
      const Row<T>& row = w.rows.get()[k];
      T* y = w.logits_of(int(k), w.row(n * components + k), start, count, row.masked);
      w.fill(int(k), y, count, row.masked, -kInfinity<T>);
      const T top = row.top, log_of_sum = static_cast<T>(std::log(row.sum));
      T* p = mixture() ? log_prob + k * kBlock : mixed;
#pragma omp simd
      for (int j = 0; j < count; ++j) p[j] = (y[j] - top) - log_of_sum;
    }
    if (mixture()) mix(count);
#pragma omp simd
    for (int j = 0; j < count; ++j) prob[j] = exp_(mixed[j]);
    fill_target(start, count);
    const T grad_loss = static_cast<T>(up.cross_entropy), grad_entropy = static_cast<T>(up.entropy);
#pragma omp simd
    for (int j = 0; j < count; ++j) {
      // Both parts are computed and one is chosen: a branch would cost most where targets are mostly 0.
      const T p = prob[j], t = target[j], from_loss = grad_loss * t, from_entropy = grad_entropy * (p + p * mixed[j]);
      upstream[j] = (t == T(0) ? T(0) : -from_loss) - (p == T(0) ? T(0) : from_entropy);
    }
  }

  // mixed = log sum_k exp(log_prior + log_prob), the largest taken off first.
  void mix(int count) {
    T* top = share;
    std::fill_n(top, count, -kInfinity<T>);
    std::fill_n(mixed, count, T(0));
    for (int64_t k = 0; k < components; ++k) {
      const T prior = log_prior[k];
      const T* p = log_prob + k * kBlock;
#pragma omp simd
      for (int j = 0; j < count; ++j) top[j] = prior + p[j] > top[j] ? prior + p[j] : top[j];
    }
    for (int64_t k = 0; k < components; ++k) {
      const T prior = log_prior[k];
      const T* p = log_prob + k * kBlock;
#pragma omp simd
      for (int j = 0; j < count; ++j) {
        const T joint = prior + p[j];
        mixed[j] += joint == -kInfinity<T> ? T(0) : exp_(joint - top[j]);
      }
    }
#pragma omp simd
    for (int j = 0; j < count; ++j) mixed[j] = mixed[j] == T(0) ? -kInfinity<T> : top[j] + log_(mixed[j]);
  }

  void fill_target(int64_t start, int count) {
    const UncorkTile& tile = w.tile;
    const T* given = tile.probabilities ? static_cast<const T*>(tile.probabilities) + n * tile.vocab + start : nullptr;
    const T* weight = tile.word_weight ? static_cast<const T*>(tile.word_weight) + start : nullptr;
    const T uniform = up.kept ? static_cast<T>(tile.uniform) : T(0);
    const T whole = up.kept ? static_cast<T>(1 - tile.uniform * static_cast<double>(tile.vocab)) : T(0);
    if (given) {
#pragma omp simd
      for (int j = 0; j < count; ++j) target[j] = whole * given[j] + uniform;
    } else {
      std::fill_n(target, count, uniform);
    }
    if (weight) {
#pragma omp simd
      for (int j = 0; j < count; ++j) target[j] = weight[j] == T(0) ? T(0) : target[j] * weight[j];
    }
    if (up.kept && up.index >= start && up.index < start + count) target[up.index - start] += static_cast<T>(up.hit);
  }

  // The upstream gradient that reaches component k at each word: upstream times the component's responsibility.
  const T* shared(int64_t k, int count) {
    if (!mixture()) return upstream;
    const T prior = log_prior[k];
    const T* p = log_prob + k * kBlock;
#pragma omp simd
    for (int j = 0; j < count; ++j) {
      const T part = upstream[j] * exp_(prior + p[j] - mixed[j]);
      share[j] = mixed[j] == -kInfinity<T> || upstream[j] == T(0) ? T(0) : part;
    }
    return share;
  }

  // The sum of factor times log p, without the words of factor 0.
  double expected(const T* factor, int count) const {
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int j = 0; j < count; ++j) {
      const double f = double(factor[j]), term = f * double(mixed[j]);
      sum += f == 0.0 ? 0.0 : term;
    }
    return sum;
  }

  // The sum of a token's target over the words.
  double target_sum() {
    double sum = 0;
    for (int64_t start = 0; start < w.tile.vocab; start += kBlock) {
      const int count = static_cast<int>(std::min<int64_t>(kBlock, w.tile.vocab - start));
      fill_target(start, count);
#pragma omp simd reduction(+ : sum)
      for (int j = 0; j < count; ++j) sum += double(target[j]);
    }
    return sum;
  }

  void gather(int64_t start, int count, bool gradient) {
    loss -= expected(target, count);
    if (w.tile.entropy) entropy -= expected(prob, count);
    for (int j = 0; w.tile.argmax && mixture() && j < count; ++j) {
      const bool first_nan = mixed[j] != mixed[j] && best == best;
      if (argmax < 0 || mixed[j] > best || first_nan) best = mixed[j], argmax = start + j;
    }
    for (int64_t k = 0; gradient && k < components; ++k) {
      const T* part = shared(k, count);
      double sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int j = 0; j < count; ++j) sum += double(part[j]);
      grad_component[k] += static_cast<T>(sum);
    }
  }

  void write(int64_t start, int count, T grad_lse) {
    for (int64_t k = 0; k < components; ++k) {
      const T* part = shared(k, count);
      const T* log_p = log_prob + k * kBlock;
      T* g = w.grads.get() + k * kBlock;
      const T factor = grad_lse - grad_component[k];
      if (mixture()) {
#pragma omp simd
        for (int j = 0; j < count; ++j) prob[j] = exp_(log_p[j]);
      }
#pragma omp simd
      for (int j = 0; j < count; ++j) {
        const T p = prob[j], own = p * factor;
        g[j] = part[j] + (p == T(0) ? T(0) : own);
      }
      w.fill(int(k), g, count, w.rows.get()[k].masked, T(0));
      w.backward(int(k), g, start, count);
      std::memcpy(w.row(n * components + k) + start, g, sizeof(T) * count);
    }
  }

  template <class Work>
  void each_block(Work&& work) {
    const int64_t vocab = w.tile.vocab;
    for (int64_t start = 0; start < vocab; start += kBlock) {
      const int count = static_cast<int>(std::min<int64_t>(kBlock, vocab - start));
      block(start, count);
      work(start, count);
    }
  }
};

template <class T>
void dense(const Worker<T>& w, int64_t n, int32_t mode, T* memory, double* sums) {
  const UncorkTile& tile = w.tile;
  const int64_t components = tile.components;
  const Upstream up = upstream_of<T>(tile, n);
  if (mode == UNCORK_GRADIENT && !up.kept && up.none()) return skip_token(w, n);
  for (int64_t k = 0; k < components; ++k)
    w.rows.get()[k] = sweep(w, int(k), w.row(n * components + k), false, false);
  const Row<T>& first = w.rows.get()[0];
  const double lse = tile.log_prior ? 0 : double(first.top) + std::log(first.sum);
  Dense<T> d(w, n, up, memory);
  if (mode == UNCORK_LOG_PROB) {
    T* into = w.row(n * components);
    d.each_block([&](int64_t start, int count) { std::copy_n(d.mixed, count, into + start); });
    return;
  }
  const bool gradient = mode == UNCORK_GRADIENT;
  const double grad_lse = tile.log_prior ? 0 : up.lse + 2 * up.square * lse;
  // With one component and no gradient of the entropy, the gradient needs no sum over words but that of the target, so
  // one pass gathers and writes.
  const bool at_once = gradient && !d.mixture() && !tile.grad_entropy;
  if (at_once) d.grad_component[0] = static_cast<T>(-up.cross_entropy * d.target_sum());
  d.each_block([&](int64_t start, int count) {
    d.gather(start, count, gradient && !at_once);
    if (at_once) d.write(start, count, static_cast<T>(grad_lse));
  });
  put<T>(tile.cross_entropy, n, up.kept ? d.loss : 0);
  put<T>(tile.lse, n, lse);
  put<T>(tile.entropy, n, d.entropy);
  if (tile.argmax) tile.argmax[n] = tile.log_prior ? d.argmax : w.argmax(w.row(n), first);
  if (!gradient) return;
  if (!at_once) d.each_block([&](int64_t start, int count) { d.write(start, count, static_cast<T>(grad_lse)); });
  double total = 0;
  for (int64_t k = 0; k < components; ++k) total += double(d.grad_component[k]);
  for (int64_t k = 0; k < components; ++k) {
    const int64_t r = n * components + k;
    if (w.chain.wanted) w.flush(int(k), 1.0, sums);
    put<T>(tile.scale, r, 1);
    if (tile.log_prior) put<T>(tile.grad_prior, r, double(d.grad_component[k]) - std::exp(double(d.log_prior[k])) * total);
  }
}

}  // namespace
