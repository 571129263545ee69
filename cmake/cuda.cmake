# COGVX_CUDA_FOUND, COGVX_CUDA_ARCHS and COGVX_CUDA_DEFINITIONS. Whatever is wrong with the CUDA toolchain is said, kept
# for `_C.built_with()`, and leaves CUDA out: it never stops an installation.

set(COGVX_CUDA_FOUND FALSE)
set(COGVX_CUDA_DEFINITIONS "")
set(reason "")

function(cogvx_default_archs result) # of the GPUs present those that the kernels are for, else 80 and 90a
  set(archs "")
  find_program(COGVX_NVIDIA_SMI nvidia-smi)
  if(COGVX_NVIDIA_SMI)
    execute_process(COMMAND ${COGVX_NVIDIA_SMI} --query-gpu=compute_cap --format=csv,noheader
      OUTPUT_VARIABLE capabilities ERROR_QUIET RESULT_VARIABLE status)
    if(status EQUAL 0)
      string(REGEX MATCHALL "[0-9]+\\.[0-9]+" archs "${capabilities}")
      string(REPLACE "." "" archs "${archs}")
      list(FILTER archs EXCLUDE REGEX "^[1-7][0-9]$") # 7.5 and before lack instructions that the kernels consist of
      list(REMOVE_DUPLICATES archs)
      list(TRANSFORM archs REPLACE "^90$" "90a") # Hopper's own instructions
    endif()
  endif()
  if(NOT archs)
    set(archs 80 90a)
  endif()
  set(${result} "${archs}" PARENT_SCOPE)
endfunction()

if("$ENV{COGVX_CUDA}" MATCHES "^(0|off|OFF|no|false)$")
  set(reason "turned off by COGVX_CUDA=$ENV{COGVX_CUDA}")
else()
  include(CheckLanguage)
  if(NOT CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
    find_program(COGVX_NVCC nvcc HINTS $ENV{CUDA_HOME}/bin $ENV{CUDA_PATH}/bin PATHS /usr/local/cuda/bin)
    if(COGVX_NVCC)
      set(ENV{CUDACXX} ${COGVX_NVCC}) # a compiler that is set as a variable is not checked below
    endif()
  endif()
  check_language(CUDA) # compiles and links a program in a project of its own, so that a broken nvcc is no error here
  if(NOT CMAKE_CUDA_COMPILER)
    set(reason "no working nvcc was found")
  else()
    enable_language(CUDA)
    if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 11.8)
      set(reason "nvcc ${CMAKE_CUDA_COMPILER_VERSION} is older than 11.8")
    endif()
  endif()
endif()

if(NOT reason)
  set(COGVX_CUDA_ARCHS "$ENV{COGVX_CUDA_ARCHS}")
  string(REGEX REPLACE "[, ]+" ";" COGVX_CUDA_ARCHS "${COGVX_CUDA_ARCHS}")
  if(NOT COGVX_CUDA_ARCHS)
    cogvx_default_archs(COGVX_CUDA_ARCHS)
  endif()
  set(CMAKE_CUDA_ARCHITECTURES "${COGVX_CUDA_ARCHS}")
  try_compile(COGVX_CUDA_WORKS ${CMAKE_BINARY_DIR}/cuda_probe ${CMAKE_SOURCE_DIR}/csrc/common/device.cu
    CMAKE_FLAGS -DINCLUDE_DIRECTORIES=${CMAKE_SOURCE_DIR}/csrc "-DCMAKE_CUDA_ARCHITECTURES=${COGVX_CUDA_ARCHS}"
    COMPILE_DEFINITIONS -DCOGVX_PROBE CUDA_STANDARD 17 OUTPUT_VARIABLE probe_output)
  if(COGVX_CUDA_WORKS)
    set(COGVX_CUDA_FOUND TRUE)
    string(JOIN "," archs ${COGVX_CUDA_ARCHS})
    set(COGVX_CUDA_DEFINITIONS COGVX_CUDA_VERSION="${CMAKE_CUDA_COMPILER_VERSION}" COGVX_CUDA_ARCHS="${archs}")
    message(STATUS "cogvx: CUDA ${CMAKE_CUDA_COMPILER_VERSION} for ${archs}")
  else()
    set(reason "nvcc ${CMAKE_CUDA_COMPILER_VERSION} cannot compile for the architectures ${COGVX_CUDA_ARCHS}")
    message(STATUS "${probe_output}")
  endif()
endif()

if(NOT COGVX_CUDA_FOUND)
  string(REPLACE ";" "," reason "${reason}")
  set(COGVX_CUDA_DEFINITIONS COGVX_CUDA_REASON="${reason}")
  message(STATUS "cogvx: built without CUDA: ${reason}")
endif()
