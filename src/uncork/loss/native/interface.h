// The interface between Python and the tile: plain C structs, mirrored field by field in tile_native.py.
//
// Legend: N tokens of a chunk, K components, V words, P pieces. A token has K consecutive rows of V scores. T is float or
// double, as `is_double` says; every array of numbers is of T unless it says otherwise, contiguous but for the scores.
#pragma once

#include <cstdint>

// Raised whenever a struct or the meaning of a field changes.
#define UNCORK_VERSION 2

extern "C" {

enum UncorkKind : int32_t {
  UNCORK_AFFINE = 0,    // y = a x + b                               tables[0] = (a, b)
  UNCORK_TANH = 1,      // y = c tanh(x / c), c by the sign of x     tables[0] = (lower, upper)
  UNCORK_SIGMOID = 2,   // y = a sigmoid((x + b) / c)                tables[0] = (a, b, c)
  UNCORK_SOFTPLUS = 3,  // y = x + w log sigmoid(x - c)              tables[0] = (c, w)
  UNCORK_UNIFORM = 4,   // y = x + values[i] + slopes[i] (x - knots[i]), P equal pieces over [-bound, bound]
  UNCORK_SORTED = 5,    // the same, pieces found among sorted knots; tables = knots, values, slopes, (P,) each
};

struct UncorkOperation {
  int32_t kind;
  int32_t num_pieces;     // P of a piecewise linear operation, 0 of any other
  double bound;           // of UNCORK_UNIFORM
  const void* tables[3];  // as above, unused ones null
  double* sums;           // the gradients to its tables are added here; null if not needed. By kind 2, 2, 3, 2
                          // numbers, or P for the values, then P for the slopes
};

struct UncorkTile {
  int64_t tokens, components, vocab;
  int64_t stride;   // numbers from one row of scores to the next, at least vocab
  void* scores;     // (N K, V) before the bias
  const void* bias;  // (V,) or null
  const UncorkOperation* operations;
  int32_t num_operations;
  int32_t is_double;
  int32_t threads;
  // GOMP_parallel of the OpenMP runtime to take threads from (GCC's, LLVM's and Intel's have it); null with one thread.
  void (*parallel)(void (*body)(void*), void* data, unsigned threads, unsigned flags);

  // The target: t_v = hit [v = index] + uniform weight_v of an index, ((1 - uniform V) q_v + uniform) weight_v of given q.
  const int64_t* index;       // (N,) or null
  const uint8_t* kept;        // (N,), 0 for an ignored token, whose cross-entropy is 0; null if none is
  const void* hit;            // (N,), with an index
  const void* probabilities;  // (N, V) or null
  const void* word_weight;    // (V,) or null for ones
  double uniform;             // smoothing / V
  const void* log_prior;      // (N, K), of a mixture, or null: K is 1 then

  // Upstream gradients, (N,) each or null for 0: of the cross-entropy, logsumexp, its square, and the entropy.
  const void* grad_cross_entropy;
  const void* grad_lse;
  const void* grad_square;
  const void* grad_entropy;

  // Results, null where not asked. Entropy and argmax are written by statistics, and asked for together.
  void* cross_entropy;  // (N,)
  void* lse;            // (N,), a mixture's is 0
  void* entropy;        // (N,)
  int64_t* argmax;      // (N,), of the scores, of a mixture its log-probabilities
  void* scale;          // (N K,): the gradient to row r of the scores is scale[r] times what the tile wrote there
  void* grad_prior;     // (N, K): the gradient to the prior's logits
};

// What a call computes. Statistics leave the scores as they are, gradients overwrite them, log-probabilities overwrite
// the first row of each token.
enum UncorkMode : int32_t { UNCORK_STATISTICS = 0, UNCORK_GRADIENT = 1, UNCORK_LOG_PROB = 2 };

// Returns 0 for success, 1 if memory ran out, 2 for arguments without a kernel or several threads without `parallel`.
int32_t uncork_run(const UncorkTile* tile, int32_t mode);

// The instruction set that uncork_run uses: "avx512", "avx2" or "base". uncork_select forces one, for tests; 0 if this
// CPU has it, 1 if not.
const char* uncork_instructions(void);
int32_t uncork_select(const char* name);

int32_t uncork_version(void);

// Asks the system for large pages under a block that is about to be written for the first time: a hint, no more.
void uncork_large_pages(void* block, int64_t bytes);

// exp of n floats, for tests of its accuracy.
void uncork_exp(const float* x, float* y, int64_t n);
}
