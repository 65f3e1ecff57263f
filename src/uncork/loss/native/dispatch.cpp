// The C interface, and the choice of the instruction set at run time.
#include <sys/mman.h>

#include <cstdint>
#include <cstring>

#include "interface.h"

#define UNCORK_EXPORT extern "C" __attribute__((visibility("default")))

using Run = int32_t (*)(const UncorkTile*, int32_t);
using Exp = void (*)(const float*, float*, int64_t);

struct Instructions {
  const char* name;
  Run run;
  Exp exp;
};

#define UNCORK_DECLARE(isa)                                 \
  int32_t uncork_rows_##isa(const UncorkTile*, int32_t);    \
  void uncork_exp_##isa(const float*, float*, int64_t);
UNCORK_DECLARE(base)
#ifdef UNCORK_HAS_AVX2
UNCORK_DECLARE(avx2)
#endif
#ifdef UNCORK_HAS_AVX512
UNCORK_DECLARE(avx512)
#endif

// Best first. No code of an instruction set that the CPU lacks is ever run.
static const Instructions* find(const char* name) {
  static const Instructions known[] = {
#ifdef UNCORK_HAS_AVX512
      {"avx512", uncork_rows_avx512, uncork_exp_avx512},
#endif
#ifdef UNCORK_HAS_AVX2
      {"avx2", uncork_rows_avx2, uncork_exp_avx2},
#endif
      {"base", uncork_rows_base, uncork_exp_base},
  };
  for (const Instructions& each : known) {
    if (name && std::strcmp(name, each.name) != 0) continue;
#ifdef UNCORK_HAS_AVX512
    if (std::strcmp(each.name, "avx512") == 0 &&
        !(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
          __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("fma")))
      continue;
#endif
#ifdef UNCORK_HAS_AVX2
    if (std::strcmp(each.name, "avx2") == 0 && !(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))) continue;
#endif
    return &each;
  }
  return nullptr;
}

static const Instructions*& chosen() {
  static const Instructions* best = find(nullptr);
  return best;
}

static bool served(const UncorkTile& tile, int32_t mode) {
  if (mode < UNCORK_STATISTICS || mode > UNCORK_LOG_PROB || tile.num_operations > 16) return false;
  if (tile.threads < 1 || (tile.threads > 1 && !tile.parallel)) return false;
  for (int32_t i = 0; i < tile.num_operations; ++i) {
    const UncorkOperation& operation = tile.operations[i];
    if (operation.kind < UNCORK_AFFINE || operation.kind > UNCORK_SORTED) return false;
    if (operation.kind >= UNCORK_UNIFORM && operation.num_pieces < 1) return false;
  }
  return true;
}

UNCORK_EXPORT int32_t uncork_run(const UncorkTile* tile, int32_t mode) {
  if (!served(*tile, mode)) return 2;
  return tile->tokens > 0 ? chosen()->run(tile, mode) : 0;
}

UNCORK_EXPORT const char* uncork_instructions(void) { return chosen()->name; }

UNCORK_EXPORT int32_t uncork_select(const char* name) {
  const Instructions* found = find(name);
  if (found) chosen() = found;
  return found ? 0 : 1;
}

UNCORK_EXPORT void uncork_exp(const float* x, float* y, int64_t n) { chosen()->exp(x, y, n); }

UNCORK_EXPORT int32_t uncork_version(void) { return UNCORK_VERSION; }

UNCORK_EXPORT void uncork_large_pages(void* block, int64_t bytes) {
  constexpr uintptr_t page = 1 << 21;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(block) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(block) + static_cast<uintptr_t>(bytes)) / page * page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
}
