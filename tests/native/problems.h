// Random calls of the tile: shapes, targets, functions and numbers, ordinary and not.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "interface.h"

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}
  int64_t below(int64_t n) { return static_cast<int64_t>(engine_() % static_cast<uint64_t>(n)); }
  double between(double low, double high) { return low + (high - low) * static_cast<double>(engine_() >> 11) * 0x1p-53; }
  bool chance(double p) { return between(0, 1) < p; }
  template <class T>
  T pick(std::initializer_list<T> from) {
    return from.begin()[below(static_cast<int64_t>(from.size()))];
  }

 private:
  std::mt19937_64 engine_;
};

// Ordinary numbers; the same with impossible words (-inf); anything at all, in the tables too.
enum class Kind { kOrdinary, kMasked, kWild };

template <class T>
struct Operation {
  UncorkOperation plain{};
  std::vector<T> tables[3];
  bool sums = false;
};

enum Wanted { kCrossEntropy, kLse, kEntropy, kArgmax, kNumWanted };

// What one call is given; an empty vector stands for a null pointer.
template <class T>
struct Problem {
  Kind kind;
  int32_t mode;
  int64_t tokens, components, vocab, stride;
  double uniform = 0;
  std::vector<Operation<T>> chain;
  std::vector<T> scores, bias, hit, probabilities, word_weight, log_prior;
  std::vector<T> grad_cross_entropy, grad_lse, grad_square, grad_entropy;
  std::vector<int64_t> index;
  std::vector<uint8_t> kept;
  bool wanted[kNumWanted];
  int64_t rows() const { return tokens * components; }
};

double wild_number(Random& random) {
  return random.pick(
      {0.0, -0.0, 1.0, -kInfinity, kInfinity, kNaN, 1e-310, -1e-40, 1e-45, 88.8, -104.0, -87.4, 1e4, -1e4, 3e38, -3e38});
}

template <class T>
std::vector<T> numbers(Random& random, int64_t n, double low, double high) {
  std::vector<T> x(static_cast<size_t>(n));
  for (T& value : x) value = static_cast<T>(random.between(low, high));
  return x;
}

template <class T>
void spoil(Random& random, std::vector<T>& x, double share) {
  for (T& value : x)
    if (random.chance(share)) value = static_cast<T>(wild_number(random));
}

// Slopes, and values that make the pieces meet: an increasing function.
template <class T>
void make_pieces(Random& random, Operation<T>& op) {
  const int32_t pieces = random.chance(0.05) ? 100000 : random.pick({1, 2, 3, 7, 16, 1000});
  const double bound = random.between(0.5, 12);
  op.plain.num_pieces = pieces;
  op.plain.bound = op.plain.kind == UNCORK_UNIFORM ? bound : 0;
  std::vector<double> knots(static_cast<size_t>(pieces));
  for (int32_t i = 0; i < pieces; ++i)
    knots[i] = op.plain.kind == UNCORK_UNIFORM ? -bound + 2 * bound * i / pieces : random.between(-bound, bound);
  std::sort(knots.begin(), knots.end());
  op.tables[0].assign(knots.begin(), knots.end());
  op.tables[2] = numbers<T>(random, pieces, -0.5, 1);
  double value = random.between(-1, 1);
  for (int32_t i = 0; i < pieces; ++i) {
    op.tables[1].push_back(static_cast<T>(value));
    if (i + 1 < pieces) value += static_cast<double>(op.tables[2][i]) * (knots[i + 1] - knots[i]);
  }
}

template <class T>
Operation<T> make_operation(Random& random, Kind kind) {
  Operation<T> op;
  op.plain.kind = static_cast<int32_t>(random.below(6));
  op.sums = random.chance(0.7);
  if (op.plain.kind >= UNCORK_UNIFORM)
    make_pieces(random, op);
  else
    op.tables[0] = numbers<T>(random, op.plain.kind == UNCORK_SIGMOID ? 3 : 2, 0.3, 3);
  if (kind == Kind::kWild && random.chance(0.3))
    for (auto& table : op.tables) spoil(random, table, 0.2);
  return op;
}

template <class T>
void make_shape(Random& random, Problem<T>& p) {
  constexpr int64_t kMostScores = 12000;
  p.components = random.chance(0.6) ? 1 : 1 + random.below(5);
  p.vocab = random.chance(0.5) ? random.pick<int64_t>({1, 2, 15, 16, 17, 63, 64, 65, 1023, 1024, 1025, 2048, 5000})
                               : 1 + random.below(1200);
  const int64_t room = std::max<int64_t>(1, kMostScores / (p.vocab * p.components));
  p.tokens = std::min(room, random.chance(0.5) ? random.below(4) : random.below(300));
  p.stride = p.vocab + (random.chance(0.5) ? 0 : random.below(40));
}

template <class T>
void make_scores(Random& random, Problem<T>& p) {
  p.scores = numbers<T>(random, p.rows() * p.vocab, -8, 8);
  if (random.chance(0.5)) p.bias = numbers<T>(random, p.vocab, -1, 1);
  if (p.kind == Kind::kWild) {
    spoil(random, p.scores, random.pick({0.001, 0.1, 1.0}));
    spoil(random, p.bias, random.pick({0.0, 0.01}));
  }
  if (p.kind == Kind::kOrdinary) return;
  for (size_t i = 0; i < p.scores.size(); ++i)  // the first word stays possible where the numbers are to stay finite
    if (random.chance(0.1) && i % static_cast<size_t>(p.vocab)) p.scores[i] = static_cast<T>(-kInfinity);
  for (int64_t r = 0; r < p.rows(); ++r)
    if (p.kind == Kind::kWild && random.chance(0.1))
      std::fill_n(p.scores.begin() + r * p.vocab, p.vocab, static_cast<T>(random.pick({-kInfinity, kInfinity, kNaN})));
}

template <class T>
void make_target(Random& random, Problem<T>& p) {
  const int64_t which = random.below(5);
  if (which < 3) {
    p.hit = numbers<T>(random, p.tokens, 0, 2);
    for (int64_t n = 0; n < p.tokens; ++n) p.index.push_back(p.kind == Kind::kMasked ? 0 : random.below(p.vocab));
  } else if (which == 3) {
    p.probabilities = numbers<T>(random, p.tokens * p.vocab, 0, 2.0 / static_cast<double>(p.vocab));
    for (T& q : p.probabilities) q = random.chance(0.2) ? T(0) : q;
  }
  if (which < 4 && random.chance(0.4)) p.uniform = 0.1 / static_cast<double>(p.vocab);
  if (which < 4 && random.chance(0.4)) p.word_weight = numbers<T>(random, p.vocab, 0, 2);
  if (random.chance(0.5))
    for (int64_t n = 0; n < p.tokens; ++n) p.kept.push_back(random.chance(0.8));
}

template <class T>
void make_prior(Random& random, Problem<T>& p) {
  if (p.components == 1 && random.chance(0.8)) return;
  p.log_prior = numbers<T>(random, p.rows(), -2, 2);
  for (int64_t n = 0; n < p.tokens; ++n) {
    double sum = 0;
    T* row = p.log_prior.data() + n * p.components;
    for (int64_t k = 0; k < p.components; ++k) sum += std::exp(static_cast<double>(row[k]));
    for (int64_t k = 0; k < p.components; ++k) row[k] = static_cast<T>(static_cast<double>(row[k]) - std::log(sum));
  }
  if (p.kind == Kind::kWild) spoil(random, p.log_prior, 0.1);
}

template <class T>
Problem<T> make_problem(Random& random) {
  Problem<T> p;
  p.kind = random.pick({Kind::kOrdinary, Kind::kOrdinary, Kind::kMasked, Kind::kWild});
  p.mode = random.pick<int32_t>({UNCORK_STATISTICS, UNCORK_GRADIENT, UNCORK_GRADIENT, UNCORK_LOG_PROB});
  make_shape(random, p);
  make_scores(random, p);
  make_prior(random, p);
  for (int64_t i = random.below(5); i > 0; --i) p.chain.push_back(make_operation<T>(random, p.kind));
  const bool details = p.mode == UNCORK_STATISTICS && random.chance(0.5);  // these two are asked together, of statistics alone
  p.wanted[kEntropy] = p.wanted[kArgmax] = details;
  for (const Wanted which : {kCrossEntropy, kLse}) p.wanted[which] = p.mode != UNCORK_LOG_PROB && random.chance(0.8);
  if (p.mode == UNCORK_LOG_PROB) return p;
  make_target(random, p);
  if (p.mode != UNCORK_GRADIENT) return p;
  const auto upstream = [&](double share) {
    return random.chance(share) ? numbers<T>(random, p.tokens, -1, 2) : std::vector<T>();
  };
  if (!p.index.empty() || !p.probabilities.empty()) p.grad_cross_entropy = upstream(0.9);
  if (p.log_prior.empty()) p.grad_lse = upstream(0.3), p.grad_square = upstream(0.3);
  p.grad_entropy = upstream(0.2);
  if (p.kind == Kind::kWild) spoil(random, p.grad_cross_entropy, 0.1);
  for (T& factor : p.grad_cross_entropy) factor = random.chance(0.1) ? T(0) : factor;
  return p;
}

}  // namespace
