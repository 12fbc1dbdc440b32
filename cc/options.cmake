# How all C++ here is compiled: for the module by cc/CMakeLists.txt, for the tests by theirs.

option(JAX_NSA_WERROR "Treat compiler warnings as errors" OFF)

set(CMAKE_CXX_STANDARD 17)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_CXX_VISIBILITY_PRESET hidden)
set(CMAKE_VISIBILITY_INLINES_HIDDEN ON)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
if(NOT CMAKE_BUILD_TYPE)
  set(CMAKE_BUILD_TYPE Release)
endif()

add_library(jax_nsa_options INTERFACE)
# GCC finds its own AVX-512 headers at fault: -Wno-maybe-uninitialized.
target_compile_options(
  jax_nsa_options INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra -Wno-maybe-uninitialized>)
if(JAX_NSA_WERROR)
  target_compile_options(jax_nsa_options INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-Werror>)
endif()
