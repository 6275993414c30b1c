"""Which functions of the package a call enters."""

import os
import sys

import paged_mlx


def calls(run):
    """Functions of the package that a call enters, as (file, function)."""
    root, entered = os.path.dirname(paged_mlx.__file__), []

    def profile(frame, event, argument):
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(root):
            entered.append((os.path.relpath(code.co_filename, root), code.co_name))

    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(None)
    return entered
