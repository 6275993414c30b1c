# The thin layer that touches MLX and Python, once for each release of mlx.

# paged_mlx_native_module(RELEASE): target _ext_<release>, installed as
# paged_mlx/native/mlx_<release>/_ext.
function(paged_mlx_native_module release)
  string(REPLACE "." "_" name "${release}")
  execute_process(
    COMMAND "${Python_EXECUTABLE}" ${CMAKE_CURRENT_SOURCE_DIR}/cmake/mlx_releases.py
            roots ${release} ${CMAKE_CURRENT_BINARY_DIR}/releases
    OUTPUT_STRIP_TRAILING_WHITESPACE OUTPUT_VARIABLE roots
    COMMAND_ERROR_IS_FATAL ANY)
  list(GET roots 0 mlx)
  list(GET roots 1 nanobind)

  # nanobind keeps its types in a domain; MLX's own is shared with it.
  add_library(nanobind_${name} OBJECT ${nanobind}/src/nb_combined.cpp)
  target_include_directories(nanobind_${name} SYSTEM PUBLIC
    ${Python_INCLUDE_DIRS} ${nanobind}/include ${nanobind}/ext/robin_map/include)
  target_compile_definitions(nanobind_${name} PUBLIC NB_DOMAIN=mlx)
  target_compile_options(nanobind_${name} PRIVATE
    -fno-strict-aliasing $<$<NOT:$<CONFIG:Debug>>:-DNB_COMPACT_ASSERTIONS>)

  Python_add_library(_ext_${name} MODULE WITH_SOABI ${ARGN})
  set_target_properties(_ext_${name} PROPERTIES
    OUTPUT_NAME _ext
    LIBRARY_OUTPUT_DIRECTORY ${CMAKE_CURRENT_BINARY_DIR}/native/mlx_${name}
    BUILD_WITH_INSTALL_RPATH ON
    INSTALL_RPATH "${PAGED_MLX_ORIGIN}/../../../mlx/lib;${PAGED_MLX_ORIGIN}/..;${PAGED_MLX_RPATH}")
  target_include_directories(_ext_${name} PRIVATE csrc kernels ${GENERATED})
  target_include_directories(_ext_${name} SYSTEM PRIVATE ${mlx}/include)
  target_link_libraries(_ext_${name} PRIVATE
    nanobind_${name} paged_mlx_core ${mlx}/lib/libmlx${CMAKE_SHARED_LIBRARY_SUFFIX})
  if(APPLE)
    target_compile_definitions(_ext_${name} PRIVATE _METAL_ ACCELERATE_NEW_LAPACK)
    target_include_directories(_ext_${name} SYSTEM PRIVATE ${mlx}/include/metal_cpp)
    foreach(framework Metal Foundation QuartzCore Accelerate IOKit CoreFoundation)
      target_link_libraries(_ext_${name} PRIVATE "-framework ${framework}")
    endforeach()
  endif()

  if(PAGED_MLX_STUB AND NOT CMAKE_CROSSCOMPILING AND release STREQUAL PAGED_MLX_INSTALLED)
    add_custom_command(TARGET _ext_${name} POST_BUILD
      COMMAND "${Python_EXECUTABLE}" ${CMAKE_CURRENT_SOURCE_DIR}/cmake/make_stub.py
              $<TARGET_FILE:_ext_${name}> ${GENERATED}/_ext.pyi
      VERBATIM)
    install(FILES ${GENERATED}/_ext.pyi DESTINATION paged_mlx)
  endif()
  install(TARGETS _ext_${name} LIBRARY DESTINATION paged_mlx/native/mlx_${name})
endfunction()
