// The primitives that a logit function is made of, on a block of scores: value and derivative, and the sums that their
// tables' gradients need. A chain of them is a loop; each works through a block in phases that the compiler vectorises.
#pragma once

#include <algorithm>
#include <cstddef>

#include "interface.h"
#include "vector_math.h"

namespace {

constexpr int kBlock = 1024;  // numbers of a row that are worked on at once: they stay in the first-level cache
constexpr int kPad = 16;      // a block is filled up to a multiple of it, so that every element goes the same way
constexpr int kMaxOperations = 16;
constexpr int kCopies = 2;

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
  bool wanted;             // whether its tables' gradients are
  T a, b, c;               // the numbers of a table without pieces
  T per_unit, half;        // piece = floor(x per_unit + half) + middle
  int32_t middle;
  int32_t copies;  // of its histogram, interleaved; 0 where a row leaves a trail instead
  T spacing, spacing_rest;
  const T* knots;         // sorted knots, and for each of `cells` equal cells the last knot below it
  const int32_t* below;
  int32_t cells;
  T origin;
  const Pair<T>* lines;   // y = first + second x
  int64_t sums, scalars, histogram, trail;  // where its own begin, among the sums, scalar sums, histograms and trails
  int num_scalars() const { return kind == UNCORK_SIGMOID ? 3 : 2; }
  bool piecewise() const { return kind >= UNCORK_UNIFORM; }
  int64_t num_sums() const { return piecewise() ? 2 * int64_t(num_pieces) : num_scalars(); }
  int64_t histogram_size() const { return piecewise() && wanted ? int64_t(copies) * num_pieces * 2 : 0; }
};

// What a stage of the chain keeps of a block.
template <class T>
struct Stage {
  alignas(64) T x[kBlock];
  alignas(64) T slope[kBlock];
  alignas(64) int32_t piece[kBlock];
};

template <class T>
void find_uniform(const Op<T>& op, const T* x, int32_t* piece, int n) {
  const T per_unit = op.per_unit, half = op.half, most = T(op.num_pieces);
  const int32_t middle = op.middle, last = op.num_pieces - 1;
#pragma omp simd
  for (int j = 0; j < n; ++j) {
    T q = x[j] * per_unit + half;
    q = q > -most ? q : -most;  // NaN goes to the first piece; its value stays NaN
    q = q < most ? q : most;
    int32_t i = static_cast<int32_t>(q);
    i = (i - (q < static_cast<T>(i))) + middle;
    i = i > 0 ? i : 0;
    piece[j] = i < last ? i : last;
  }
}

// The cell of a grid over the knots. It never falls as x rises, so a knot in an earlier cell lies below x.
template <class T>
inline int32_t cell_of(const Op<T>& op, T x) {
  T q = (x - op.origin) * op.per_unit;
  q = q > T(0) ? q : T(0);
  const T last = static_cast<T>(op.cells - 1);
  return static_cast<int32_t>(q < last ? q : last);
}

// The last knot at or below x, or the first knot: bisection among those in the cell of x.
template <class T>
void find_sorted(const Op<T>& op, const T* x, int32_t* piece, int n) {
  const T* knots = op.knots;
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
  }
}

template <class T>
void forward_pieces(const Op<T>& op, Stage<T>& stage, T* y, Pair<T>* pairs, int n) {
  if (op.kind == UNCORK_UNIFORM)
    find_uniform(op, stage.x, stage.piece, n);
  else
    find_sorted(op, stage.x, stage.piece, n);
  const int32_t* piece = stage.piece;
  const Pair<T>* lines = op.lines;
  for (int j = 0; j < n; ++j) std::memcpy(&pairs[j], &lines[piece[j]], sizeof(Pair<T>));
  const T* x = stage.x;
  T* slope = stage.slope;
#pragma omp simd
  for (int j = 0; j < n; ++j) {
    slope[j] = pairs[j].second;
    y[j] = pairs[j].first + pairs[j].second * x[j];
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

// x minus the knot of its piece.
template <class T>
inline T distance(const Op<T>& op, T x, int32_t piece) {
  if (op.kind == UNCORK_SORTED) return x - op.knots[piece];
  const T steps = static_cast<T>(piece - op.middle) - op.half;
  return (x - steps * op.spacing) - steps * op.spacing_rest;
}

// An element's piece and what is to be added there.
template <class T>
struct Step {
  int32_t piece;
  Pair<T> gradients;
};

// Pairs of (g, g distance): the gradients to the value and the slope of each element's piece.
template <class T>
void piece_gradients(const Op<T>& op, const Stage<T>& stage, const T* g, Pair<T>* pairs, int n) {
  const T* x = stage.x;
  const int32_t* piece = stage.piece;
  if (op.kind == UNCORK_UNIFORM) {
    const T half = op.half, spacing = op.spacing, rest = op.spacing_rest;
    const int32_t middle = op.middle;
#pragma omp simd
    for (int j = 0; j < n; ++j) {
      const T steps = static_cast<T>(piece[j] - middle) - half;
      pairs[j].first = g[j];
      pairs[j].second = g[j] * ((x[j] - steps * spacing) - steps * rest);
    }
  } else {
    for (int j = 0; j < n; ++j) pairs[j] = {g[j], g[j] * distance(op, x[j], piece[j])};
  }
}

// histogram[piece] += pairs. Two copies are interleaved, so that neighbours in one bin do not wait for each other.
template <class T>
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

// The gradients of a table without pieces at one element, before they are multiplied by the upstream g.
template <class T>
inline void table_terms(const Op<T>& op, T x, double* terms) {
  terms[0] = terms[1] = terms[2] = 0;
  const double z = x, a = op.a, b = op.b, c = op.c;
  if (op.kind == UNCORK_AFFINE) {
    terms[0] = z, terms[1] = 1;
  } else if (op.kind == UNCORK_TANH) {  // in double: the difference is of the order of u^3
    const double u = z / (x > T(0) ? b : a);
    terms[x > T(0)] = tanh_(u) - u * sech2_(u);
  } else if (op.kind == UNCORK_SIGMOID) {
    const double u = (z + b) / c, s = sigmoid_(u), by_shift = a / c * s * sigmoid_(-u);
    terms[0] = s, terms[1] = by_shift, terms[2] = -by_shift * u;
  } else {
    terms[0] = -b * sigmoid_(a - z), terms[1] = log_sigmoid_(z - a);
  }
}

template <class T>
void add_terms(const Op<T>& op, const Stage<T>& stage, const T* g, double* sums, int n) {
  const T* x = stage.x;
  if (op.kind == UNCORK_AFFINE) {
    double by_slope = 0, by_offset = 0;
#pragma omp simd reduction(+ : by_slope, by_offset)
    for (int j = 0; j < n; ++j) {
      by_slope += static_cast<double>(g[j]) * static_cast<double>(x[j]);
      by_offset += static_cast<double>(g[j]);
    }
    sums[0] += by_slope, sums[1] += by_offset;
    return;
  }
  for (int j = 0; j < n; ++j) {
    if (g[j] == T(0)) continue;
    double terms[3];
    table_terms(op, x[j], terms);
    for (int i = 0; i < op.num_scalars(); ++i) sums[i] += static_cast<double>(g[j]) * terms[i];
  }
}

}  // namespace
