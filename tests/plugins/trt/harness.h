// What the plugin tests share: the library under test, its log, and a way to say what went wrong.
#pragma once

#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace harness {

inline int failures = 0;

#define CHECK(condition) \
  ::harness::check(static_cast<bool>(condition), #condition, __FILE__, __LINE__)

inline void check(bool holds, const char* condition, const char* file, int line) {
  if (holds) return;
  std::fprintf(stderr, "%s:%d: %s does not hold\n", file, line, condition);
  ++failures;
}

/// Collects what the plugins and TensorRT say.
class Log final : public nvinfer1::ILogger {
 public:
  void log(Severity severity, const char* line) noexcept override {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (severity <= Severity::kWARNING) lines_.emplace_back(line);
  }

  /// Warnings and errors since the last call.
  std::string take() {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::string all;
    for (const std::string& line : lines_) all += line + "\n";
    lines_.clear();
    return all;
  }

 private:
  std::mutex mutex_;
  std::vector<std::string> lines_;
};

/// How the plugins get at the log.
class LogFinder final : public nvinfer1::ILoggerFinder {
 public:
  explicit LogFinder(Log& log) : log_(log) {}
  nvinfer1::ILogger* findLogger() override { return &log_; }

 private:
  Log& log_;
};

inline bool contains(const std::string& text, const std::string& part) {
  if (text.find(part) != text.npos) return true;
  std::fprintf(stderr, "no '%s' in: %s\n", part.c_str(), text.c_str());
  return false;
}

[[noreturn]] inline void stop(const std::string& why) {
  std::fprintf(stderr, "%s\n", why.c_str());
  std::exit(2);
}

inline void* open_library(const char* path, int flags = RTLD_NOW | RTLD_LOCAL) {
  void* library = dlopen(path, flags);
  if (library == nullptr) stop(dlerror());
  return library;
}

template <class Function>
Function* function(void* library, const char* name) {
  void* symbol = dlsym(library, name);
  if (symbol == nullptr) stop(dlerror());
  return reinterpret_cast<Function*>(symbol);
}

/// The creators of the plugin library, as TensorRT asks for them.
struct Plugins {
  void* handle;
  nvinfer1::IPluginCreatorV3One* arrow_attention = nullptr;
  nvinfer1::IPluginCreatorV3One* cached_head = nullptr;

  Plugins(const char* path, nvinfer1::ILoggerFinder* log) : handle(open_library(path)) {
    function<void(nvinfer1::ILoggerFinder*)>(handle, "setLoggerFinder")(log);
    using Creators = nvinfer1::IPluginCreatorInterface* const*(std::int32_t&);
    std::int32_t count = 0;
    auto* const* list = function<Creators>(handle, "getCreators")(count);
    for (std::int32_t i = 0; i < count; ++i) {
      auto* creator = static_cast<nvinfer1::IPluginCreatorV3One*>(list[i]);
      const std::string name = creator->getPluginName();
      (name == "CachedHead" ? cached_head : arrow_attention) = creator;
    }
    if (count != 2 || !arrow_attention || !cached_head) stop("getCreators: not the two plugins");
  }
};

/// Fields that own their values. The defaults are a graph's of three computed heads, and, for
/// CachedHead, a merged output of five from them and two cached ones.
struct Fields {
  float scale = 0.125f;
  std::int32_t text_tokens = 5;
  std::int32_t text_first = 0;
  std::int32_t block = 16;
  std::vector<std::int32_t> half_windows{-1, 0, 1};
  std::vector<std::int32_t> source{3, 0, 1, 4, 2};
  std::vector<nvinfer1::PluginField> list;

  explicit Fields(bool cached) {
    using nvinfer1::PluginFieldType;
    list = {{"scale", &scale, PluginFieldType::kFLOAT32, 1},
            {"text_tokens", &text_tokens, PluginFieldType::kINT32, 1},
            {"text_first", &text_first, PluginFieldType::kINT32, 1},
            {"block", &block, PluginFieldType::kINT32, 1},
            {"half_windows", nullptr, PluginFieldType::kINT32, 0}};
    if (cached) list.push_back({"source", nullptr, PluginFieldType::kINT32, 0});
    refresh();
  }
  Fields(const Fields&) = delete;

  /// After a list was changed.
  void refresh() {
    set("half_windows", half_windows);
    set("source", source);
  }
  nvinfer1::PluginField* find(const std::string& name) {
    for (nvinfer1::PluginField& field : list) {
      if (name == field.name) return &field;
    }
    return nullptr;
  }
  nvinfer1::PluginFieldCollection collection() {
    return {static_cast<std::int32_t>(list.size()), list.data()};
  }

 private:
  void set(const char* name, const std::vector<std::int32_t>& values) {
    nvinfer1::PluginField* field = find(name);
    if (field == nullptr) return;
    field->data = values.data();
    field->length = static_cast<std::int32_t>(values.size());
  }
};

/// A plugin and its capabilities.
struct Plugin {
  std::unique_ptr<nvinfer1::IPluginV3> owner;
  nvinfer1::IPluginV3OneCore* core = nullptr;
  nvinfer1::IPluginV3OneBuild* build = nullptr;
  nvinfer1::IPluginV3OneRuntime* runtime = nullptr;

  explicit Plugin(nvinfer1::IPluginV3* plugin) : owner(plugin) {
    using nvinfer1::PluginCapabilityType;
    if (plugin == nullptr) return;
    const auto get = [&](auto type) { return plugin->getCapabilityInterface(type); };
    core = static_cast<nvinfer1::IPluginV3OneCore*>(get(PluginCapabilityType::kCORE));
    build = static_cast<nvinfer1::IPluginV3OneBuild*>(get(PluginCapabilityType::kBUILD));
    runtime = static_cast<nvinfer1::IPluginV3OneRuntime*>(get(PluginCapabilityType::kRUNTIME));
  }
  explicit operator bool() const { return core && build && runtime; }
};

inline nvinfer1::PluginTensorDesc linear(nvinfer1::DataType type, std::vector<std::int64_t> dims) {
  nvinfer1::PluginTensorDesc desc{};
  desc.type = type;
  desc.format = nvinfer1::TensorFormat::kLINEAR;
  desc.dims.nbDims = static_cast<std::int32_t>(dims.size());
  for (std::size_t i = 0; i < dims.size(); ++i) desc.dims.d[i] = dims[i];
  return desc;
}

inline nvinfer1::DynamicPluginTensorDesc fixed(const nvinfer1::PluginTensorDesc& desc) {
  nvinfer1::DynamicPluginTensorDesc dynamic{};
  dynamic.desc = desc;
  dynamic.min = dynamic.opt = dynamic.max = desc.dims;
  return dynamic;
}

}  // namespace harness
