"""Builds the extension for macOS on a machine that is not one.

    wheels     mlx for macOS, from the package index, checked by hash
    compile    every source for arm64 macOS, objects cached by content
    symbols    what an object or a library of macOS imports and exports
    frameworks declarations of Apple's that metal-cpp and this project name

What this proves: the Metal path of the host code is valid C++ for the exact MLX, and
libmlx.dylib has every symbol it wants. The result is not a wheel, and nothing is run.
"""
