# What c_api_version.cpp says of a build. The id is a hash of the sources, so that it is the same
# wherever and whenever they are compiled; a changed source has CMake run again.
file(GLOB sources CONFIGURE_DEPENDS RELATIVE ${CMAKE_CURRENT_SOURCE_DIR}
     ${kernels}/* trt/* c_api* CMakeLists.txt build_id.cmake)
set(project_file ${CMAKE_CURRENT_SOURCE_DIR}/../pyproject.toml)
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${sources} ${project_file})

set(digests "")
foreach(source ${sources})
  file(SHA256 ${CMAKE_CURRENT_SOURCE_DIR}/${source} digest)
  string(APPEND digests "${source} ${digest}\n")
endforeach()
string(SHA256 ARROWHEAD_BUILD_ID "${digests}")
string(SUBSTRING ${ARROWHEAD_BUILD_ID} 0 16 ARROWHEAD_BUILD_ID)

file(STRINGS ${project_file} version REGEX "^version = " LIMIT_COUNT 1)
string(REGEX MATCH "[0-9][^\"]*" ARROWHEAD_VERSION "${version}")

set(names ${ARROWHEAD_FALLBACK_ARCHITECTURES})
if(ARROWHEAD_SM90)
  list(APPEND names 90a)
endif()
list(TRANSFORM names REPLACE "-(real|virtual)$" "")
list(SORT names COMPARE NATURAL)
list(JOIN names "," ARROWHEAD_ARCHITECTURES)
