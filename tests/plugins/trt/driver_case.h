// A recorded call of one of the operators, as tests/plugins/trt_cases.py writes it: case.txt with a
// name and its values on each line, and one file of raw [B, S, heads, D] for each input.
#pragma once

#include <fstream>
#include <iterator>
#include <map>
#include <sstream>

#include "harness.h"

struct Case {
  bool cached;
  nvinfer1::DataType type;
  harness::Fields fields;
  std::vector<nvinfer1::PluginTensorDesc> inputs;
  nvinfer1::PluginTensorDesc output;
  std::vector<std::string> data;  // bytes of the inputs

  explicit Case(const std::string& folder) : Case(folder, read(folder + "/case.txt")) {}

  static std::size_t bytes(const nvinfer1::PluginTensorDesc& desc) {
    std::size_t size = 2;
    for (int i = 0; i < desc.dims.nbDims; ++i) size *= desc.dims.d[i];
    return size;
  }

 private:
  using Lines = std::map<std::string, std::string>;

  Case(const std::string& folder, const Lines& lines)
      : cached(lines.at("op") == "CachedHead"),
        type(lines.at("dtype") == "float16" ? nvinfer1::DataType::kHALF
                                            : nvinfer1::DataType::kBF16),
        fields(cached) {
    fields.scale = numbers<float>(lines.at("scale")).front();
    fields.text_tokens = numbers<int>(lines.at("text_tokens")).front();
    fields.text_first = numbers<int>(lines.at("text_first")).front();
    fields.block = numbers<int>(lines.at("block")).front();
    fields.half_windows = numbers<int>(lines.at("half_windows"));
    if (cached) fields.source = numbers<int>(lines.at("source"));
    fields.refresh();

    const std::vector<const char*> names{"q", "k", "v", "cache"};
    for (std::size_t i = 0; i < (cached ? 4u : 3u); ++i) {
      inputs.push_back(harness::linear(type, numbers<std::int64_t>(lines.at(names[i]))));
      data.push_back(contents(folder + "/" + names[i] + ".bin"));
      if (data.back().size() != bytes(inputs.back())) {
        harness::stop(folder + ": " + names[i] + ".bin has another size than case.txt says");
      }
    }
    output = inputs[0];
    output.dims.d[2] =
        static_cast<std::int64_t>(cached ? fields.source.size() : fields.half_windows.size());
  }

  static std::string contents(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    if (!file) harness::stop("cannot read " + path);
    return {std::istreambuf_iterator<char>(file), {}};
  }

  static Lines read(const std::string& path) {
    std::istringstream text(contents(path));
    Lines lines;
    for (std::string line; std::getline(text, line);) {
      const std::size_t space = line.find(' ');
      lines[line.substr(0, space)] = line.substr(space + 1);
    }
    return lines;
  }

  template <class Number>
  static std::vector<Number> numbers(const std::string& text) {
    std::istringstream stream(text);
    return {std::istream_iterator<Number>(stream), {}};
  }
};
