# The mlx wheel exports framework paths of the Xcode it was built with: name
# the frameworks instead, where those paths do not exist.
get_target_property(_libraries mlx INTERFACE_LINK_LIBRARIES)
if(_libraries)
  set(_portable "")
  foreach(_library IN LISTS _libraries)
    if(_library MATCHES "/([A-Za-z0-9_]+)\\.framework$" AND NOT EXISTS "${_library}")
      list(APPEND _portable "-framework ${CMAKE_MATCH_1}")
    else()
      list(APPEND _portable "${_library}")
    endif()
  endforeach()
  set_target_properties(mlx PROPERTIES INTERFACE_LINK_LIBRARIES "${_portable}")
endif()
