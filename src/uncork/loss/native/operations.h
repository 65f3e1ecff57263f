// The primitives that a logit function is made of, on a block of scores: value and derivative, and the sums that their
// tables' gradients need. A chain of them is a loop; each works through a block in phases that the compiler vectorises.
#pragma once

#include <algorithm>
#include <cstddef>
#include <limits>

#include "interface.h"
#include "vector_math.h"

namespace {

constexpr int kBlock = 1024;  // numbers of a row that are worked on at once: they stay in the first-level cache
constexpr int kPad = 16;      // a block is padded to a multiple of it, so that every element takes the vectorised path
constexpr int kMaxOperations = 16;

inline int padded(int n) { return (n + kPad - 1) / kPad * kPad; }

template <class T>
struct Pair {
  T first, second;
};

// Pairs are fetched and added by one instruction.
template <class T>
using Two [[gnu::vector_size(2 * sizeof(T)), gnu::aligned(sizeof(T))]] = T;

// One operation, its tables turned into what the loops need.
template <class T>
struct Op {
  int32_t kind, num_pieces;
  bool wanted;             // whether the gradients to its tables are needed
  T a, b, c;               // the numbers of a table without pieces
  T per_unit, half;        // piece = floor(x per_unit + half) + middle
  int32_t middle;
  int32_t copies;  // interleaved copies of its histogram; 0 where a row keeps a trail (a Step per element) instead
  T spacing, spacing_rest;  // their sum is the knots' spacing; the first has so few bits that its multiples are exact
  const T* knots;         // sorted knots, and for each of `cells` equal cells the last knot below it
  const int32_t* below;
  int32_t cells;
  T origin;
  const Pair<T>* lines;   // y = x + (first + second (x - knot))
  int64_t sums, scalars, histogram, trail;  // its offsets in the chain's sums, scalar sums, histograms and trails
  int num_scalars() const { return kind == UNCORK_SIGMOID ? 3 : 2; }
  bool piecewise() const { return kind >= UNCORK_UNIFORM; }
  int64_t num_sums() const { return piecewise() ? 2 * int64_t(num_pieces) : num_scalars(); }
  int64_t histogram_size() const { return piecewise() && wanted ? int64_t(copies) * num_pieces * 2 : 0; }
};

// What one operation of the chain keeps of a block for the backward.
template <class T>
struct Stage {
  alignas(64) T x[kBlock];
  alignas(64) T slope[kBlock];
  alignas(64) int32_t piece[kBlock];  // of a piecewise linear operation, and x minus that piece's knot
  alignas(64) T distance[kBlock];
};

// Bound on the distance from a knot: at x = inf, an infinite one would give inf - inf where the slope is below 1.
template <class T>
constexpr T kLargest = std::numeric_limits<T>::max();

template <class T>
void find_uniform(const Op<T>& op, Stage<T>& stage, int n) {
  const T per_unit = op.per_unit, half = op.half, most = T(op.num_pieces), spacing = op.spacing, rest = op.spacing_rest;
  const int32_t middle = op.middle, lowest = -op.middle, highest = op.num_pieces - 1 - op.middle;
  const T* x = stage.x;
  int32_t* piece = stage.piece;
  T* distance = stage.distance;
#pragma omp simd
  for (int j = 0; j < n; ++j) {
    T q = x[j] * per_unit + half;
    q = q > -most ? q : -most;  // NaN goes to the first piece; its value stays NaN
    q = q < most ? q : most;
    int32_t i = static_cast<int32_t>(q);
    i -= q < static_cast<T>(i);
    i = i > lowest ? i : lowest;
    i = i < highest ? i : highest;
    piece[j] = i + middle;
    const T steps = static_cast<T>(i) - half;
    const T found = x[j] - (steps * spacing + steps * rest);  // the knot as the table has it, rounded once
    distance[j] = found > kLargest<T> ? kLargest<T> : found;
  }
}

// The cell of a grid over the knots. It never falls as x rises, so a knot in an earlier cell lies below x.
template <class T>
inline int32_t cell_of(const Op<T>& op, T x) {
  T q = (x - op.origin) * op.per_unit;
  q = q > T(0) ? q : T(0);
  const T most = static_cast<T>(op.cells);
  const int32_t cell = static_cast<int32_t>(q < most ? q : most);
  return cell < op.cells ? cell : op.cells - 1;
}

// The last knot at or below x, or the first knot: bisection among those in the cell of x.
template <class T>
void find_sorted(const Op<T>& op, Stage<T>& stage, int n) {
  const T *knots = op.knots, *x = stage.x;
  int32_t* piece = stage.piece;
#pragma omp simd
  for (int j = 0; j < n; ++j) piece[j] = cell_of(op, x[j]);
  for (int j = 0; j < n; ++j) {
    int32_t low = op.below[piece[j]], count = op.below[piece[j] + 1] - low + 1;
    while (count > 1) {
      const int32_t step = count / 2;
      low += knots[low + step] <= x[j] ? step : 0;
      count -= step;
    }
    piece[j] = low;
    const T found = x[j] - knots[low];
    stage.distance[j] = found > kLargest<T> ? kLargest<T> : found;
  }
}

template <class T>
void forward_pieces(const Op<T>& op, Stage<T>& stage, T* y, Pair<T>* pairs, int n) {
  if (op.kind == UNCORK_UNIFORM)
    find_uniform(op, stage, n);
  else
    find_sorted(op, stage, n);
  const int32_t* piece = stage.piece;
  const Pair<T>* lines = op.lines;
  for (int j = 0; j < n; ++j) std::memcpy(&pairs[j], &lines[piece[j]], sizeof(Pair<T>));
  const T *x = stage.x, *distance = stage.distance;
  T* slope = stage.slope;
#pragma omp simd
  for (int j = 0; j < n; ++j) {
    slope[j] = T(1) + pairs[j].second;
    y[j] = x[j] + (pairs[j].first + pairs[j].second * distance[j]);
  }
}

// y = f(x) and the slope, for a block of n (a multiple of kPad) whose x the stage holds.
template <class T>
void forward(const Op<T>& op, Stage<T>& stage, T* y, Pair<T>* pairs, int n) {
  const T* x = stage.x;
  T* slope = stage.slope;
  const T a = op.a, b = op.b, c = op.c;
  switch (op.kind) {
    case UNCORK_AFFINE:
#pragma omp simd
      for (int j = 0; j < n; ++j) {
        y[j] = a * x[j] + b;
        slope[j] = a;
      }
      return;
    case UNCORK_TANH:
#pragma omp simd
      for (int j = 0; j < n; ++j) {
        const T cap = x[j] > T(0) ? b : a, u = x[j] / cap;
        y[j] = cap * tanh_(u);
        slope[j] = sech2_(u);
      }
      return;
    case UNCORK_SIGMOID:
#pragma omp simd
      for (int j = 0; j < n; ++j) {
        const T u = (x[j] + b) / c, s = sigmoid_(u);
        y[j] = a * s;
        slope[j] = (a / c) * (s * sigmoid_(-u));
      }
      return;
    case UNCORK_SOFTPLUS:  // tables (c, w) are a and b here
#pragma omp simd
      for (int j = 0; j < n; ++j) {
        y[j] = x[j] + b * log_sigmoid_(x[j] - a);
        slope[j] = T(1) + b * sigmoid_(a - x[j]);
      }
      return;
    default:
      forward_pieces(op, stage, y, pairs, n);
  }
}

// An element's piece and the gradients to add to that piece.
template <class T>
struct Step {
  int32_t piece;
  Pair<T> gradients;
};

// Pairs of (g, g distance): the gradients to the value and the slope of each element's piece.
template <class T>
void piece_gradients(const Stage<T>& stage, const T* g, Pair<T>* pairs, int n) {
  const T* distance = stage.distance;
#pragma omp simd
  for (int j = 0; j < n; ++j) {
    pairs[j].first = g[j];
    pairs[j].second = g[j] * distance[j];
  }
}

// histogram[piece] += pairs. Copies are interleaved, so that neighbours in one bin do not wait for each other.
template <int kCopies, class T>
void add_pieces(const Op<T>& op, const int32_t* piece, const Pair<T>* pairs, double* histogram, int n) {
  const int64_t size = 2 * int64_t(op.num_pieces);
  for (int j = 0; j < n; j += kCopies) {
    for (int k = 0; k < kCopies; ++k) {
      double* bin = histogram + k * size + 2 * int64_t(piece[j + k]);
      Two<T> more;
      Two<double> sum;
      std::memcpy(&more, &pairs[j + k], sizeof more);
      std::memcpy(&sum, bin, sizeof sum);
      sum += __builtin_convertvector(more, Two<double>);
      std::memcpy(bin, &sum, sizeof sum);
    }
  }
}

// u clamped to where its sigmoid and tanh are saturated, so that inf times a slope of 0 is 0 and not nan.
template <class T>
inline T bounded_(T u) {
  u = u > T(400) ? T(400) : u;
  return u < T(-400) ? T(-400) : u;
}

// tanh(u) - u sech(u)^2, which is of the order of u^3.
inline float tanh_less_line(float u) {
  const float q = u * u;
  float p = 0.007983971387147903f;
  p = p * q - 0.034263502806425095f;
  p = p * q + 0.08517754822969437f;
  p = p * q - 0.17423418164253235f;
  p = p * q + 0.3237363398075104f;
  p = p * q - 0.533330500125885f;
  p = p * q + 0.6666666269302368f;
  return q < 0.64f ? u * q * p : tanh_(u) - u * sech2_(u);
}
inline double tanh_less_line(double u) { return tanh_(u) - u * sech2_(u); }

// The gradients of a table without pieces at one element, before they are multiplied by the upstream g.
template <class T>
struct Terms {
  T first, second, third;
};

template <class T>
inline Terms<T> affine_terms(const Op<T>&, T x) {
  return {x, T(1), T(0)};
}

template <class T>
inline Terms<T> tanh_terms(const Op<T>& op, T x) {
  const bool above = x > T(0);
  const T term = tanh_less_line(bounded_(x / (above ? op.b : op.a)));
  return {above ? T(0) : term, above ? term : T(0), T(0)};
}

template <class T>
inline Terms<T> sigmoid_terms(const Op<T>& op, T x) {
  const T u = bounded_((x + op.b) / op.c), s = sigmoid_(u), grad_shift = op.a / op.c * (s * sigmoid_(-u));
  return {s, grad_shift, -grad_shift * u};
}

template <class T>
inline Terms<T> softplus_terms(const Op<T>& op, T x) {
  return {-op.b * sigmoid_(op.a - x), log_sigmoid_(x - op.a), T(0)};
}

// sums += g times the terms, in double.
template <class T, class Of>
void add_terms_of(const Op<T>& op, const T* x, const T* g, double* sums, int n, Of of) {
  double first = 0, second = 0, third = 0;
#pragma omp simd reduction(+ : first, second, third)
  for (int j = 0; j < n; ++j) {
    const Terms<T> terms = of(op, x[j]);
    const bool none = g[j] == T(0);  // for an impossible word, whose terms may be anything, nan too
    first += none ? 0.0 : double(g[j]) * double(terms.first);
    second += none ? 0.0 : double(g[j]) * double(terms.second);
    third += none ? 0.0 : double(g[j]) * double(terms.third);
  }
  sums[0] += first, sums[1] += second;
  if (op.num_scalars() > 2) sums[2] += third;
}

template <class T>
void add_terms(const Op<T>& op, const T* x, const T* g, double* sums, int n) {
  switch (op.kind) {
    case UNCORK_AFFINE:
      return add_terms_of(op, x, g, sums, n, [](const Op<T>& o, T z) { return affine_terms(o, z); });
    case UNCORK_TANH:
      return add_terms_of(op, x, g, sums, n, [](const Op<T>& o, T z) { return tanh_terms(o, z); });
    case UNCORK_SIGMOID:
      return add_terms_of(op, x, g, sums, n, [](const Op<T>& o, T z) { return sigmoid_terms(o, z); });
    default:
      return add_terms_of(op, x, g, sums, n, [](const Op<T>& o, T z) { return softplus_terms(o, z); });
  }
}

}  // namespace
