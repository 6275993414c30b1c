"""Runs this project's mlx-lm tests with each version of mlx-lm that is supported.

python tests/support/mlx_lm_versions.py [VERSION ...] [-- PYTEST OPTIONS]
"""

import subprocess
import sys

import overlay
from paged_mlx.mlx_lm.versions import TESTED

TESTS = sorted(
    str(path) for room in ("mlx_lm", "cli") for path in overlay.ROOT.glob(f"tests/{room}/test_*.py")
)


def environment(version: str) -> dict[str, str]:
    """Environment variables under which this mlx-lm is imported."""
    variables = overlay.environment(f"mlx-lm-{version}", f"mlx-lm=={version}")
    command = [sys.executable, "-c", "import mlx_lm; print(mlx_lm.__version__)"]
    run = subprocess.run(command, env=variables, check=True, capture_output=True, text=True)
    assert run.stdout.strip() == version, f"mlx-lm {run.stdout.strip()} is imported, not {version}"
    return variables


def main() -> int:
    arguments = sys.argv[1:]
    split = arguments.index("--") if "--" in arguments else len(arguments)
    codes = {}
    for version in arguments[:split] or TESTED:
        print(f"mlx-lm {version}", flush=True)
        codes[version] = overlay.pytest(environment(version), *TESTS, *arguments[split + 1 :])
    for version, code in codes.items():
        print(f"mlx-lm {version}: {'passed' if code == 0 else f'failed, exit status {code}'}")
    return max(codes.values())


if __name__ == "__main__":
    sys.exit(main())
