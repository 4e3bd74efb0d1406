// The plugin library in the registry of a real TensorRT, in every order of loading. Needs no GPU.
// Usage: arrowhead_trt_registry_test LIBRARY, with ARROWHEAD_TENSORRT_LIBRARY=path of libnvinfer.so
// or libtensorrt_rtx.so in the environment. Networks are test_trt_network.py's: TensorRT-RTX keeps
// the registry's binary interface, and not that of every method of a network.
#include <NvInfer.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstring>
#include <filesystem>

#include "harness.h"

using namespace harness;
using nvinfer1::TensorRTPhase;

namespace {

constexpr int kSkipped = 77;  // what ctest takes for "skipped"

Log log_;
const char* plugin_path;
const char* tensorrt_path;

/// TensorRT, loaded as Python loads it: its symbols are not global.
struct TensorRT {
  void* library = open_library(tensorrt_path);
  std::unique_ptr<nvinfer1::IBuilder> builder{static_cast<nvinfer1::IBuilder*>(
      function<void*(void*, std::int32_t)>(library, "createInferBuilder_INTERNAL")(
          static_cast<nvinfer1::ILogger*>(&log_), NV_TENSORRT_VERSION))};
  nvinfer1::IPluginRegistry& registry =
      *function<nvinfer1::IPluginRegistry*()>(library, "getPluginRegistry")();

  TensorRT() {
    CHECK(builder != nullptr);
    log_.take();  // of the GPU that is not there
  }
  bool has(const char* name, const char* space = "arrowhead", const char* version = "1") {
    return registry.getCreator(name, version, space) != nullptr;
  }
  bool has_both() { return has("ArrowAttention") && has("CachedHead"); }
  int count(const char* name) {
    std::int32_t all = 0;
    auto* const* creators = registry.getAllCreators(&all);
    int found = 0;
    for (std::int32_t i = 0; i < all; ++i) {
      if (std::strcmp(creators[i]->getInterfaceInfo().kind, "PLUGIN CREATOR_V3ONE")) continue;
      const auto* creator = static_cast<nvinfer1::IPluginCreatorV3One*>(creators[i]);
      found += std::strcmp(creator->getPluginName(), name) == 0;
    }
    return found;
  }
  nvinfer1::IPluginCreatorV3One& creator(const char* name) {
    auto* found = registry.getCreator(name, "1", "arrowhead");
    if (found == nullptr) stop(std::string(name) + " is not registered");
    return static_cast<nvinfer1::IPluginCreatorV3One&>(*found);
  }
};

const char kTwice[] = "plugin creator of ArrowAttention exists already";

void tensorrt_loads_it() {
  TensorRT tensorrt;
  CHECK(!tensorrt.has("ArrowAttention"));
  log_.take();
  void* handle = tensorrt.registry.loadLibrary(plugin_path);
  CHECK(handle != nullptr && tensorrt.has_both());
  CHECK(log_.take().empty());
  CHECK(tensorrt.registry.loadLibrary(plugin_path) == nullptr);
  CHECK(contains(log_.take(), kTwice));
  CHECK(tensorrt.has_both() && tensorrt.count("CachedHead") == 1);

  tensorrt.registry.deregisterLibrary(handle);
  CHECK(tensorrt.count("CachedHead") == 0);
  CHECK(tensorrt.registry.loadLibrary(plugin_path) != nullptr && tensorrt.has_both());
}

void the_process_loads_it() {
  TensorRT tensorrt;
  open_library(plugin_path);
  CHECK(tensorrt.has_both() && tensorrt.count("ArrowAttention") == 1);
  open_library(plugin_path);
  CHECK(tensorrt.count("ArrowAttention") == 1);
  CHECK(log_.take().empty());
}

void the_process_and_then_tensorrt() {
  TensorRT tensorrt;
  open_library(plugin_path);
  CHECK(tensorrt.registry.loadLibrary(plugin_path) != nullptr);
  CHECK(tensorrt.has_both() && tensorrt.count("ArrowAttention") == 1);
  CHECK(log_.take().empty());
  CHECK(tensorrt.registry.loadLibrary(plugin_path) == nullptr);
  CHECK(contains(log_.take(), kTwice));
}

void tensorrt_and_then_the_process() {
  TensorRT tensorrt;
  CHECK(tensorrt.registry.loadLibrary(plugin_path) != nullptr);
  open_library(plugin_path);
  CHECK(tensorrt.has_both() && tensorrt.count("ArrowAttention") == 1);
  CHECK(log_.take().empty());
}

void before_tensorrt() {
  open_library(plugin_path);
  TensorRT tensorrt;
  CHECK(tensorrt.count("ArrowAttention") == 0);
  CHECK(tensorrt.registry.loadLibrary(plugin_path) != nullptr && tensorrt.has_both());
}

void two_copies() {
  const std::string copy = std::string(plugin_path) + ".copy-" + std::to_string(getpid());
  std::filesystem::copy_file(plugin_path, copy);
  TensorRT tensorrt;
  open_library(plugin_path);
  open_library(copy.c_str());
  CHECK(tensorrt.has_both() && tensorrt.count("ArrowAttention") == 1);
  CHECK(log_.take().empty());
  CHECK(tensorrt.registry.loadLibrary(copy.c_str()) == nullptr);
  CHECK(contains(log_.take(), kTwice));
  CHECK(tensorrt.has_both());
  std::filesystem::remove(copy);
}

void another_name() {
  TensorRT tensorrt;
  CHECK(tensorrt.registry.loadLibrary(plugin_path) != nullptr);
  CHECK(!tensorrt.has("ArrowAttention", ""));
  CHECK(contains(log_.take(), "Cannot find plugin: ArrowAttention, version: 1, namespace:"));
  CHECK(!tensorrt.has("CachedHead", "trt"));
  CHECK(contains(log_.take(), "namespace:trt"));
  CHECK(!tensorrt.has("CachedHead", "arrowhead", "2"));
  CHECK(contains(log_.take(), "version: 2, namespace:arrowhead"));
}

void missing_field() {
  TensorRT tensorrt;
  CHECK(tensorrt.registry.loadLibrary(plugin_path) != nullptr);
  Fields fields(true);
  fields.list.pop_back();
  const auto given = fields.collection();
  CHECK(tensorrt.creator("CachedHead").createPlugin("x", &given, TensorRTPhase::kBUILD) == nullptr);
  // TensorRT's own logger has it: the library found it by TensorRT's logger finder.
  CHECK(contains(log_.take(), "arrowhead: CachedHead 'x': field source | got no such field"));
}

/// Each in a process of its own: what is loaded and registered stays so.
bool passes(const char* name, void (*test)()) {
  std::fflush(nullptr);
  const pid_t child = fork();
  if (child == 0) {
    test();
    std::printf("%s: %d failures\n", name, failures);
    std::fflush(nullptr);
    std::exit(failures != 0);
  }
  int status = 0;
  waitpid(child, &status, 0);
  if (WIFSIGNALED(status)) std::printf("%s: signal %d\n", name, WTERMSIG(status));
  return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 2) stop("usage: arrowhead_trt_registry_test LIBRARY");
  plugin_path = arguments[1];
  tensorrt_path = std::getenv("ARROWHEAD_TENSORRT_LIBRARY");
  if (tensorrt_path == nullptr) {
    std::puts("skipped: ARROWHEAD_TENSORRT_LIBRARY names no libnvinfer.so or libtensorrt_rtx.so");
    return kSkipped;
  }
  bool all = true;
#define RUN(test) all = passes(#test, test) && all
  RUN(tensorrt_loads_it);
  RUN(the_process_loads_it);
  RUN(the_process_and_then_tensorrt);
  RUN(tensorrt_and_then_the_process);
  RUN(before_tensorrt);
  RUN(two_copies);
  RUN(another_name);
  RUN(missing_field);
  return all ? 0 : 1;
}
