"""Tests plan with the thresholds of the table, whatever was measured on this machine."""

from paged_mlx._native import _ext

for kernels in (False, True):
    for itemsize in (2, 4):
        _ext.set_plan_thresholds(kernels, itemsize, None)
