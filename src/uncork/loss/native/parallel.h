// Threads from torch's own OpenMP, whatever the compiler: GCC's runtime is called by name, since `#pragma omp parallel` of
// another compiler would bring that compiler's runtime along, and the two would fight for the cores.
#pragma once

#include <cstdint>

extern "C" void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned flags);

namespace {

// Calls the body once in each of `threads` threads.
template <class Body>
void in_parallel(int32_t threads, const Body& body) {
  GOMP_parallel([](void* data) { (*static_cast<const Body*>(data))(); }, const_cast<Body*>(&body),
                static_cast<unsigned>(threads), 0);
}

}  // namespace
