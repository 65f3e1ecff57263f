// Threads of torch's own OpenMP runtime, whatever its name and whichever compiler built the tile. Each call brings the
// runtime's entry point, and none is linked: a second runtime in the process would compete with torch's for the cores.
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
