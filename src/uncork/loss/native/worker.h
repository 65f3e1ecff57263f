// What one call of the tile prepares (its operations), and what each thread works with: scratch memory, and the loops
// over a row that the kernels in rows.cpp are made of.
#pragma once

#include <cstdlib>
#include <limits>
#include <memory>
#include <new>

#include "operations.h"

namespace {

template <class T>
constexpr T kInfinity = std::numeric_limits<T>::infinity();

struct Free {
  void operator()(void* p) const { std::free(p); }
};

// An aligned array that throws std::bad_alloc; not filled.
template <class T>
struct Array {
  std::unique_ptr<T[], Free> data;
  explicit Array(int64_t n) {
    const size_t bytes = (static_cast<size_t>(n) * sizeof(T) + 63) / 64 * 64;
    data.reset(static_cast<T*>(std::aligned_alloc(64, bytes ? bytes : 64)));
    if (!data) throw std::bad_alloc();
  }
  T* get() const { return data.get(); }
};

template <class T>
inline T at(const void* array, int64_t i, T otherwise) {
  return array ? static_cast<const T*>(array)[i] : otherwise;
}

// The operations of a call, prepared, and how its sums are laid out.
template <class T>
struct Chain {
  Op<T> ops[kMaxOperations];
  int size = 0;
  int64_t num_sums = 0, num_scalars = 0, histogram_size = 0, trail_size = 0;
  bool wanted = false;
  Array<Pair<T>> lines;
  Array<int32_t> below;

  // The pieces of all operations whose kind is `kind` or one after it.
  static int64_t count_pieces(const UncorkTile& tile, int32_t kind) {
    int64_t pieces = 0;
    for (int i = 0; i < tile.num_operations; ++i)
      pieces += tile.operations[i].kind >= kind ? tile.operations[i].num_pieces : 0;
    return pieces;
  }

  explicit Chain(const UncorkTile& tile, bool sums_wanted)
      : lines(count_pieces(tile, UNCORK_UNIFORM)),
        below(kCells * count_pieces(tile, UNCORK_SORTED) + tile.num_operations) {
    Pair<T>* next = lines.get();
    int32_t* grid = below.get();
    for (int i = 0; i < tile.num_operations; ++i) {
      const UncorkOperation& from = tile.operations[i];
      Op<T>& op = ops[size++];
      op = Op<T>{};
      op.kind = from.kind;
      op.num_pieces = from.num_pieces;
      op.wanted = sums_wanted && from.sums;
      if (op.piecewise())
        next = prepare_pieces(op, from, next, tile.vocab);
      else
        prepare_scalars(op, static_cast<const T*>(from.tables[0]));
      if (op.kind == UNCORK_SORTED) grid = prepare_grid(op, grid);
      op.sums = num_sums, op.scalars = num_scalars, op.histogram = histogram_size, op.trail = trail_size;
      if (!op.wanted) continue;
      wanted = true;
      num_sums += op.num_sums();
      num_scalars += op.piecewise() ? 0 : op.num_scalars();
      histogram_size += op.histogram_size();
      if (op.piecewise() && !op.copies) trail_size += tile.vocab + kPad;
    }
  }

 private:
  static int bits_of(int32_t n) {
    int bits = 0;
    for (; n; n >>= 1) ++bits;
    return bits;
  }

  // x > 0 cut down to its leading bits.
  static double leading_bits(double x, int bits) {
    int exponent;
    const double mantissa = std::frexp(x, &exponent);
    const double unit = std::ldexp(1.0, std::max(1, bits));
    return std::ldexp(std::floor(mantissa * unit) / unit, exponent);
  }

  static constexpr int kCells = 4;  // cells of the grid per knot

  static int32_t* prepare_grid(Op<T>& op, int32_t* below) {
    const int32_t pieces = op.num_pieces;
    op.cells = kCells * pieces;
    op.origin = op.knots[0];
    const T width = op.knots[pieces - 1] - op.knots[0];
    op.per_unit = width > T(0) ? static_cast<T>(op.cells) / width : T(0);
    op.below = below;
    int32_t last = 0;
    for (int32_t cell = 0; cell < op.cells; ++cell) {
      while (last + 1 < pieces && cell_of(op, op.knots[last + 1]) < cell) ++last;
      below[cell] = last;
    }
    below[op.cells] = pieces - 1;
    return below + op.cells + 1;
  }

  static void prepare_scalars(Op<T>& op, const T* table) {
    op.a = table[0], op.b = table[1], op.c = op.kind == UNCORK_SIGMOID ? table[2] : T(0);
  }

  static Pair<T>* prepare_pieces(Op<T>& op, const UncorkOperation& from, Pair<T>* line, int64_t vocab) {
    const auto* knots = static_cast<const T*>(from.tables[0]);
    const auto* values = static_cast<const T*>(from.tables[1]);
    const auto* slopes = static_cast<const T*>(from.tables[2]);
    const int32_t pieces = from.num_pieces;
    op.knots = knots, op.lines = line;
    // Emptying a histogram of many bins after a row would cost more than going through the row's elements again.
    op.copies = pieces <= 256 ? 4 : pieces <= vocab / 2 ? 2 : 0;
    for (int32_t i = 0; i < pieces; ++i, ++line) {
      line->first = values[i];
      line->second = slopes[i];
    }
    if (op.kind == UNCORK_UNIFORM) {
      const double spacing = 2 * from.bound / pieces;
      op.per_unit = static_cast<T>(pieces / (2 * from.bound));
      op.half = static_cast<T>((pieces % 2) / 2.0);
      op.middle = pieces / 2;
      op.spacing = static_cast<T>(leading_bits(spacing, std::numeric_limits<T>::digits - bits_of(pieces)));
      op.spacing_rest = static_cast<T>(spacing - double(op.spacing));
    }
    return line;
  }
};

// What the loops over a row return.
template <class T>
struct Row {
  T top = 0;            // the largest logit, subtracted before exp; 0 where all are -inf
  T best = 0;           // the largest score
  bool masked = false;  // whether some score is -inf
  double sum = 0;       // of exp(logit - top)
  double weighted = 0;  // of exp(logit - top) (logit - top)
};

// One thread's scratch memory, and the loops over a row.
template <class T>
struct Worker {
  const UncorkTile& tile;
  const Chain<T>& chain;
  Array<Stage<T>> stages;  // one per component and operation
  Array<T> logits, grads, keep;
  Array<Pair<T>> pairs;
  Array<double> histograms, scalars;  // one per component
  Array<Step<T>> trails;              // one per component
  Array<Row<T>> rows;
  Array<double> joint;  // (K,)
  Array<T> targets;     // (K,)

  Worker(const UncorkTile& t, const Chain<T>& c)
      : tile(t),
        chain(c),
        stages(t.components * c.size),
        logits(t.components * kBlock),
        grads(t.components * kBlock),
        keep(t.components * kBlock),
        pairs(kBlock),
        histograms(t.components * c.histogram_size),
        scalars(t.components * c.num_scalars),
        trails(t.components * c.trail_size),
        rows(t.components),
        joint(t.components),
        targets(t.components) {
    std::fill_n(histograms.get(), t.components * c.histogram_size, 0.0);
    std::fill_n(scalars.get(), t.components * c.num_scalars, 0.0);
  }

  T* row(int64_t r) const { return static_cast<T*>(tile.scores) + r * tile.stride; }
  const T* bias() const { return static_cast<const T*>(tile.bias); }
  T score(const T* z, int64_t v) const { return z[v] + (tile.bias ? bias()[v] : T(0)); }

  // The largest score, and whether some score is -inf.
  Row<T> extremes(const T* z) const {
    constexpr int kLanes = 64;
    T high[kLanes], low[kLanes];
    std::fill_n(high, kLanes, -kInfinity<T>);
    std::fill_n(low, kLanes, kInfinity<T>);
    const T* b = bias();
    int64_t v = 0;
    for (; v + kLanes <= tile.vocab; v += kLanes) {
#pragma omp simd
      for (int k = 0; k < kLanes; ++k) {
        const T x = b ? z[v + k] + b[v + k] : z[v + k];
        high[k] = x > high[k] ? x : high[k];
        low[k] = x < low[k] ? x : low[k];
      }
    }
    for (int k = 0; v < tile.vocab; ++v, ++k) {
      const T x = score(z, v);
      high[k] = x > high[k] ? x : high[k];
      low[k] = x < low[k] ? x : low[k];
    }
    Row<T> found;
    found.best = *std::max_element(high, high + kLanes);
    found.masked = *std::min_element(low, low + kLanes) == -kInfinity<T>;
    return found;
  }

  // The first word of the largest score; the first NaN where there is one, as torch has it.
  int64_t argmax(const T* z, const Row<T>& found) const {
    const bool nan = found.sum != found.sum;
    int64_t first = -1;
    for (int64_t v = 0; v < tile.vocab; ++v) {
      const T x = score(z, v);
      if (nan && x != x) return v;
      if (first < 0 && x == found.best) {
        first = v;
        if (!nan) break;
      }
    }
    return first < 0 ? 0 : first;
  }

  // The logits of scores [start, start + n) of a row; the stages keep what the backward needs. Impossible words are
  // computed as if their score were 0, and marked in `keep`.
  T* logits_of(int k, const T* z, int64_t start, int n, bool masked) const {
    T* y = logits.get() + k * kBlock;
    Stage<T>* stage = stages.get() + int64_t(k) * chain.size;
    T* x = chain.size ? stage[0].x : y;
    load(x, z + start, bias() ? bias() + start : nullptr, n);
    if (masked) mark(x, keep.get() + k * kBlock, padded(n));
    for (int i = 0; i < chain.size; ++i)
      forward(chain.ops[i], stage[i], i + 1 < chain.size ? stage[i + 1].x : y, pairs.get(), padded(n));
    return y;
  }

  static void load(T* x, const T* z, const T* b, int n) {
    if (b) {
#pragma omp simd
      for (int j = 0; j < n; ++j) x[j] = z[j] + b[j];
    } else {
      std::memcpy(x, z, sizeof(T) * n);
    }
    for (int j = n; j < padded(n); ++j) x[j] = x[n - 1];
  }

  static void mark(T* x, T* kept, int n) {
#pragma omp simd
    for (int j = 0; j < n; ++j) {
      kept[j] = x[j] == -kInfinity<T> ? T(0) : T(1);
      x[j] = kept[j] == T(0) ? T(0) : x[j];
    }
  }

  // Sets x to `value` where the mark is 0, and in the padding after the n-th number.
  void fill(int k, T* x, int n, bool masked, T value) const {
    const T* kept = keep.get() + k * kBlock;
    if (masked) {
#pragma omp simd
      for (int j = 0; j < padded(n); ++j) x[j] = kept[j] == T(0) ? value : x[j];
    }
    for (int j = n; j < padded(n); ++j) x[j] = value;
  }

  // The logit of one score; *slope becomes f' there, and the stages of component k are filled for `add_single`.
  T logit(int k, T z, T* slope) const {
    T one[kPad];
    std::fill_n(one, kPad, z);
    Stage<T>* stage = stages.get() + int64_t(k) * chain.size;
    T* x = chain.size ? stage[0].x : logits.get() + k * kBlock;
    std::copy_n(one, kPad, x);
    for (int i = 0; i < chain.size; ++i)
      forward(chain.ops[i], stage[i], i + 1 < chain.size ? stage[i + 1].x : logits.get() + k * kBlock, pairs.get(), kPad);
    *slope = T(1);
    for (int i = 0; i < chain.size; ++i) *slope *= stage[i].slope[0];
    return logits.get()[k * kBlock];
  }

  void gather_pieces(const Op<T>& op, const Stage<T>& stage, int k, const T* g, int64_t start, int n) const {
    piece_gradients(stage, g, pairs.get(), padded(n));
    if (op.copies) {
      double* histogram = histograms.get() + k * chain.histogram_size + op.histogram;
      (op.copies == 4 ? add_pieces<4, T> : add_pieces<2, T>)(op, stage.piece, pairs.get(), histogram, padded(n));
      return;
    }
    Step<T>* trail = trails.get() + k * chain.trail_size + op.trail + start;
    for (int j = 0; j < n; ++j) trail[j] = {stage.piece[j], pairs.get()[j]};
  }

  // Turns the gradients to a block's logits into those to its scores, in place, and gathers those to the tables.
  void backward(int k, T* g, int64_t start, int n) const {
    Stage<T>* stage = stages.get() + int64_t(k) * chain.size;
    for (int i = chain.size - 1; i >= 0; --i) {
      const Op<T>& op = chain.ops[i];
      if (op.wanted && op.piecewise())
        gather_pieces(op, stage[i], k, g, start, n);
      else if (op.wanted)
        add_terms(op, stage[i].x, g, scalars.get() + k * chain.num_scalars + op.scalars, padded(n));
      const T* slope = stage[i].slope;
#pragma omp simd
      for (int j = 0; j < padded(n); ++j) g[j] *= slope[j];
    }
  }

  // sums += factor times what component k has gathered, which is then reset to 0.
  void flush(int k, double factor, double* sums) const {
    for (int i = 0; i < chain.size; ++i) {
      const Op<T>& op = chain.ops[i];
      if (!op.wanted) continue;
      double* into = sums + op.sums;
      if (!op.piecewise()) {
        double* from = scalars.get() + k * chain.num_scalars + op.scalars;
        for (int s = 0; s < op.num_scalars(); ++s) {
          into[s] += factor * from[s];
          from[s] = 0;
        }
        continue;
      }
      const int64_t size = op.num_sums();
      const Step<T>* trail = trails.get() + k * chain.trail_size + op.trail;
      for (int64_t v = 0; v < tile.vocab && !op.copies; ++v) {
        double* bin = into + 2 * int64_t(trail[v].piece);
        bin[0] += factor * static_cast<double>(trail[v].gradients.first);
        bin[1] += factor * static_cast<double>(trail[v].gradients.second);
      }
      double* from = histograms.get() + k * chain.histogram_size + op.histogram;
      for (int c = 0; c < op.copies; ++c, from += size) {
#pragma omp simd
        for (int64_t s = 0; s < size; ++s) {
          into[s] += factor * from[s];
          from[s] = 0;
        }
      }
    }
  }

  // Adds the gradients to the tables from one element with upstream gradient g, whose stages `logit` has just filled.
  void add_single(int k, double g, double* sums) const {
    const Stage<T>* stage = stages.get() + int64_t(k) * chain.size;
    for (int i = chain.size - 1; i >= 0; --i) {
      const Op<T>& op = chain.ops[i];
      double* into = sums + op.sums;
      if (op.wanted && op.piecewise()) {
        const int32_t piece = stage[i].piece[0];
        into[2 * int64_t(piece)] += g;
        into[2 * int64_t(piece) + 1] += g * double(stage[i].distance[0]);
      } else if (op.wanted) {
        const T one[1] = {T(1)};
        double terms[3] = {0, 0, 0};
        add_terms(op, &stage[i].x[0], one, terms, 1);
        for (int s = 0; s < op.num_scalars(); ++s) into[s] += g * terms[s];
      }
      g *= stage[i].slope[0];
    }
  }
};

}  // namespace
