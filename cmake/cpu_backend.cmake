# The CPU backend: one kernel source, one translation unit per instruction set.
# Sets PAGED_MLX_CPU_OBJECTS, the sources to add to the extension.
file(GLOB PAGED_MLX_CPU_OBJECTS CONFIGURE_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/csrc/cpu/*.cpp)
set_source_files_properties(${PAGED_MLX_CPU_OBJECTS} PROPERTIES COMPILE_OPTIONS "-O3;-ffp-contract=off")
