// What the machine itself can do, for benchmarks to measure the kernels against:
// the same pages read and nothing computed, the same multiplications and nothing
// read. On the threads of the pool, as attend().
#pragma once

#include <cstddef>
#include <cstdint>

namespace paged_mlx::cpu {

// Reads the named pages of K and V whole, the K page and then the V page, and
// prefetches the next ones meanwhile. Returns a sum, so that nothing is left out.
float read_pages(
    const void* k_pages,
    const void* v_pages,
    size_t k_page_bytes,
    size_t v_page_bytes,
    const int32_t* page_ids,
    int count);

// Does this many floating-point operations, an addition and a multiplication each
// counted, at the best rate of the instruction set in use; `dot_products`: of pairs
// of bfloat16, where it has them. Returns a sum.
float spend_flops(double flops, bool dot_products);

} // namespace paged_mlx::cpu
