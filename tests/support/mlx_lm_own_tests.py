"""Runs mlx-lm's own tests of generation, prompt caches and the server, on its caches and on pages.

    python tests/support/mlx_lm_own_tests.py [VERSION]

The tests come out of mlx-lm's source distribution on the package index, checked against its
SHA-256. Every test must end on pages as it ends on stock caches. The models that they would fetch
from a hub have a stand-in, the same in both runs: ``mlx_lm_own_plugin.py``.
"""

import hashlib
import importlib.metadata
import json
import pathlib
import subprocess
import sys
import tarfile
from collections import Counter

import overlay

SHA256 = {
    "0.31.3": "61eb0e3ba09444f77f874aff295401d7ccd20b39495cbbce0c782a15474ce733",
    "0.32.0": "035ca44b08c3476630a205d2c9bdea26825a6a8359f974944d4985230e41859f",
    "0.32.2": "1af8a92f6a141c3e2bf5b0369ac4464203a8e2189c47b9e40d3e921e5b3a1fe9",
}
FILES = ("test_generate.py", "test_prompt_cache.py", "test_server.py")
ALSO = ("requests", "urllib3", "certifi", "charset-normalizer", "idna")  # which they import


def source(version: str) -> pathlib.Path:
    """The unpacked source distribution, fetched and checked at the first call."""
    folder = overlay.BUILD / f"mlx-lm-{version}-source"
    unpacked = folder / f"mlx_lm-{version}"
    if unpacked.is_dir():
        return unpacked
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    pip += ["--no-deps", "--no-binary", "mlx-lm", "--dest", folder, f"mlx-lm=={version}"]
    subprocess.run(pip, check=True)
    archive = folder / f"mlx_lm-{version}.tar.gz"
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != SHA256[version]:
        raise SystemExit(f"{archive.name} must have SHA-256 {SHA256[version]}; got {found}.")
    with tarfile.open(archive) as files:
        tests = [member for member in files if "/tests/" in member.name]
        files.extractall(folder, tests, filter="data")
    return unpacked


def run(version: str, caches: str) -> dict:
    """Outcomes of mlx-lm's tests, on "stock" caches or on "paged" ones."""
    report = overlay.BUILD / f"mlx-lm-{version}-{caches}.json"
    folder = source(version) / "tests"
    report.unlink(missing_ok=True)
    variables = overlay.environment(f"mlx-lm-{version}-tests", f"mlx-lm=={version}", *ALSO)
    variables |= {"PAGED_MLX_CACHES": caches, "PAGED_MLX_REPORT": str(report)}
    hub = overlay.BUILD / "empty-hub"
    hub.mkdir(exist_ok=True)
    variables |= {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(hub)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "mlx_lm_own_plugin", "--tb=line"]
    command += ["-c", "/dev/null", "--rootdir", folder, *(folder / file for file in FILES)]
    print(f"mlx-lm {version} on {caches} caches", flush=True)
    subprocess.run(command, env=variables, cwd=folder)
    return json.loads(report.read_text())


def main() -> int:
    version = sys.argv[1] if len(sys.argv) > 1 else importlib.metadata.version("mlx-lm")
    stock, paged = run(version, "stock"), run(version, "paged")
    names = sorted(stock["outcomes"].keys() | paged["outcomes"].keys())
    other = [name for name in names if stock["outcomes"].get(name) != paged["outcomes"].get(name)]
    for name in other:
        outcomes = [run["outcomes"].get(name, "not run") for run in (stock, paged)]
        print(f"{name}: {outcomes[0]} on stock caches, {outcomes[1]} on pages")
    for name in names:
        if stock["outcomes"].get(name) == "failed":
            print(f"{name}: failed on stock caches too")
    counts = Counter(paged["outcomes"].values())
    print(f"mlx-lm {version}: {len(names)} tests, {len(names) - len(other)} end alike, on pages")
    print(f"  {dict(counts)}; {paged['models']} models enabled, {paged['calls']} calls read pages")
    if not paged["calls"]:
        print("nothing was read from pages: the tests prove nothing")
    return int(bool(other) or not paged["calls"] or not names)


if __name__ == "__main__":
    sys.exit(main())
