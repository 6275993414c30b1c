// The swizzle fields of a vector: METAL_HOST_SWIZZLES(N) writes
// METAL_HOST_SWIZZLE(name, i, j, ...) for every choice of 2, 3 and 4 of N components.
#pragma once

// Each level appends one component; a macro cannot call itself, hence A, B, C.
#define METAL_HOST_ADD_A2(F, n, ...) F(n##x, __VA_ARGS__, 0) F(n##y, __VA_ARGS__, 1)
#define METAL_HOST_ADD_B2(F, n, ...) F(n##x, __VA_ARGS__, 0) F(n##y, __VA_ARGS__, 1)
#define METAL_HOST_ADD_C2(F, n, ...) F(n##x, __VA_ARGS__, 0) F(n##y, __VA_ARGS__, 1)
#define METAL_HOST_ADD_A3(F, n, ...) METAL_HOST_ADD_A2(F, n, __VA_ARGS__) F(n##z, __VA_ARGS__, 2)
#define METAL_HOST_ADD_B3(F, n, ...) METAL_HOST_ADD_B2(F, n, __VA_ARGS__) F(n##z, __VA_ARGS__, 2)
#define METAL_HOST_ADD_C3(F, n, ...) METAL_HOST_ADD_C2(F, n, __VA_ARGS__) F(n##z, __VA_ARGS__, 2)
#define METAL_HOST_ADD_A4(F, n, ...) METAL_HOST_ADD_A3(F, n, __VA_ARGS__) F(n##w, __VA_ARGS__, 3)
#define METAL_HOST_ADD_B4(F, n, ...) METAL_HOST_ADD_B3(F, n, __VA_ARGS__) F(n##w, __VA_ARGS__, 3)
#define METAL_HOST_ADD_C4(F, n, ...) METAL_HOST_ADD_C3(F, n, __VA_ARGS__) F(n##w, __VA_ARGS__, 3)

#define METAL_HOST_PAIRS_2(F) METAL_HOST_ADD_A2(F, x, 0) METAL_HOST_ADD_A2(F, y, 1)
#define METAL_HOST_PAIRS_3(F) METAL_HOST_ADD_A3(F, x, 0) METAL_HOST_ADD_A3(F, y, 1) METAL_HOST_ADD_A3(F, z, 2)
#define METAL_HOST_PAIRS_4(F) \
  METAL_HOST_ADD_A4(F, x, 0) METAL_HOST_ADD_A4(F, y, 1) METAL_HOST_ADD_A4(F, z, 2) METAL_HOST_ADD_A4(F, w, 3)

// From a pair to its triples, and from a triple to its quadruples.
#define METAL_HOST_TRIPLES_OF_2(n, i, j) METAL_HOST_ADD_B2(METAL_HOST_SWIZZLE, n, i, j)
#define METAL_HOST_TRIPLES_OF_3(n, i, j) METAL_HOST_ADD_B3(METAL_HOST_SWIZZLE, n, i, j)
#define METAL_HOST_TRIPLES_OF_4(n, i, j) METAL_HOST_ADD_B4(METAL_HOST_SWIZZLE, n, i, j)
#define METAL_HOST_FOURS_OF_2(n, i, j, k) METAL_HOST_ADD_C2(METAL_HOST_SWIZZLE, n, i, j, k)
#define METAL_HOST_FOURS_OF_3(n, i, j, k) METAL_HOST_ADD_C3(METAL_HOST_SWIZZLE, n, i, j, k)
#define METAL_HOST_FOURS_OF_4(n, i, j, k) METAL_HOST_ADD_C4(METAL_HOST_SWIZZLE, n, i, j, k)
#define METAL_HOST_FOURS_FROM_2(n, i, j) METAL_HOST_ADD_B2(METAL_HOST_FOURS_OF_2, n, i, j)
#define METAL_HOST_FOURS_FROM_3(n, i, j) METAL_HOST_ADD_B3(METAL_HOST_FOURS_OF_3, n, i, j)
#define METAL_HOST_FOURS_FROM_4(n, i, j) METAL_HOST_ADD_B4(METAL_HOST_FOURS_OF_4, n, i, j)

#define METAL_HOST_SWIZZLES(N)                        \
  METAL_HOST_PAIRS_##N(METAL_HOST_SWIZZLE)            \
  METAL_HOST_PAIRS_##N(METAL_HOST_TRIPLES_OF_##N)     \
  METAL_HOST_PAIRS_##N(METAL_HOST_FOURS_FROM_##N)
