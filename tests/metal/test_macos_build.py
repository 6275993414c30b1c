"""The host code of the Metal path, compiled for arm64 macOS against the exact mlx."""

import re
import sys

import pytest

if sys.platform == "darwin":
    pytest.skip("a Mac builds the real thing", allow_module_level=True)
pytest.importorskip("ziglang", reason="the macOS build needs the ziglang wheel")
pytest.importorskip("nanobind", reason="the macOS build needs nanobind")

from macos_build import compile as macos  # noqa: E402
from macos_build import symbols, wheels  # noqa: E402

# C++ names of mlx and of metal-cpp, which libmlx.dylib defines; not functions of ours that take them.
OF_MLX = re.compile(r"^__Z(?!.*9paged_mlx).*(3mlx4core|3MTL|4MTL4|2NS)")
# C names of the frameworks, by Apple's headers.
FRAMEWORKS = {
    "_CFGetTypeID", "_CFNumberGetTypeID", "_CFNumberGetValue", "_CFRelease",
    "_IOObjectRelease", "_IORegistryEntryCreateCFProperty", "_IOServiceGetMatchingService",
    "_IOServiceMatching", "_kCFAllocatorDefault", "___CFConstantStringClassReference",
    "_objc_msgSend", "_sel_registerName", "_objc_lookUpClass", "_objc_getProtocol",
}  # fmt: skip


@pytest.fixture(scope="module")
def libmlx():
    try:
        return symbols.read(wheels.mlx_for_macos() / "lib" / "libmlx.dylib").defined
    except wheels.NotAvailable as error:
        pytest.skip(f"no wheel of mlx for macOS: {error}")


def wanted_of_mlx(objects):
    read = [symbols.read(path) for path in objects]
    own = frozenset().union(*(s.defined for s in read))
    return {name for s in read for name in s.undefined - own if OF_MLX.search(name)}


def test_the_metal_launch_code_compiles_and_libmlx_has_what_it_imports(libmlx):
    objects = macos.objects(macos.sources("metal", "ops"))
    wanted = wanted_of_mlx(objects.values())
    assert any("CommandEncoder" in name for name in wanted), "the Metal path was not compiled"
    assert sorted(wanted - libmlx) == []


@pytest.mark.long
def test_the_whole_extension_compiles_and_finds_every_symbol(libmlx):
    objects = macos.objects([*macos.sources(), macos.nanobind_source()])
    read = [symbols.read(path) for path in objects.values()]
    own = frozenset().union(*(s.defined for s in read))
    wanted = frozenset().union(*(s.undefined for s in read)) - own
    assert "_PyInit__ext" in own
    assert sorted(wanted_of_mlx(objects.values()) - libmlx) == []
    rest = {
        name for name in wanted - libmlx if name.startswith(("_CF", "_IO", "_kCF", "_objc", "_sel"))
    }
    assert rest <= FRAMEWORKS


def test_a_source_that_a_mac_would_refuse_is_refused(libmlx, tmp_path, monkeypatch):
    monkeypatch.setattr(macos, "ROOT", tmp_path)
    text = (macos.FRAMEWORKS.parents[3] / "csrc/metal/gpu_cores.cpp").read_text()
    broken = text.replace("IOServiceMatching(", "IOServiceMatches(")
    assert broken != text
    source = tmp_path / "gpu_cores.cpp"
    source.write_text(broken)
    flags = [*macos._FLAGS, f"-I{macos.FRAMEWORKS.parents[3] / 'csrc'}"]
    mlx = wheels.mlx_for_macos() / "include"
    flags += [f"-I{mlx}", f"-I{mlx / 'metal_cpp'}", "-idirafter", str(macos.FRAMEWORKS)]
    with pytest.raises(macos.Refused, match="IOServiceMatches"):
        macos._compile(source, flags, tmp_path / "out.o")


def test_a_symbol_that_libmlx_lacks_is_noticed(libmlx):
    exported = "__ZN3mlx4core5metal6deviceENS0_6DeviceE"
    assert OF_MLX.search(exported) and exported in libmlx
    hidden = "__ZN3mlx4core8copy_gpuERKNS0_5arrayERS1_NS0_8CopyTypeE"
    assert OF_MLX.search(hidden) and hidden not in libmlx
