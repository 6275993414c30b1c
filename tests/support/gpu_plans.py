"""pytest plugin: every plan is made for a GPU, as where the default device is one.

``python -m pytest -p gpu_plans``. Calls that name the CPU as their stream get its plans.
"""

import mlx.core as mx
from paged_mlx import attention_plan


def pytest_configure(config):
    attention_plan._HAS_GPU = True
    attention_plan._device_of = lambda stream: mx.gpu if stream is None else mx.cpu


def pytest_report_header(config):
    return "plans are made for a GPU"
