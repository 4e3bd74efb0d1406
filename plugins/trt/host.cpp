#include "host.h"

#include <dlfcn.h>
#include <link.h>

#include <atomic>
#include <cstdio>
#include <string>
#include <vector>

#include "refused.h"

namespace arrowhead::trt {
namespace {

std::atomic<nvinfer1::ILoggerFinder*> logger_finder{nullptr};

/// A C function that TensorRT exports, or null. RTLD_DEFAULT alone is not enough: Python loads
/// TensorRT with local scope.
void* find_symbol(const char* name) {
  if (void* symbol = dlsym(RTLD_DEFAULT, name)) return symbol;
  std::vector<std::string> loaded;  // opened only after the walk, which holds the loader's lock
  const auto collect = [](dl_phdr_info* info, size_t, void* names) {
    const std::string path = info->dlpi_name ? info->dlpi_name : "";
    const std::string file = path.substr(path.rfind('/') + 1);
    if (file.find("nvinfer") != file.npos || file.find("tensorrt") != file.npos) {
      static_cast<std::vector<std::string>*>(names)->push_back(path);
    }
    return 0;
  };
  dl_iterate_phdr(collect, &loaded);
  for (const std::string& path : loaded) {
    void* library = dlopen(path.c_str(), RTLD_LAZY | RTLD_NOLOAD);
    if (library == nullptr) continue;
    void* symbol = dlsym(library, name);
    dlclose(library);  // its owner keeps it loaded
    if (symbol != nullptr) return symbol;
  }
  return nullptr;
}

/// 10000 * major + 100 * minor + patch, or 0 where no TensorRT is loaded.
int host_version() {
  const auto get =
      reinterpret_cast<decltype(&getInferLibVersion)>(find_symbol("getInferLibVersion"));
  return get ? get() : 0;
}

bool has_our_interfaces(int version) {
  const int major = version / 10000;
  const bool rtx = major == 1;  // TensorRT-RTX counts from 1; 1.7 has TensorRT 11's interfaces
  return version == 0 || major == NV_TENSORRT_MAJOR || (rtx && NV_TENSORRT_MAJOR >= 11);
}

nvinfer1::ILogger* host_logger() {
  if (!has_our_interfaces(host_version())) return nullptr;
  if (nvinfer1::ILoggerFinder* finder = logger_finder.load()) {
    if (nvinfer1::ILogger* logger = finder->findLogger()) return logger;
  }
  const auto get = reinterpret_cast<decltype(&getLogger)>(find_symbol("getLogger"));
  return get ? get() : nullptr;
}

}  // namespace

bool host_fits() {
  const int version = host_version();
  if (has_our_interfaces(version)) return true;
  log(Severity::kERROR, Refused("plugin library", "TensorRT version " + std::to_string(version),
                                "TensorRT " + std::to_string(NV_TENSORRT_MAJOR) +
                                    ", whose headers it was compiled with",
                                "build it with the headers of this TensorRT: make plugins")
                            .what());
  return false;
}

nvinfer1::IPluginRegistry* host_registry() {
  if (!host_fits()) return nullptr;
  const auto get = reinterpret_cast<decltype(&getPluginRegistry)>(find_symbol("getPluginRegistry"));
  return get ? get() : nullptr;
}

void set_logger_finder(nvinfer1::ILoggerFinder* finder) { logger_finder = finder; }

void log(Severity severity, const char* line) noexcept {
  try {
    if (nvinfer1::ILogger* logger = host_logger()) {
      logger->log(severity, (std::string("arrowhead: ") + line).c_str());
      return;
    }
  } catch (...) {  // no memory, or a logger that throws: stderr needs neither
  }
  if (severity <= Severity::kWARNING) std::fprintf(stderr, "arrowhead: %s\n", line);
}

}  // namespace arrowhead::trt
