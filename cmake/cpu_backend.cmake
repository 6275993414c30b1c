# The CPU backend: one kernel source, one translation unit per instruction set.
# Sets PAGED_MLX_CPU_OBJECTS, the sources to add to the extension.
file(GLOB PAGED_MLX_CPU_OBJECTS CONFIGURE_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/csrc/cpu/*.cpp)
set(CPU_FLAGS "-O3;-ffp-contract=off")
set_source_files_properties(${PAGED_MLX_CPU_OBJECTS} PROPERTIES COMPILE_OPTIONS "${CPU_FLAGS}")

function(isa_flags name)
  set_source_files_properties(
    ${CMAKE_CURRENT_SOURCE_DIR}/csrc/cpu/isa_${name}.cpp
    PROPERTIES COMPILE_OPTIONS "${CPU_FLAGS};${ARGN}")
endfunction()

if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  isa_flags(v2 -march=x86-64-v2)
  isa_flags(v3 -march=x86-64-v3)
  isa_flags(v4 -march=x86-64-v4)
  isa_flags(v4_bf16 -march=x86-64-v4 -mavx512bf16 -mavx512vnni)
endif()
