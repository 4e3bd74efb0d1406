// How the library reaches TensorRT's plugin registry.
//
// 1. TensorRT loads it (IPluginRegistry::loadLibrary, trtexec --dynamicPlugins): it calls
//    setLoggerFinder and getCreators, and registers what it gets.
// 2. The process loads it (ctypes, dlopen, polygraphy --plugins, trtexec --staticPlugins,
//    LD_PRELOAD): it registers itself, if a TensorRT is loaded.
//
// TensorRT's own load begins with a dlopen too, so the second way happens first there, and
// TensorRT refuses creators that are already registered. So getCreators takes the library's own
// registration back. The library stays in memory once loaded (-z nodelete): registries and engines
// keep pointers to it.
#include <atomic>
#include <iterator>

#include "c_api.h"
#include "creator.h"
#include "host.h"
#include "refused.h"

namespace arrowhead::trt {
namespace {

// Never destroyed: a registry may look at them while the process ends.
AttentionCreator* const creators[] = {new AttentionCreator(Operator::kArrowAttention),
                                      new AttentionCreator(Operator::kCachedHead)};

/// The registry that the library registered itself in.
std::atomic<nvinfer1::IPluginRegistry*> own_registration{nullptr};

void withdraw_own_registration() {
  nvinfer1::IPluginRegistry* registry = own_registration.exchange(nullptr);
  if (registry == nullptr) return;
  for (AttentionCreator* creator : creators) registry->deregisterCreator(*creator);
}

bool register_all(nvinfer1::IPluginRegistry& registry) {
  for (AttentionCreator* creator : creators) {
    if (registry.registerCreator(*creator, creator->getPluginNamespace())) continue;
    // Another copy of the library came first. It serves as well, and is the one to be found.
    log(Severity::kINFO, "the plugins are registered already, by another copy of the library");
    return false;
  }
  return true;
}

/// Runs when the process loads the library, after the creators are made.
const bool registered = [] {
  return guarded("plugin library", "registration", false, [] {
    nvinfer1::IPluginRegistry* registry = host_registry();
    if (registry == nullptr || !register_all(*registry)) return false;
    own_registration = registry;
    return true;
  });
}();

}  // namespace
}  // namespace arrowhead::trt

extern "C" {

ARROWHEAD_API void setLoggerFinder(nvinfer1::ILoggerFinder* finder) {
  arrowhead::trt::set_logger_finder(finder);
}

ARROWHEAD_API nvinfer1::IPluginCreatorInterface* const* getCreators(std::int32_t& count) {
  using namespace arrowhead::trt;
  static nvinfer1::IPluginCreatorInterface* const list[] = {creators[0], creators[1]};
  const bool fits = guarded("plugin library", "getCreators", false, [] {
    withdraw_own_registration();
    return host_fits();
  });
  count = fits ? static_cast<std::int32_t>(std::size(list)) : 0;
  return list;
}

/* The TensorRT of the headers this was compiled with: 10000 * major + 100 * minor + patch. */
ARROWHEAD_API int arrowhead_tensorrt_version(void) { return NV_TENSORRT_VERSION; }

}  // extern "C"
