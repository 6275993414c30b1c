"""Shows that the package installs and imports beside others that run models with MLX.

python tests/support/beside.py [PACKAGE ...]

pip resolves each together with this package, as if nothing were installed, and so says which mlx
both get. Then both are imported beside that mlx. Of what a package needs, only MLX and mlx-lm are
installed for that (for mlx-vlm, what its import takes): servers and torch are resolved, not run.
"""

import json
import os
import subprocess
import sys
from importlib import metadata

import mlx_versions
import overlay
from mlx_vlm_tests import PACKAGES

# Each package's module, and what its import takes beside mlx-lm.
PEERS = {
    "mlx-lm": ("mlx_lm", ()),
    "mlx-vlm": ("mlx_vlm", PACKAGES[1:]),
    "vllm-mlx": ("vllm_mlx", ()),
    "rapid-mlx": ("rapid_mlx", ()),
}
IMPORT = (
    "import mlx.core, paged_mlx, {module}; "
    "print('  imported beside mlx', mlx.core.__version__ + ',', paged_mlx.backend())"
)


def wheel() -> str:
    """This package without a native module: what pip resolves."""
    folder = overlay.BUILD / "wheel"
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    variables = os.environ | {"PAGED_MLX_FOR": "none"}
    subprocess.run([*pip, "--wheel-dir", folder, "."], env=variables, cwd=overlay.ROOT, check=True)
    (made,) = folder.glob("paged_mlx-*-py3-none-any.whl")
    return str(made)


def resolved(package: str, paged_mlx: str) -> dict[str, str]:
    """Name and version of all that pip would install for both."""
    mlx = "mlx" if sys.platform == "darwin" else "mlx[cpu]"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    run = subprocess.run(
        [*pip, "--dry-run", "--ignore-installed", "--report", "-", package, paged_mlx, mlx],
        check=True, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    found = [entry["metadata"] for entry in json.loads(run.stdout)["install"]]
    return {entry["name"].lower().replace("_", "-"): entry["version"] for entry in found}


def environment(package: str, found: dict[str, str]) -> dict[str, str]:
    """Environment variables under which the package and its mlx are imported."""
    pins = [f"{name}=={found[name]}" for name in {package, "mlx-lm"} & set(found)]
    variables = overlay.environment(f"beside-{package}", *sorted(pins), *PEERS[package][1])
    if found["mlx"] != metadata.version("mlx"):
        other = mlx_versions.environment(found["mlx"])
        path = variables["PYTHONPATH"] + os.pathsep + other["PYTHONPATH"]
        variables = other | {"PYTHONPATH": path}
    return variables


def main() -> int:
    made = wheel()
    for package in sys.argv[1:] or PEERS:
        found = resolved(package, made)
        names = " ".join(f"{n} {found[n]}" for n in (package, "mlx", "mlx-lm") if n in found)
        print(f"{package}: {len(found)} packages resolve: {names}", flush=True)
        code = IMPORT.format(module=PEERS[package][0])
        subprocess.run([sys.executable, "-c", code], env=environment(package, found), check=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
