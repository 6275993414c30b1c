// The part of Metal's standard library that compute kernels use, on the host.
#pragma once
#include "metal_host/atomics.h"
#include "metal_host/math.h"
#include "metal_host/simdgroup.h"
#include "metal_host/simdgroup_matrix.h"
#include "metal_host/traits.h"
#include "metal_host/vectors.h"
#ifndef METAL_HOST_ADDRESS_SPACES
#include "metal_host/binding.h"
#endif
