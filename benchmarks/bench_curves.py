"""How does attention of one layer grow with the context, the batch, a common prefix and the page size?

What `paged-mlx bench --html` measures, as a record.
"""

from paged_mlx.machine.bench.bandwidth import read_bandwidth
from paged_mlx.machine.bench.kernels import cases
from paged_mlx.machine.bench.results import record, to_markdown
from paged_mlx.machine.bench.trials import sweep
from paged_mlx.machine.bench.workload import Geometry
from paged_mlx.machine.routes import kernel_routes, since

from benchmarks.harness import environment, measure, save


def main():
    about = {"question": "curves", **environment(), "measured": "kernels"}
    about["read_bandwidth"] = read_bandwidth()
    before = kernel_routes()
    trials = dict.fromkeys(sweep(128, 1, (8, 16, 32, 64, 128, 256)))
    results = [measure(case) for case in cases(iter(trials), Geometry(), 9)]
    found = record(about, results, {"kernels": since(before)})
    print(to_markdown(found))
    save(found)


if __name__ == "__main__":
    main()
