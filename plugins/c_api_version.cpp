// Which build this is. CMake defines the three strings.
#include "c_api.h"

extern "C" {

const char* arrowhead_version(void) { return ARROWHEAD_VERSION; }
const char* arrowhead_build_id(void) { return ARROWHEAD_BUILD_ID; }
const char* arrowhead_architectures(void) { return ARROWHEAD_ARCHITECTURES; }

}  // extern "C"
