"""Build the extension with sanitizers and run suites on it: `sanitize.py [address,undefined] [thread]`.

AddressSanitizer and UndefinedBehaviorSanitizer watch the conformance suite, the fuzzer and
the tests of planner and operations; ThreadSanitizer watches the thread pool of the CPU
backend with the invariance group.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build"

SUITES = {
    "address,undefined": [
        ["-m", "paged_mlx.testing", "--run", "small", "--backend", "cpu"],
        ["-m", "bad_input", "20000"],
        [
            "-m",
            "pytest",
            "-p",
            "no:cacheprovider",
            "tests/conformance/test_fast.py",
            "tests/plan/test_plan.py",
        ],
        [
            "-m",
            "pytest",
            "-p",
            "no:cacheprovider",
            "tests/pool/test_pool.py",
            "tests/conformance/test_chapter.py",
        ],
        ["-m", "pytest", "-p", "no:cacheprovider", "tests/mlx_lm/test_handles_random.py"],
        # Kernels on the host run as fibers, which the sanitizers do not follow.
        [
            "-m",
            "pytest",
            "-p",
            "no:cacheprovider",
            "tests/pool/test_write_attend.py",
            "-k",
            "not launch and not kernel",
        ],
    ],
    "thread": [
        ["-m", "paged_mlx.testing", "--run", "small", "--backend", "cpu", "--group", "invariance"],
        ["-m", "paged_mlx.testing", "--run", "small", "--backend", "cpu", "--group", "grid"],
    ],
}
RUNTIMES = {"address,undefined": "libasan.so", "thread": "libtsan.so"}
OPTIONS = {
    # Python leaks on exit by design; fibers and MLX's scheduler threads are not ours.
    "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1",
    "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    "TSAN_OPTIONS": f"halt_on_error=1:suppressions={ROOT}/tests/support/tsan.supp",
}
# An editable install finds its package before the path is looked at.
FORGET_INSTALLED = """
import sys
sys.meta_path[:] = [f for f in sys.meta_path if not hasattr(f, "known_source_files")]
"""


def build(sanitizers: str) -> Path:
    """The package with a sanitized extension; returns the folder to put on the path."""
    folder = BUILD / sanitizers.replace(",", "-")
    flags = f"-fsanitize={sanitizers} -fno-sanitize-recover=all -fno-omit-frame-pointer -g -O1"
    configure = [
        "cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(folder / "cmake"),
        f"-DPython_EXECUTABLE={sys.executable}", "-DCMAKE_BUILD_TYPE=RelWithDebInfo",
        f"-DCMAKE_CXX_FLAGS={flags}", "-DPAGED_MLX_STUB=OFF",
    ]  # fmt: skip
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    subprocess.run(configure, check=True, env=environment)
    subprocess.run(["cmake", "--build", str(folder / "cmake")], check=True, env=environment)
    package = folder / "python" / "paged_mlx"
    package.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(package, ignore_errors=True)
    shutil.copytree(ROOT / "python" / "paged_mlx", package)
    shutil.copytree(folder / "cmake" / "native", package / "native")
    (package.parent / "sitecustomize.py").write_text(FORGET_INSTALLED)
    return package.parent


def runtime(sanitizers: str) -> str:
    """Libraries to load first: the sanitizer's, and that of the exceptions it intercepts."""
    found = []
    for library in (RUNTIMES[sanitizers], "libstdc++.so.6"):
        words = ["g++", f"-print-file-name={library}"]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        found.append(done.stdout.strip())
    return " ".join(found)


def check_loaded(path: Path, environment: dict) -> None:
    """The suites will run on the extension that was built for them."""
    words = [sys.executable, "-c", "from paged_mlx._native import _ext; print(_ext.__file__)"]
    done = subprocess.run(
        words, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    if not done.stdout.startswith(str(path)):
        sys.exit(f"sanitize: expected an extension in {path}, got {done.stdout.strip()}")


def main() -> None:
    failed = []
    for sanitizers in sys.argv[1:] or SUITES:
        suites = SUITES[sanitizers]
        path = build(sanitizers)
        environment = os.environ | OPTIONS
        environment |= {
            "PYTHONPATH": f"{path}:{ROOT}/tests/support",
            "LD_PRELOAD": runtime(sanitizers),
        }
        check_loaded(path, environment)
        for suite in suites:
            print(f"== {sanitizers}: {' '.join(suite)}", flush=True)
            done = subprocess.run([sys.executable, *suite], cwd=ROOT, env=environment)
            if done.returncode:
                failed.append((sanitizers, suite))
    for sanitizers, suite in failed:
        print(f"failed under {sanitizers}: {' '.join(suite)}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
