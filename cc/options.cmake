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

set(JAX_NSA_SANITIZE "" CACHE STRING "Sanitizers to compile with, such as address,undefined")
if(JAX_NSA_SANITIZE)
  add_compile_options(-fsanitize=${JAX_NSA_SANITIZE} -fno-sanitize-recover=all -g1)
  add_link_options(-fsanitize=${JAX_NSA_SANITIZE})
endif()

add_library(jax_nsa_options INTERFACE)
if(JAX_NSA_SANITIZE)
  # The kernels' own -O3 takes minutes with all checks in them.
  target_compile_options(jax_nsa_options INTERFACE -O1 -Wno-uninitialized)
endif()
# GCC finds its own AVX-512 headers at fault: -Wno-maybe-uninitialized.
target_compile_options(
  jax_nsa_options INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra>
  $<$<COMPILE_LANG_AND_ID:CXX,GNU>:-Wno-maybe-uninitialized>)
if(JAX_NSA_WERROR)
  target_compile_options(jax_nsa_options INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-Werror>)
endif()
