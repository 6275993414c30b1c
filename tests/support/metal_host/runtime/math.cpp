// The transcendental functions of kernels, from the host's libm.
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "options.h"
#include "tables.h"

namespace {

// With options.ulp set, a reproducible pseudo-random step of up to that many
// units in the last place: a stand-in for Apple's faster functions.
float perturb(float result, float argument) {
  if (!options.ulp || !isfinite(result) || result == 0) return result;
  uint32_t hash;
  memcpy(&hash, &argument, 4);
  hash = (hash ^ 0x9e3779b9u) * 0x85ebca6bu;
  hash ^= hash >> 13;
  hash *= 0xc2b2ae35u;
  int32_t bits;
  memcpy(&bits, &result, 4);
  bits += (int32_t)((hash >> 8) % (2 * options.ulp + 1)) - (int32_t)options.ulp;
  memcpy(&result, &bits, 4);
  return result;
}

} // namespace

#define METAL_HOST_UNARY(name)                        \
  METAL_HOST_EXPORT float metal_host_##name(float x) { \
    return perturb(name##f(x), x);                    \
  }
METAL_HOST_UNARY(exp)
METAL_HOST_UNARY(exp2)
METAL_HOST_UNARY(log)
METAL_HOST_UNARY(log2)
METAL_HOST_UNARY(log10)
METAL_HOST_UNARY(sin)
METAL_HOST_UNARY(cos)
METAL_HOST_UNARY(tan)
METAL_HOST_UNARY(asin)
METAL_HOST_UNARY(acos)
METAL_HOST_UNARY(atan)
METAL_HOST_UNARY(sinh)
METAL_HOST_UNARY(cosh)
METAL_HOST_UNARY(tanh)

METAL_HOST_EXPORT float metal_host_exp10(float x) {
  return perturb((float)pow(10.0, x), x);
}
METAL_HOST_EXPORT float metal_host_pow(float x, float y) {
  return perturb(powf(x, y), x);
}
METAL_HOST_EXPORT float metal_host_atan2(float y, float x) {
  return perturb(atan2f(y, x), x);
}
METAL_HOST_EXPORT float metal_host_fmod(float x, float y) {
  return fmodf(x, y);
}
METAL_HOST_EXPORT float metal_host_ldexp(float x, int exponent) {
  return ldexpf(x, exponent);
}

// The compiler's own call for float to bfloat: round to nearest, ties to even.
METAL_HOST_EXPORT __bf16 __truncsfbf2(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  const bool is_nan = (bits & 0x7fffffff) > 0x7f800000;
  const uint32_t rounded = is_nan ? bits | 0x400000 : bits + 0x7fff + (bits >> 16 & 1);
  const uint16_t high = (uint16_t)(rounded >> 16);
  __bf16 out;
  memcpy(&out, &high, 2);
  return out;
}
