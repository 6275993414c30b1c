"""What is made in a folder of its own, and what a killed process leaves of it."""

import os
import signal
import subprocess
import sys
import time

from paged_mlx.machine import cache

WORK = """
import sys, time
from pathlib import Path
from paged_mlx.machine.cache import scratch_folder
with scratch_folder(Path(sys.argv[1]), ".making-") as folder:
    (folder / "half").write_text("of it")
    print(folder, flush=True)
    time.sleep(60)
"""


def worker(parent):
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", WORK, parent], stdout=subprocess.PIPE, text=True
    )
    return process, process.stdout.readline().strip()


def test_what_a_killed_process_left_goes_and_what_is_being_made_stays(tmp_path):
    going, its_folder = worker(tmp_path)
    killed, left = worker(tmp_path)
    try:
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        assert os.path.isdir(left)
        with cache.scratch_folder(tmp_path, ".making-") as mine:
            assert sorted(map(str, tmp_path.iterdir())) == sorted([its_folder, str(mine)])
        assert list(map(str, tmp_path.iterdir())) == [its_folder]
    finally:
        going.kill()
        going.wait()
    cache.sweep(tmp_path, ".making-")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_nobody_has_locked_is_given_a_minute(tmp_path):
    made = tmp_path / ".making-1"
    made.mkdir()
    cache.sweep(tmp_path, ".making-")
    assert made.is_dir()
    os.utime(made, (time.time() - 61,) * 2)
    cache.sweep(tmp_path, ".making-")
    assert not made.exists()


def test_an_error_leaves_nothing(tmp_path):
    try:
        with cache.scratch_folder(tmp_path / "new", ".making-") as folder:
            (folder / "half").write_text("of it")
            raise ValueError
    except ValueError:
        pass
    assert list((tmp_path / "new").iterdir()) == []
