// Fuzzes the native tile through its C interface; `make sanitize` runs it under the address and undefined-behaviour
// sanitizers. Each case has its own seed: `fuzz FIRST COUNT` repeats the cases FIRST ... FIRST + COUNT - 1.
//
// What is checked: no access outside an array (all are of exact size, off alignment); the same bits for 1, 2 and 3 threads,
// at any alignment, and in two threads at once; every result written and nothing between the rows; ordinary numbers give
// finite results, on which the instruction sets agree; gradients that must sum to zero do; what has no kernel is refused;
// where memory runs out, in any thread, the call says so.
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "problems.h"

// How many allocations of the tile succeed before one fails; a negative number is never used up.
static std::atomic<int> allocations_left{-1};

extern "C" void* aligned_alloc(size_t alignment, size_t size) {
  void* block = nullptr;
  if (allocations_left.fetch_sub(1) == 0) return nullptr;
  return posix_memalign(&block, alignment, size) ? nullptr : block;
}

namespace {

// What GOMP_parallel does, in threads that the sanitizers know.
void in_threads(void (*body)(void*), void* data, unsigned threads, unsigned) {
  std::vector<std::thread> others;
  for (unsigned i = 1; i < threads; ++i) others.emplace_back(body, data);
  body(data);
  for (std::thread& other : others) other.join();
}

uint64_t current_case = 0;

template <class T>
[[noreturn]] void fail(const Problem<T>& p, const std::string& what) {
  std::fprintf(stderr, "fuzz: case %llu, %s: %s\n", static_cast<unsigned long long>(current_case), uncork_instructions(),
               what.c_str());
  std::fprintf(stderr, "  %s, mode %d, kind %d, N %lld, K %lld, V %lld, stride %lld, uniform %g, index %d, probabilities %d\n",
               sizeof(T) == 8 ? "double" : "float", p.mode, static_cast<int>(p.kind), static_cast<long long>(p.tokens),
               static_cast<long long>(p.components), static_cast<long long>(p.vocab), static_cast<long long>(p.stride),
               p.uniform, !p.index.empty(), !p.probabilities.empty());
  for (const auto& op : p.chain)
    std::fprintf(stderr, "  operation %d, P %d, sums %d\n", op.plain.kind, op.plain.num_pieces, op.sums);
  std::exit(1);
}

// --- Runs -----------------------------------------------------------------------------------------------------------

struct Free {
  void operator()(void* block) const { std::free(block); }
};

// A vector's numbers at the end of a block of memory of exact size, some numbers off its alignment.
template <class T>
class Exact {
 public:
  Exact(Random& random, const std::vector<T>& from) : size_(from.size()), offset_(static_cast<size_t>(random.below(4))) {
    block_.reset(static_cast<T*>(std::malloc((offset_ + size_) * sizeof(T) + (offset_ + size_ == 0))));
    std::copy(from.begin(), from.end(), block_.get() + offset_);
  }
  T* get() const { return size_ ? block_.get() + offset_ : nullptr; }
  std::vector<T> read() const { return {block_.get() + offset_, block_.get() + offset_ + size_}; }

 private:
  std::unique_ptr<T[], Free> block_;
  size_t size_, offset_;
};

// No computation gives these bits.
template <class T>
T unwritten() {
  T value;
  std::memset(&value, 0x7f, sizeof value);
  const uint32_t mark = 0x7fe1a2b3;
  std::memcpy(reinterpret_cast<char*>(&value) + sizeof value - sizeof mark, &mark, sizeof mark);
  return value;
}

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

template <class T>
struct Result {
  std::vector<T> scores, cross_entropy, lse, entropy, scale, grad_prior;
  std::vector<int64_t> argmax;
  std::vector<double> sums;

  // The name of the first result that differs, or null.
  const char* differs(const Result& other) const {
    if (!same_bits(scores, other.scores)) return "scores";
    if (!same_bits(cross_entropy, other.cross_entropy)) return "cross_entropy";
    if (!same_bits(lse, other.lse)) return "lse";
    if (!same_bits(entropy, other.entropy)) return "entropy";
    if (!same_bits(scale, other.scale)) return "scale";
    if (!same_bits(grad_prior, other.grad_prior)) return "grad_prior";
    if (!same_bits(argmax, other.argmax)) return "argmax";
    return same_bits(sums, other.sums) ? nullptr : "sums";
  }
};

template <class T>
std::vector<T> with_gaps(const Problem<T>& p) {
  if (!p.rows()) return {};
  std::vector<T> all(static_cast<size_t>((p.rows() - 1) * p.stride + p.vocab), unwritten<T>());
  for (int64_t r = 0; r < p.rows(); ++r) std::copy_n(p.scores.begin() + r * p.vocab, p.vocab, all.begin() + r * p.stride);
  return all;
}

template <class T>
std::vector<T> without_gaps(const Problem<T>& p, const std::vector<T>& all) {
  std::vector<T> scores;
  const T mark = unwritten<T>();
  for (size_t i = 0; i < all.size(); ++i) {
    if (static_cast<int64_t>(i) % p.stride < p.vocab)
      scores.push_back(all[i]);
    else if (std::memcmp(&all[i], &mark, sizeof mark) != 0)
      fail(p, "written between the rows");
  }
  return scores;
}

template <class T>
Result<T> run(const Problem<T>& p, int32_t threads, Random random) {
  std::vector<std::unique_ptr<Exact<T>>> arrays;
  const auto exact = [&](const std::vector<T>& from) {
    arrays.push_back(std::make_unique<Exact<T>>(random, from));
    return arrays.back().get();
  };
  const auto result = [&](bool wanted, int64_t n) {
    return exact(std::vector<T>(wanted ? static_cast<size_t>(n) : 0, unwritten<T>()));
  };
  std::vector<UncorkOperation> operations;
  std::vector<Exact<double>> sums;
  for (const Operation<T>& op : p.chain) {
    operations.push_back(op.plain);
    for (int i = 0; i < 3; ++i) operations.back().tables[i] = exact(op.tables[i])->get();
    const size_t size = op.plain.num_pieces ? 2 * op.tables[2].size() : op.tables[0].size();
    sums.emplace_back(random, std::vector<double>(op.sums && p.mode == UNCORK_GRADIENT ? size : 0));
    operations.back().sums = sums.back().get();
  }
  const Exact<int64_t> index(random, p.index), argmax(random, std::vector<int64_t>(p.wanted[kArgmax] ? p.tokens : 0, -1));
  const Exact<uint8_t> kept(random, p.kept);
  const bool gradient = p.mode == UNCORK_GRADIENT;
  const Exact<T>*scores = exact(with_gaps(p)), *scale = result(gradient, p.rows()), *lse = result(p.wanted[kLse], p.tokens);
  const Exact<T>*grad_prior = result(gradient && !p.log_prior.empty(), p.rows()), *entropy = result(p.wanted[kEntropy], p.tokens);
  const Exact<T>* cross_entropy = result(p.wanted[kCrossEntropy], p.tokens);
  UncorkTile tile{};
  tile.tokens = p.tokens, tile.components = p.components, tile.vocab = p.vocab, tile.stride = p.stride;
  tile.scores = scores->get(), tile.bias = exact(p.bias)->get(), tile.operations = operations.data();
  tile.num_operations = static_cast<int32_t>(operations.size()), tile.is_double = sizeof(T) == 8, tile.threads = threads;
  tile.parallel = in_threads;
  tile.index = index.get(), tile.kept = kept.get(), tile.hit = exact(p.hit)->get(), tile.uniform = p.uniform;
  tile.probabilities = exact(p.probabilities)->get(), tile.word_weight = exact(p.word_weight)->get();
  tile.log_prior = exact(p.log_prior)->get(), tile.grad_cross_entropy = exact(p.grad_cross_entropy)->get();
  tile.grad_lse = exact(p.grad_lse)->get(), tile.grad_square = exact(p.grad_square)->get(),
  tile.grad_entropy = exact(p.grad_entropy)->get();
  tile.cross_entropy = cross_entropy->get(), tile.lse = lse->get(), tile.entropy = entropy->get(), tile.argmax = argmax.get();
  tile.scale = scale->get(), tile.grad_prior = grad_prior->get();
  if (const int32_t code = uncork_run(&tile, p.mode)) fail(p, "uncork_run returned " + std::to_string(code));
  Result<T> out{without_gaps(p, scores->read()),
                cross_entropy->read(),
                lse->read(),
                entropy->read(),
                scale->read(),
                grad_prior->read(),
                argmax.read(),
                {}};
  for (const auto& part : sums)
    for (const double value : part.read()) out.sums.push_back(value);
  return out;
}

// --- Checks ---------------------------------------------------------------------------------------------------------

template <class T>
void check_written(const Problem<T>& p, const Result<T>& out) {
  const T mark = unwritten<T>();
  for (const auto* values : {&out.cross_entropy, &out.lse, &out.entropy, &out.scale, &out.grad_prior})
    for (const T& value : *values)
      if (std::memcmp(&value, &mark, sizeof mark) == 0) fail(p, "a result was not written");
  for (const int64_t word : out.argmax)
    if (word < 0 || word >= p.vocab) fail(p, "argmax is not a word");
  if (p.mode == UNCORK_STATISTICS && !same_bits(out.scores, p.scores)) fail(p, "statistics changed the scores");
}

template <class T>
void check_finite(const Problem<T>& p, const Result<T>& out) {
  for (const auto* values : {&out.lse, &out.entropy, &out.scale, &out.grad_prior})
    for (const T& value : *values)
      if (!std::isfinite(value)) fail(p, "a result is not finite");
  for (const T& value : out.cross_entropy)
    if (std::isnan(value) || (p.kind == Kind::kOrdinary && std::isinf(value))) fail(p, "cross_entropy is not finite");
  for (const double& value : out.sums)
    if (!std::isfinite(value)) fail(p, "a sum is not finite");
  if (p.mode == UNCORK_GRADIENT)
    for (const T& value : out.scores)
      if (!std::isfinite(value)) fail(p, "a gradient is not finite");
}

// Cross-entropy and entropy do not see a shift of the logits, and log-probabilities are of something that sums to 1.
template <class T>
void check_totals(const Problem<T>& p, const Result<T>& out) {
  const double tolerance = sizeof(T) == 8 ? 1e-9 : 1e-3;
  for (int64_t n = 0; p.mode == UNCORK_LOG_PROB && n < p.tokens; ++n) {
    double total = 0;
    for (int64_t v = 0; v < p.vocab; ++v) total += std::exp(static_cast<double>(out.scores[n * p.components * p.vocab + v]));
    if (!(std::abs(total - 1) < tolerance)) fail(p, "probabilities sum to " + std::to_string(total));
  }
  const bool shift_free = p.grad_lse.empty() && p.grad_square.empty();
  for (int64_t r = 0; p.mode == UNCORK_GRADIENT && p.chain.empty() && shift_free && r < p.rows(); ++r) {
    double total = 0, size = 1e-3;
    for (int64_t v = 0; v < p.vocab; ++v) {
      const double g = static_cast<double>(out.scale[r]) * static_cast<double>(out.scores[r * p.vocab + v]);
      total += g, size += std::abs(g);
    }
    // a target's impossible words add nothing to the gradient
    if (p.kind == Kind::kOrdinary && !(std::abs(total) < tolerance * size))
      fail(p, "a gradient sums to " + std::to_string(total));
  }
  for (int64_t n = 0; !out.grad_prior.empty() && n < p.tokens; ++n) {
    double total = 0;
    for (int64_t k = 0; k < p.components; ++k) total += static_cast<double>(out.grad_prior[n * p.components + k]);
    if (!(std::abs(total) < tolerance * 10)) fail(p, "the prior's gradient sums to " + std::to_string(total));
  }
}

template <class T>
void check_agreement(const Problem<T>& p, const Result<T>& a, const Result<T>& b) {
  const double tolerance = sizeof(T) == 8 ? 1e-9 : 2e-4;
  const auto near = [&](double x, double y, const char* name) {
    if (x == y || std::abs(x - y) <= tolerance * (1 + std::abs(x))) return;
    fail(p, std::string(name) + ": " + std::to_string(x) + " here, " + std::to_string(y) + " with other instructions");
  };
  for (size_t n = 0; n < a.cross_entropy.size(); ++n) near(a.cross_entropy[n], b.cross_entropy[n], "cross_entropy");
  for (size_t n = 0; n < a.lse.size(); ++n) near(a.lse[n], b.lse[n], "lse");
  for (size_t n = 0; n < a.entropy.size(); ++n) near(a.entropy[n], b.entropy[n], "entropy");
  if (p.mode == UNCORK_STATISTICS) return;
  for (const auto& op : p.chain)  // the slope jumps from piece to piece
    if (op.plain.kind >= UNCORK_UNIFORM) return;
  if (p.mode == UNCORK_GRADIENT) {
    for (size_t i = 0; i < a.scores.size(); ++i) {
      const size_t r = i / static_cast<size_t>(p.vocab);
      near(double(a.scores[i]) * double(a.scale[r]), double(b.scores[i]) * double(b.scale[r]), "a gradient");
    }
    const double rows = static_cast<double>(std::max<int64_t>(1, p.rows()));
    for (size_t i = 0; i < a.sums.size(); ++i) near(a.sums[i] / rows, b.sums[i] / rows, "a sum");
  }
}

template <class T>
void check_case(Random& random, const std::vector<std::string>& instructions, bool at_once) {
  const Problem<T> p = make_problem<T>(random);
  std::vector<Result<T>> each;
  for (const std::string& name : instructions) {
    uncork_select(name.c_str());
    each.push_back(run(p, 1, random));
    const Result<T>& first = each.back();
    check_written(p, first);
    if (p.kind != Kind::kWild) check_finite(p, first), check_totals(p, first), check_agreement(p, first, each[0]);
    for (const int32_t threads : {2, 3}) {
      random.below(2);  // another alignment
      if (const char* name = run(p, threads, random).differs(first))
        fail(p, std::string(name) + " depends on the threads or the alignment");
    }
  }
  if (!at_once) return;
  Result<T> results[2];
  const auto work = [&](int i) { results[i] = run(p, 2, random); };
  std::thread other(work, 1);
  work(0);
  other.join();
  for (const auto& result : results)
    if (const char* name = result.differs(each.back()))
      fail(p, std::string(name) + " depends on another call at the same time");
}

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "fuzz: %s\n", what);
  std::exit(1);
}

// Arguments that have no kernel are refused, with nothing read or written.
void check_refusals() {
  const float table[3] = {1, 1, 1};
  std::vector<UncorkOperation> operations(100, UncorkOperation{UNCORK_AFFINE, 0, 0, {table, nullptr, nullptr}, nullptr});
  UncorkTile tile{};
  tile.tokens = tile.components = tile.vocab = tile.stride = tile.threads = 1;
  float score = 1;
  tile.scores = &score, tile.operations = operations.data();
  if (uncork_run(&tile, 3) != 2 || uncork_run(&tile, -1) != 2) fail("a mode that does not exist was not refused");
  tile.num_operations = 100;
  if (uncork_run(&tile, UNCORK_STATISTICS) != 2) fail("a chain of 100 operations was not refused");
  tile.num_operations = 1;
  operations[0].kind = 6;
  if (uncork_run(&tile, UNCORK_STATISTICS) != 2) fail("an operation that does not exist was not refused");
  operations[0] = {UNCORK_UNIFORM, 0, 1, {table, table, table}, nullptr};
  if (uncork_run(&tile, UNCORK_STATISTICS) != 2) fail("no pieces were not refused");
  tile.num_operations = 0, tile.threads = 2;
  if (uncork_run(&tile, UNCORK_STATISTICS) != 2) fail("threads from nowhere were not refused");
}

// Wherever an allocation fails, the call ends with 1.
void check_memory() {
  constexpr int64_t kTokens = 64, kVocab = 100;
  const float table[2] = {1, 0};
  double sums[2] = {};
  std::vector<float> scores(kTokens * kVocab), ones(kTokens, 1), scale(kTokens);
  std::vector<int64_t> index(kTokens);
  const UncorkOperation operation{UNCORK_AFFINE, 0, 0, {table, nullptr, nullptr}, sums};
  UncorkTile tile{};
  tile.tokens = kTokens, tile.vocab = tile.stride = kVocab, tile.components = tile.num_operations = 1;
  tile.scores = scores.data(), tile.operations = &operation, tile.index = index.data(), tile.hit = ones.data();
  tile.grad_cross_entropy = ones.data(), tile.scale = scale.data(), tile.parallel = in_threads;
  for (tile.threads = 1; tile.threads <= 3; ++tile.threads) {
    int failures = 0, code = 1;
    for (; code; ++failures) {
      allocations_left = failures;
      code = uncork_run(&tile, UNCORK_GRADIENT);
      if (code != 1 && allocations_left < 0) fail("a failed allocation went unsaid");
    }
    if (failures < 3) fail("no allocation failed: see aligned_alloc above");
  }
  allocations_left = -1;
}

void check_exp() {
  std::vector<float> x;
  for (const double special :
       {kNaN, kInfinity, -kInfinity, 0.0, -0.0, 1e-45, 88.72, 88.73, -87.34, -103.9, -104.1, 3e38, -3e38})
    x.push_back(static_cast<float>(special));
  for (double z = -110; z < 95; z += 0.0137) x.push_back(static_cast<float>(z));
  Random random(1);
  for (const size_t n : {size_t(0), size_t(1), size_t(13), x.size()}) {
    const Exact<float> from(random, {x.begin(), x.begin() + static_cast<int64_t>(n)}), to(random, std::vector<float>(n));
    uncork_exp(from.get(), to.get(), static_cast<int64_t>(n));
    const std::vector<float> y = to.read();
    for (size_t i = 0; i < n; ++i) {
      const double truth = std::exp(static_cast<double>(x[i])), error = std::abs(static_cast<double>(y[i]) - truth);
      const double largest = std::numeric_limits<float>::max(), least = std::numeric_limits<float>::denorm_min();
      const bool good = std::isnan(truth) ? std::isnan(y[i])
                        : truth > largest ? std::isinf(y[i])
                                          : error <= 1e-6 * truth + least;
      if (good) continue;
      std::fprintf(stderr, "exp(%.9g) is %.9g with %s\n", static_cast<double>(x[i]), static_cast<double>(y[i]),
                   uncork_instructions());
      fail("exp is wrong");
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  const uint64_t first = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 0;
  const uint64_t count = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 600;
  std::vector<std::string> instructions;
  for (const char* name : {"base", "avx2", "avx512"})
    if (uncork_select(name) == 0) instructions.push_back(name), check_exp();
  check_refusals();
  check_memory();
  for (current_case = first; current_case < first + count; ++current_case) {
    Random random(current_case);
    const bool at_once = random.chance(0.25);
    if (random.chance(0.5))
      check_case<double>(random, instructions, at_once);
    else
      check_case<float>(random, instructions, at_once);
  }
  std::printf("fuzz: %llu cases with each of %zu instruction sets\n", static_cast<unsigned long long>(count),
              instructions.size());
}
