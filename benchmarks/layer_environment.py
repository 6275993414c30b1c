"""Make a virtual environment that has what this one has, and room for more: `... PATH`."""

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

path = Path(sys.argv[1])
venv.create(path, clear=True, with_pip=True)
words = [path / "bin" / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
packages = Path(subprocess.check_output(words, text=True).strip())
below = sysconfig.get_path("purelib")
(packages / "layer_below.pth").write_text(f"import site; site.addsitedir({below!r})\n")
