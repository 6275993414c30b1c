"""Install what pyproject.toml asks for at run time and for the tests, without building the project."""

import subprocess
import sys

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import pip._vendor.tomli as tomllib

with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]

wanted = project["dependencies"] + project["optional-dependencies"]["test"]
subprocess.run(
    [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *wanted],
    check=True,
)
