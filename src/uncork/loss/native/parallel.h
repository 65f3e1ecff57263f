// Threads from torch's own OpenMP, whatever it is called and whichever compiler made the tile. Its entry for threads is
// handed over with each call, and nothing is linked: a second runtime in the process would fight torch's for the cores.
#pragma once

#include <cstdint>

#include "interface.h"

namespace {

// Calls the body once in each of the tile's threads; one thread needs no runtime.
template <class Body>
void in_parallel(const UncorkTile& tile, const Body& body) {
  if (tile.threads == 1) return body();
  tile.parallel([](void* data) { (*static_cast<const Body*>(data))(); }, const_cast<Body*>(&body),
                static_cast<unsigned>(tile.threads), 0);
}

}  // namespace
