"""pytest plugin: every plan is made for a GPU, as where the default device is one.

``python -m pytest -p gpu_plans``. Calls that name the CPU as their stream get its plans.
"""

from paged_mlx import device


def pytest_configure(config):
    device._HAS_GPU = True
    device._is_gpu = lambda stream: stream is None


def pytest_report_header(config):
    return "plans are made for a GPU"
