// Drives a plugin through IPluginV3 as TensorRT does, without TensorRT: made for the build phase,
// configured, written as an engine's fields, made again from those, attached to two contexts, and
// run: alone, on two streams at once, and from a captured CUDA graph.
// Usage: arrowhead_trt_driver LIBRARY CASE... [--no-launch | --host | --rounds N]
// Writes CASE/out.bin. Without a GPU there are two ways: --no-launch asks for the launch, which has
// to fail because there is no device and for no other reason; --host is for
// libarrowhead_trt_host.so, which computes on the host. --rounds is how often the two streams are
// given work at once: 50, or fewer under a tool that runs kernels one after another anyway.
#include <cuda_runtime_api.h>

#include <cstdlib>
#include <cstring>

#include "driver_case.h"

using namespace harness;
using nvinfer1::DataType;
using nvinfer1::TensorRTPhase;

namespace {

Log log_;
LogFinder finder(log_);

void cuda(cudaError_t error) {
  if (error != cudaSuccess) stop(std::string("CUDA: ") + cudaGetErrorString(error));
}

/// Device memory between guards. Every byte starts as 0xFF: NaN in fp16 and bf16.
class Buffer {
 public:
  explicit Buffer(std::size_t bytes) : bytes_(bytes) {
    cuda(cudaMalloc(&base_, bytes + 2 * kGuard));
    cuda(cudaMemset(base_, kGuardByte, bytes + 2 * kGuard));
    poison();
  }
  explicit Buffer(const std::string& data) : Buffer(data.size()) {
    cuda(cudaMemcpy(get(), data.data(), data.size(), cudaMemcpyHostToDevice));
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() { cudaFree(base_); }

  void* get() const { return static_cast<char*>(base_) + kGuard; }
  void poison() {
    cuda(cudaMemset(get(), 0xFF, bytes_));
    cuda(cudaDeviceSynchronize());
  }
  std::string read() const {
    std::string all(bytes_ + 2 * kGuard, '\0');
    cuda(cudaMemcpy(all.data(), base_, all.size(), cudaMemcpyDeviceToHost));
    const std::string guard(kGuard, kGuardByte);
    CHECK(all.substr(0, kGuard) == guard && all.substr(kGuard + bytes_) == guard);
    return all.substr(kGuard, bytes_);
  }

 private:
  static constexpr std::size_t kGuard = 4096;
  static constexpr char kGuardByte = 0x5A;
  void* base_ = nullptr;
  std::size_t bytes_;
};

/// The builder's part. Returns the size of the workspace.
std::size_t configure(const Plugin& plugin, const Case& one) {
  const int inputs = static_cast<int>(one.inputs.size());
  std::vector<DataType> types(inputs, one.type);
  DataType out_type{};
  CHECK(plugin.build->getNbOutputs() == 1);
  CHECK(plugin.build->getOutputDataTypes(&out_type, 1, types.data(), inputs) == 0);
  CHECK(out_type == one.type);
  std::vector<nvinfer1::DynamicPluginTensorDesc> tensors;
  for (const auto& desc : one.inputs) tensors.push_back(fixed(desc));
  tensors.push_back(fixed(one.output));
  for (int i = 0; i <= inputs; ++i) {
    CHECK(plugin.build->supportsFormatCombination(i, tensors.data(), inputs, 1));
  }
  const auto* output = tensors.data() + inputs;
  CHECK(plugin.build->configurePlugin(tensors.data(), inputs, output, 1) == 0);
  return plugin.build->getWorkspaceSize(tensors.data(), inputs, output, 1);
}

/// The plugin as an engine keeps it: fields copied to bytes, and made anew from them.
nvinfer1::IPluginV3* through_an_engine(nvinfer1::IPluginCreatorV3One& creator,
                                       std::unique_ptr<nvinfer1::IPluginV3> built) {
  const Plugin plugin(built.release());
  const nvinfer1::PluginFieldCollection* fields = plugin.runtime->getFieldsToSerialize();
  std::vector<std::string> bytes;
  for (int i = 0; i < fields->nbFields; ++i) {
    const nvinfer1::PluginField& field = fields->fields[i];
    bytes.emplace_back(static_cast<const char*>(field.data), 4 * field.length);
  }
  std::vector<nvinfer1::PluginField> read;
  for (int i = 0; i < fields->nbFields; ++i) {
    const nvinfer1::PluginField& field = fields->fields[i];
    read.push_back({field.name, bytes[i].data(), field.type, field.length});
  }
  const nvinfer1::PluginFieldCollection blob{fields->nbFields, read.data()};
  return creator.createPlugin("layer", &blob, TensorRTPhase::kRUNTIME);
}

int shape_change(const Plugin& plugin, const Case& one,
                 const std::vector<nvinfer1::PluginTensorDesc>& inputs) {
  return plugin.runtime->onShapeChange(inputs.data(), static_cast<int>(inputs.size()), &one.output,
                                       1);
}

/// Wrong types and shapes are refused; the right ones afterwards are not.
void shapes(const Plugin& context, const Case& one) {
  auto wrong = one.inputs;
  wrong[0].type = DataType::kFLOAT;
  CHECK(shape_change(context, one, wrong) != 0);
  CHECK(contains(log_.take(), "input q | got FLOAT; expected HALF or BF16"));
  wrong = one.inputs;
  wrong[1].dims.d[1] += 1;
  CHECK(shape_change(context, one, wrong) != 0);
  CHECK(contains(log_.take(), "input k | got ["));
  CHECK(shape_change(context, one, one.inputs) == 0);
}

/// What one execution context has: its clone of the plugin, stream, workspace and output.
struct Context {
  const Case& one;
  Plugin plugin;
  std::vector<const void*> inputs;
  Buffer workspace;
  Buffer output;
  cudaStream_t stream = nullptr;

  Context(const Case& recorded, nvinfer1::IPluginV3* attached, std::size_t workspace_bytes,
          const std::vector<std::unique_ptr<Buffer>>& buffers)
      : one(recorded),
        plugin(attached),
        workspace(workspace_bytes),
        output(Case::bytes(one.output)) {
    for (const auto& buffer : buffers) inputs.push_back(buffer->get());
    cuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  }
  ~Context() { cudaStreamDestroy(stream); }

  int enqueue() const {
    void* outputs[] = {output.get()};
    return plugin.runtime->enqueue(one.inputs.data(), &one.output, inputs.data(), outputs,
                                   workspace.get(), stream);
  }
  std::string result() const {
    cuda(cudaStreamSynchronize(stream));
    return output.read();
  }
};

void replay(Context& context, const std::string& expected) {
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  cuda(cudaStreamBeginCapture(context.stream, cudaStreamCaptureModeGlobal));
  CHECK(context.enqueue() == 0);
  cuda(cudaStreamEndCapture(context.stream, &graph));
  cuda(cudaGraphInstantiate(&executable, graph, 0));
  for (int i = 0; i < 3; ++i) {
    context.output.poison();
    cuda(cudaGraphLaunch(executable, context.stream));
    CHECK(context.result() == expected);
  }
  cuda(cudaGraphExecDestroy(executable));
  cuda(cudaGraphDestroy(graph));
}

std::string launch(Plugin& engine, const Case& one, std::size_t workspace_bytes, int rounds) {
  std::vector<std::unique_ptr<Buffer>> buffers;
  for (const std::string& data : one.data) buffers.push_back(std::make_unique<Buffer>(data));
  Context first(one, engine.runtime->attachToContext(nullptr), workspace_bytes, buffers);
  Context second(one, engine.runtime->attachToContext(nullptr), workspace_bytes, buffers);
  for (Context* context : {&first, &second}) shapes(context->plugin, one);

  CHECK(first.enqueue() == 0);
  const std::string expected = first.result();

  first.output.poison();
  for (int i = 0; i < rounds; ++i) {
    CHECK(first.enqueue() == 0);
    CHECK(second.enqueue() == 0);
  }
  CHECK(first.result() == expected);
  CHECK(second.result() == expected);

  replay(first, expected);
  for (std::size_t i = 0; i < buffers.size(); ++i) CHECK(buffers[i]->read() == one.data[i]);

  first.inputs[0] = static_cast<const char*>(first.inputs[0]) + 2;
  CHECK(first.enqueue() != 0);
  CHECK(contains(log_.take(), "launch | got misaligned address"));
  return expected;
}

/// Everything up to the device: addresses are given, and never followed.
void no_launch(Plugin& engine, const Case& one) {
  const Plugin context(engine.runtime->attachToContext(nullptr));
  shapes(context, one);
  void* const somewhere = reinterpret_cast<void*>(std::uintptr_t{1} << 20);
  const std::vector<const void*> inputs(one.inputs.size(), somewhere);
  const auto enqueue = [&](void* workspace) {
    return context.runtime->enqueue(one.inputs.data(), &one.output, inputs.data(), &somewhere,
                                    workspace, nullptr);
  };
  CHECK(enqueue(nullptr) != 0);
  CHECK(contains(log_.take(), "launch | got invalid argument"));
  int devices = 0;
  const cudaError_t no_device = cudaGetDeviceCount(&devices);
  if (no_device == cudaSuccess) stop("--no-launch is for machines without a GPU");
  CHECK(enqueue(somewhere) != 0);
  CHECK(contains(log_.take(), std::string("launch | got ") + cudaGetErrorString(no_device)));
}

/// Buffers of the host in place of the device's.
std::string on_host(Plugin& engine, const Case& one) {
  const Plugin context(engine.runtime->attachToContext(nullptr));
  shapes(context, one);
  std::vector<const void*> inputs;
  for (const std::string& data : one.data) inputs.push_back(data.data());
  std::string output(Case::bytes(one.output), '\xFF');
  void* const outputs[] = {output.data()};
  CHECK(context.runtime->enqueue(one.inputs.data(), &one.output, inputs.data(), outputs,
                                 output.data(), nullptr) == 0);
  return output;
}

enum class Mode { kLaunch, kNoLaunch, kHost };

struct Options {
  Mode mode = Mode::kLaunch;
  int rounds = 50;  // long enough for the streams to overlap
};

/// Takes the options off the end of the command line.
Options take_options(std::vector<std::string>& words) {
  Options options;
  const auto ends_with = [&](std::size_t back, const char* word) {
    return words.size() >= back && words[words.size() - back] == word;
  };
  if (ends_with(1, "--host")) options.mode = Mode::kHost;
  if (ends_with(1, "--no-launch")) options.mode = Mode::kNoLaunch;
  if (options.mode != Mode::kLaunch) words.pop_back();
  if (ends_with(2, "--rounds")) {
    options.rounds = std::atoi(words.back().c_str());
    words.resize(words.size() - 2);
  }
  if (words.size() < 2 || options.rounds < 1) {
    stop("usage: arrowhead_trt_driver LIBRARY CASE... [--no-launch | --host | --rounds N]");
  }
  return options;
}

void drive(const Plugins& plugins, const std::string& folder, const Options& options) {
  Case one(folder);
  nvinfer1::IPluginCreatorV3One& creator =
      *(one.cached ? plugins.cached_head : plugins.arrow_attention);
  const auto fields = one.fields.collection();
  Plugin built(creator.createPlugin("layer", &fields, TensorRTPhase::kBUILD));
  CHECK(built);
  const std::size_t workspace_bytes = configure(built, one);
  Plugin engine(
      through_an_engine(creator, std::unique_ptr<nvinfer1::IPluginV3>(built.owner->clone())));
  CHECK(engine);
  if (options.mode == Mode::kNoLaunch) {
    no_launch(engine, one);
  } else {
    const std::string out = options.mode == Mode::kHost
                                ? on_host(engine, one)
                                : launch(engine, one, workspace_bytes, options.rounds);
    std::ofstream(folder + "/out.bin", std::ios::binary).write(out.data(), out.size());
  }
  const std::string left = log_.take();
  CHECK(left.empty());
  std::fputs(left.c_str(), stderr);
}

}  // namespace

int main(int count, char** arguments) {
  std::vector<std::string> words(arguments + 1, arguments + count);
  const Options options = take_options(words);
  const Plugins plugins(words[0].c_str(), &finder);
  for (std::size_t i = 1; i < words.size(); ++i) {
    const int before = failures;
    drive(plugins, words[i], options);
    std::printf("%s: %d failures\n", words[i].c_str(), failures - before);
  }
  return failures != 0;
}
