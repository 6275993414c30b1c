"""How does attention of one layer grow with the context, the batch, a common prefix and the page size?

What `paged-mlx bench --html` measures, by the CPU time of one thread.
"""

import time
from dataclasses import replace

from paged_mlx.machine.bench.bandwidth import read_bandwidth
from paged_mlx.machine.bench.kernels import cases
from paged_mlx.machine.bench.results import record, to_markdown
from paged_mlx.machine.bench.trials import sweep
from paged_mlx.machine.bench.workload import Geometry
from paged_mlx.machine.routes import kernel_routes, since
from paged_mlx.machine.threads import set_num_threads

from benchmarks.harness import environment, measure, save


def main():
    about = {"question": "curves", **environment(), "measured": "kernels"}
    set_num_threads(1)
    about["read_bandwidth"] = read_bandwidth(time.process_time)
    before = kernel_routes()
    trials = dict.fromkeys(sweep(128, 1, (8, 16, 32, 64, 128, 256)))
    measured = (replace(case, clock="cpu") for case in cases(iter(trials), Geometry(), 9))
    results = [measure(case) for case in measured]
    found = record(about, results, {"kernels": since(before)})
    print(to_markdown(found))
    save(found)


if __name__ == "__main__":
    main()
