"""Runs core tests with each release of mlx that there is a native module for.

python tests/support/mlx_versions.py [RELEASE ...] [-- PYTEST OPTIONS]

Each release lies in a folder of its own before the environment's packages, and ``python -m
paged_mlx build`` makes its native module there, anew when a source has changed. The first and the
last are run once more with no native module at all.
"""

import hashlib
import json
import subprocess
import sys

import overlay

RELEASES = json.loads((overlay.ROOT / "cmake/mlx_releases.json").read_text())
LIBRARY = "mlx-metal" if sys.platform == "darwin" else "mlx-cpu"
SOURCES = ("csrc", "kernels", "cmake", "CMakeLists.txt")
TESTS = (
    "tests/conformance/test_conformance.py",
    "tests/conformance/test_compiled_graphs.py",
    "tests/pool/test_pipelined_graph.py",
    "tests/pool/test_pool.py",
    "tests/pool/test_pool_memory.py",
    "tests/mlx_lm/test_enable.py",
    "tests/mlx_lm/test_parity.py",
    "tests/mlx_lm/test_batches.py",
)


def environment(release: str) -> dict[str, str]:
    """Environment variables under which this mlx is imported, and its native module with it."""
    packages = (f"mlx=={release}", f"{LIBRARY}=={release}")
    variables = overlay.environment(f"mlx-{release}", *packages)
    cache = overlay.BUILD / f"mlx-{release}-cache"  # a Mac's cache is the user's own
    variables |= {"XDG_CACHE_HOME": str(cache)}
    done, sources = cache / ".sources", _hash_of_sources()
    if not done.is_file() or done.read_text() != sources:
        build = [sys.executable, "-W", "ignore", "-m", "paged_mlx", "build", "--force"]
        subprocess.run(build, env=variables, check=True, stdout=subprocess.DEVNULL)
        done.parent.mkdir(parents=True, exist_ok=True)
        done.write_text(sources)
    told = "import mlx.core, paged_mlx; print(mlx.core.__version__, paged_mlx.backend())"
    run = subprocess.run(
        [sys.executable, "-c", told], env=variables, check=True, capture_output=True, text=True
    )
    assert run.stdout.startswith(f"{release} native module for mlx {release}: "), run.stdout
    print(run.stdout, end="", flush=True)
    return variables


def _hash_of_sources() -> str:
    files = [file for name in SOURCES for file in _files(overlay.ROOT / name)]
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(files))).hexdigest()


def _files(path):
    return [path] if path.is_file() else [p for p in path.rglob("*.*") if p.suffix != ".pyc"]


def main() -> int:
    arguments = sys.argv[1:]
    split = arguments.index("--") if "--" in arguments else len(arguments)
    options, codes = arguments[split + 1 :], {}
    releases = arguments[:split] or list(RELEASES)
    environments = {release: environment(release) for release in releases}
    for release in releases:
        print(f"mlx {release}", flush=True)
        codes[f"mlx {release}"] = overlay.pytest(environments[release], *TESTS, *options)
    for release in dict.fromkeys((releases[0], releases[-1])):
        name = f"mlx {release} without a native module"
        print(name, flush=True)
        plugin = ("-p", "without_native")
        codes[name] = overlay.pytest(environments[release], *plugin, *TESTS, *options)
    for name, code in codes.items():
        print(f"{name}: {'passed' if code == 0 else f'failed, exit status {code}'}")
    return max(codes.values())


if __name__ == "__main__":
    sys.exit(main())
