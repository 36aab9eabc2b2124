// What the functions of the library have in common; sparselearning/native/library.py calls them.
#pragma once

#include <cstdint>

#define EXPORT extern "C" __attribute__((visibility("default")))

// GOMP_parallel's signature: runs a function on so many threads. Given by the caller, so that the threads are those of
// torch's own pool: two OpenMP pools that spin on the same cores slow each other down.
using Fork = void (*)(void (*)(void*), void*, unsigned, unsigned);
