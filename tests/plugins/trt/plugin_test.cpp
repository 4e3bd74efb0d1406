// The plugins through TensorRT's interfaces, without TensorRT: fields, serialisation, clones, types
// and shapes, and every refusal with its message. Usage: arrowhead_trt_test LIBRARY
#include <cstring>
#include <functional>

#include "harness.h"

using namespace harness;
using nvinfer1::DataType;
using nvinfer1::PluginFieldType;
using nvinfer1::TensorRTPhase;

/// The library looks for this function to learn which TensorRT is loaded; here it is this program.
static int tensorrt_version = NV_TENSORRT_VERSION;
extern "C" __attribute__((visibility("default"))) std::int32_t getInferLibVersion() noexcept {
  return tensorrt_version;
}

namespace {

Log log_;
LogFinder finder(log_);

void creators(const Plugins& plugins) {
  for (auto* creator : {plugins.arrow_attention, plugins.cached_head}) {
    CHECK(std::string(creator->getPluginVersion()) == "1");
    CHECK(std::string(creator->getPluginNamespace()) == "arrowhead");
    CHECK(std::string(creator->getInterfaceInfo().kind) == "PLUGIN CREATOR_V3ONE");
    Fields expected(creator == plugins.cached_head);
    const nvinfer1::PluginFieldCollection* names = creator->getFieldNames();
    CHECK(names->nbFields == static_cast<int>(expected.list.size()));
    for (int i = 0; i < names->nbFields; ++i) {
      const nvinfer1::PluginField* field = expected.find(names->fields[i].name);
      CHECK(field && field->type == names->fields[i].type);
    }
  }
}

/// What createPlugin says of fields after `change`.
std::string refusal(nvinfer1::IPluginCreatorV3One* creator, bool cached,
                    const std::function<void(Fields&)>& change) {
  Fields fields(cached);
  change(fields);
  const auto collection = fields.collection();
  const Plugin plugin(creator->createPlugin("block.7", &collection, TensorRTPhase::kBUILD));
  CHECK(plugin.owner == nullptr);
  return log_.take();
}

void fields_are_checked(const Plugins& plugins) {
  for (const bool cached : {false, true}) {
    auto* creator = cached ? plugins.cached_head : plugins.arrow_attention;
    const auto refused = [&](auto change) { return refusal(creator, cached, change); };
    const std::string who = std::string(creator->getPluginName()) + " 'block.7': field ";

    for (std::size_t i = 0; i < Fields(cached).list.size(); ++i) {
      const std::string name = Fields(cached).list[i].name;
      const bool is_list = name == "half_windows" || name == "source";
      const std::string type = name == "scale" ? "FLOAT32" : "INT32";
      const std::string expected =
          "; expected " + (is_list ? "1 to 128 values of " : std::string("1 value of ")) + type;
      std::string said = refused([&](Fields& f) { f.list.erase(f.list.begin() + i); });
      CHECK(contains(said, who + name + " | got no such field" + expected));
      CHECK(contains(said, "Fix: "));
      said = refused([&](Fields& f) { f.list[i].type = PluginFieldType::kINT64; });
      CHECK(contains(said, who + name + " | got "));
      CHECK(contains(said, "of INT64" + expected));
      said = refused([&](Fields& f) { f.list[i].length = is_list ? 129 : 2; });
      CHECK(contains(said, is_list ? "got 129 values of " : "got 2 values of "));
      CHECK(contains(said, expected));
      said = refused([&](Fields& f) { f.list[i].length = 0; });
      CHECK(contains(said, who + name + " | got 0 values of " + type + expected));
      said = refused([&](Fields& f) { f.list[i].data = nullptr; });
      CHECK(contains(said, ", without data" + expected));
      said = refused([&](Fields& f) { f.list.push_back(f.list[i]); });
      CHECK(contains(said, who + name + " | got it twice; expected it once"));
    }
    std::string said = refused([](Fields& f) { f.list.push_back({"windows"}); });
    CHECK(contains(said, who + "windows | got a field of this name; expected only scale, "));
    said = refused([](Fields& f) { f.list.push_back({nullptr}); });
    CHECK(contains(said, "field without a name"));

    said = refused([](Fields& f) { f.scale = 0.f; });
    CHECK(contains(said, who + "scale | got 0; expected a finite number above 0"));
    said = refused([](Fields& f) { f.text_tokens = -1; });
    CHECK(contains(said, who + "text_tokens | got -1; expected 0 to 2^28"));
    said = refused([](Fields& f) { f.text_first = 2; });
    CHECK(contains(said, who + "text_first | got 2; expected 0 or 1"));
    said = refused([](Fields& f) { f.block = 0; });
    CHECK(contains(said, who + "block | got 0; expected 1 to 2^28 tokens"));
    said = refused([](Fields& f) { f.half_windows[2] = -2; });
    CHECK(contains(said, who + "half_windows | got [-1,0,-2]; expected half windows"));
  }
  std::string said = refusal(plugins.cached_head, true, [](Fields& f) { f.source[0] = -1; });
  CHECK(contains(said, "CachedHead 'block.7': field source | got [-1,0,1,4,2]; expected indices"));
  CHECK(plugins.cached_head->createPlugin(nullptr, nullptr, TensorRTPhase::kBUILD) == nullptr);
  CHECK(contains(log_.take(), "CachedHead '': field scale | got no such field"));
}

bool equal(const nvinfer1::PluginFieldCollection& a, const nvinfer1::PluginFieldCollection& b) {
  bool same = a.nbFields == b.nbFields;
  for (int i = 0; same && i < a.nbFields; ++i) {
    const nvinfer1::PluginField &x = a.fields[i], &y = b.fields[i];
    same = std::strcmp(x.name, y.name) == 0 && x.type == y.type && x.length == y.length &&
           std::memcmp(x.data, y.data, 4 * x.length) == 0;
  }
  return same;
}

/// Fields -> plugin -> fields -> plugin at the runtime phase -> clones: nothing changes.
void plugins_survive_an_engine(const Plugins& plugins) {
  for (const bool cached : {false, true}) {
    auto* creator = cached ? plugins.cached_head : plugins.arrow_attention;
    Fields fields(cached);
    const auto given = fields.collection();
    auto built =
        std::make_unique<Plugin>(creator->createPlugin("layer", &given, TensorRTPhase::kBUILD));
    CHECK(*built);
    const std::string timing = built->build->getTimingCacheID();
    const std::string metadata = built->build->getMetadataString();
    CHECK(equal(*built->runtime->getFieldsToSerialize(), given));

    // An engine's bytes outlive the plugin that wrote them, and may lie at odd addresses.
    const nvinfer1::PluginFieldCollection* written = built->runtime->getFieldsToSerialize();
    std::vector<nvinfer1::PluginField> read(written->fields, written->fields + written->nbFields);
    std::vector<std::vector<char>> bytes;
    for (nvinfer1::PluginField& field : read) {
      bytes.emplace_back(4 * field.length + 1);
      std::memcpy(bytes.back().data() + 1, field.data, 4 * field.length);
      field.data = bytes.back().data() + 1;
    }
    const std::vector<std::string> names{"scale", "text_tokens",  "text_first",
                                         "block", "half_windows", "source"};
    for (std::size_t i = 0; i < read.size(); ++i) read[i].name = names[i].c_str();
    built.reset();
    const nvinfer1::PluginFieldCollection blob{static_cast<int>(read.size()), read.data()};
    Plugin runtime(creator->createPlugin("layer", &blob, TensorRTPhase::kRUNTIME));
    CHECK(runtime);
    Plugin clone(runtime.owner->clone());
    Plugin attached(runtime.runtime->attachToContext(nullptr));
    runtime.owner.reset();
    for (const Plugin* copy : {&clone, &attached}) {
      CHECK(*copy);
      CHECK(equal(*copy->runtime->getFieldsToSerialize(), given));
      CHECK(copy->build->getTimingCacheID() == timing);
      CHECK(copy->build->getMetadataString() == metadata);
      CHECK(std::string(copy->core->getPluginName()) == creator->getPluginName());
      CHECK(std::string(copy->core->getPluginVersion()) == "1");
      CHECK(std::string(copy->core->getPluginNamespace()) == "arrowhead");
    }
    CHECK(metadata ==
          std::string("{\"scale\":0.125,\"text_tokens\":5,\"text_first\":0,\"block\":16,"
                      "\"half_windows\":[-1,0,1]") +
              (cached ? ",\"source\":[3,0,1,4,2]}" : "}"));
  }
}

void timing_ids(const Plugins& plugins) {
  const auto id = [&](bool cached, const char* layer, const std::function<void(Fields&)>& change) {
    Fields fields(cached);
    change(fields);
    fields.refresh();
    const auto given = fields.collection();
    auto* creator = cached ? plugins.cached_head : plugins.arrow_attention;
    const Plugin plugin(creator->createPlugin(layer, &given, TensorRTPhase::kBUILD));
    return std::string(plugin.build->getTimingCacheID());
  };
  const auto same = [](Fields&) {};
  for (const bool cached : {false, true}) {
    const std::string first = id(cached, "layer 1", same);
    CHECK(first == id(cached, "layer 2", same));
    CHECK(first != id(!cached, "layer 1", same));
    CHECK(first != id(cached, "layer 1", [](Fields& f) { f.scale = 0.1250001f; }));
    CHECK(first != id(cached, "layer 1", [](Fields& f) { f.text_tokens = 6; }));
    CHECK(first != id(cached, "layer 1", [](Fields& f) { f.text_first = 1; }));
    CHECK(first != id(cached, "layer 1", [](Fields& f) { f.block = 32; }));
    CHECK(first != id(cached, "layer 1", [](Fields& f) { f.half_windows = {-1, 1, 0}; }));
  }
  CHECK(id(true, "x", same) != id(true, "x", [](Fields& f) { f.source = {3, 0, 1, 4, 1}; }));
  const auto build = function<const char*()>(plugins.handle, "arrowhead_build_id");
  CHECK(contains(id(true, "x", same), build()));
  CHECK(std::string(build()).size() == 16);
}

/// One CachedHead on B 2, S 53, five output heads of D 64; tests change one thing each.
struct Tensors {
  std::vector<nvinfer1::PluginTensorDesc> in;
  std::vector<nvinfer1::PluginTensorDesc> out;

  Tensors() {
    for (const int heads : {3, 3, 3, 2}) in.push_back(linear(DataType::kBF16, {2, 53, heads, 64}));
    out.push_back(linear(DataType::kBF16, {2, 53, 5, 64}));
  }
  int shape_change(const Plugin& plugin) const {
    return plugin.runtime->onShapeChange(in.data(), static_cast<int>(in.size()), out.data(),
                                         static_cast<int>(out.size()));
  }
  int configure(const Plugin& plugin) const {
    std::vector<nvinfer1::DynamicPluginTensorDesc> all;
    for (const auto& desc : in) all.push_back(fixed(desc));
    for (const auto& desc : out) all.push_back(fixed(desc));
    return plugin.build->configurePlugin(all.data(), static_cast<int>(in.size()),
                                         all.data() + in.size(), static_cast<int>(out.size()));
  }
};

void tensors_are_checked(const Plugins& plugins) {
  Fields fields(true);
  const auto given = fields.collection();
  const Plugin plugin(plugins.cached_head->createPlugin("a", &given, TensorRTPhase::kBUILD));
  CHECK(plugin.build->getNbOutputs() == 1);
  CHECK(Tensors().configure(plugin) == 0 && Tensors().shape_change(plugin) == 0);
  CHECK(log_.take().empty());

  const auto refused = [&](const std::function<void(Tensors&)>& change, const char* message) {
    Tensors tensors;
    change(tensors);
    CHECK(tensors.shape_change(plugin) != 0);
    CHECK(contains(log_.take(), std::string("CachedHead 'a': ") + message));
    CHECK(tensors.configure(plugin) != 0);
    CHECK(contains(log_.take(), std::string("CachedHead 'a': ") + message));
  };
  const auto all_types = [](DataType type) {
    return [type](Tensors& t) {
      for (auto* list : {&t.in, &t.out}) {
        for (auto& desc : *list) desc.type = type;
      }
    };
  };
  refused(all_types(DataType::kFLOAT), "input q | got FLOAT; expected HALF or BF16. Fix: export");
  refused([](Tensors& t) { t.in[3].type = DataType::kHALF; }, "tensor 3 | got HALF; expected BF16");
  refused([](Tensors& t) { t.out[0].type = DataType::kFLOAT; }, "tensor 4 | got FLOAT; expected");
  refused([](Tensors& t) { t.in[1].format = nvinfer1::TensorFormat::kHWC8; },
          "tensor 1 | got format 2; expected LINEAR");
  refused([](Tensors& t) { t.in.pop_back(); }, "tensors | got 3 in, 1 out; expected 4 in, 1 out");
  const std::string q = "input q [B, S, heads, D] | got ";
  refused([](Tensors& t) { t.in[0].dims.nbDims = 3; }, (q + "[2, 53, 3]; expected 4 dim").c_str());
  refused([](Tensors& t) { t.in[0].dims.d[0] = 0; }, (q + "[0, 53, 3, 64]; expected B").c_str());
  refused([](Tensors& t) { t.in[0].dims.d[1] = 4; },
          (q + "[2, 4, 3, 64]; expected S of 5").c_str());
  refused([](Tensors& t) { t.in[0].dims.d[2] = 4; }, (q + "[2, 53, 4, 64]; expected 3 he").c_str());
  refused([](Tensors& t) { t.in[0].dims.d[3] = 96; },
          (q + "[2, 53, 3, 96]; expected D of 64 or 128").c_str());
  refused([](Tensors& t) { t.in[2].dims.d[1] = 52; },
          "input v | got [2, 52, 3, 64]; expected [2, 53, 3, 64]");
  refused([](Tensors& t) { t.in[3].dims.d[3] = 128; },
          "input cache | got [2, 53, 2, 128]; expected [2, 53, ?, 64]");
  refused([](Tensors& t) { t.in[3].dims.d[2] = 0; },
          "input cache | got [2, 53, 0, 64]; expected 1");
  refused([](Tensors& t) { t.in[3].dims.d[2] = 1; },
          "field source | got head 4; expected less than 4");
  refused([](Tensors& t) { t.out[0].dims.d[2] = 4; },
          "output | got [2, 53, 4, 64]; expected [2, 53, 5, 64]");

  Tensors unknown_batch;  // a profile over the batch, while the network is configured
  for (auto* list : {&unknown_batch.in, &unknown_batch.out}) {
    for (auto& desc : *list) desc.dims.d[0] = -1;
  }
  CHECK(unknown_batch.configure(plugin) == 0);

  DataType type{};
  const DataType half[4] = {DataType::kHALF, DataType::kHALF, DataType::kHALF, DataType::kHALF};
  CHECK(plugin.build->getOutputDataTypes(&type, 1, half, 4) == 0 && type == DataType::kHALF);
  const DataType single[4] = {};
  CHECK(plugin.build->getOutputDataTypes(&type, 1, half, 3) != 0);
  CHECK(contains(log_.take(), "tensors | got 3 in, 1 out; expected 4 in, 1 out"));
  CHECK(plugin.build->getOutputDataTypes(&type, 1, single, 4) != 0);
  CHECK(contains(log_.take(), "input q | got FLOAT; expected HALF or BF16"));
}

void formats(const Plugins& plugins) {
  Fields fields(true);
  const auto given = fields.collection();
  const Plugin plugin(plugins.cached_head->createPlugin("a", &given, TensorRTPhase::kBUILD));
  const auto supported = [&](int position, DataType first, DataType type, auto format) {
    std::vector<nvinfer1::DynamicPluginTensorDesc> tensors(5, fixed(linear(first, {})));
    tensors[position].desc.type = type;
    tensors[position].desc.format = format;
    return plugin.build->supportsFormatCombination(position, tensors.data(), 4, 1);
  };
  constexpr auto kLinear = nvinfer1::TensorFormat::kLINEAR;
  for (const DataType type : {DataType::kHALF, DataType::kBF16}) {
    for (int i = 0; i < 5; ++i) {
      CHECK(supported(i, type, type, kLinear));
      CHECK(!supported(i, type, DataType::kFLOAT, kLinear));
      CHECK(!supported(i, type, type, nvinfer1::TensorFormat::kHWC8));
    }
  }
  CHECK(!supported(4, DataType::kHALF, DataType::kBF16, kLinear));
  CHECK(plugin.build->getWorkspaceSize(nullptr, 4, nullptr, 1) > 0);
}

void another_tensorrt_is_left_alone(const Plugins& plugins) {
  const auto creators = [&] {
    using Creators = nvinfer1::IPluginCreatorInterface* const*(std::int32_t&);
    std::int32_t count = -1;
    function<Creators>(plugins.handle, "getCreators")(count);
    return count;
  };
  for (const int version : {8601, NV_TENSORRT_MAJOR == 10 ? 110100 : 101300, 120000}) {
    tensorrt_version = version;
    CHECK(creators() == 0);
  }
  CHECK(log_.take().empty());  // its logger might have another layout
  tensorrt_version = 10701;    // TensorRT-RTX
  CHECK(creators() == (NV_TENSORRT_MAJOR >= 11 ? 2 : 0));
  tensorrt_version = NV_TENSORRT_VERSION;
  CHECK(creators() == 2);
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 2) stop("usage: arrowhead_trt_test LIBRARY");
  const Plugins plugins(arguments[1], &finder);
  creators(plugins);
  fields_are_checked(plugins);
  plugins_survive_an_engine(plugins);
  timing_ids(plugins);
  tensors_are_checked(plugins);
  formats(plugins);
  another_tensorrt_is_left_alone(plugins);
  CHECK(log_.take().empty());
  std::printf("%d failures\n", failures);
  return failures != 0;
}
