// A small pool of threads for one job at a time.
//
// The caller works too. Threads start when first needed, spin a little between
// jobs and then sleep; one that is still waking up when a job is done is not
// waited for. A job that comes while another caller's job runs is run by its
// caller alone. The pool is never destroyed: joining threads in a static
// destructor can deadlock. A forked child starts with a fresh pool.
#pragma once

namespace paged_mlx::cpu {

// One job: work(context, i) for every i in [0, count), each once, in any order,
// on at most `threads` threads. Returns when all are done. `work` must not throw.
void run_parallel(int count, int threads, void (*work)(void* context, int i), void* context);

// Threads of the pool, the caller included.
void set_pool_size(int n);
int pool_size();

} // namespace paged_mlx::cpu
