"""Runs tests/mlx_lm/test_mlx_vlm.py beside mlx-vlm, and what of its needs the test imports.

python tests/support/mlx_vlm_tests.py [PYTEST OPTIONS]
"""

import sys

import overlay

PACKAGES = (
    "mlx-vlm==0.7.10",
    *("Pillow", "certifi", "charset-normalizer", "fastapi", "requests", "starlette"),
    *("urllib3", "uvicorn"),
)

if __name__ == "__main__":
    variables = overlay.environment("mlx-vlm", *PACKAGES)
    sys.exit(overlay.pytest(variables, "tests/mlx_lm/test_mlx_vlm.py", *sys.argv[1:]))
