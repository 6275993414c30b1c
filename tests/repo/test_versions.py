"""One clear sentence when the installed mlx is not the one the native module was built for."""

import mlx.core as mx
import pytest
from paged_mlx import _native


def test_the_installed_mlx_fits():
    _native.check_versions(mx.__version__)
    _native.check_versions(mx.__version__ + ".dev20260101+abc")


def test_another_mlx_is_refused_in_one_sentence():
    built = _native._ext.mlx_build_version
    with pytest.raises(ImportError) as error:
        _native.check_versions("0.31.0")
    assert str(error.value) == (
        f"paged_mlx was built for mlx {built}, but mlx 0.31.0 is installed: "
        f"run `pip install mlx=={built}`, or rebuild paged_mlx."
    )


def test_a_module_that_does_not_load_is_explained(monkeypatch):
    cause = ImportError("undefined symbol: _ZN3mlx4core5array8set_dataE")
    monkeypatch.setattr(_native, "_ext", None)
    monkeypatch.setattr(_native, "_load_error", cause, raising=False)
    with pytest.raises(ImportError, match="does not load with mlx .*undefined symbol") as error:
        _native.check_versions("0.32.3")
    assert error.value.__cause__ is cause
