// Both attentions on the CPU provider, on ONNX Runtime's own threads.
//
// The arithmetic is fp32. An fp16 call is converted at its border: ONNX Runtime's CPU provider
// does the same around most of its own operators.
#include <algorithm>
#include <atomic>
#include <memory>
#include <new>
#include <utility>

#include "../cpu/attention.h"
#include "custom_op.h"
#include "parallel.h"

namespace arrowhead::ort {
namespace {

void run(const Ort::KernelContext& context, const cpu::Attention& attention) {
  // Workers take tickets until none is left, as the CUDA kernel's CTAs do: tickets differ in cost.
  const int workers = min_of(attention.tickets(), max_workers());
  const std::size_t floats = attention.scratch_floats();
  const std::unique_ptr<float[]> scratch(new float[floats * workers]);
  std::atomic<int> next{0};
  parallel(context, workers, [&](std::size_t worker) {
    for (int ticket = next++; ticket < attention.tickets(); ticket = next++) {
      attention.run(ticket, scratch.get() + worker * floats);
    }
  });
}

/// A tensor as fp32: itself, or a converted copy.
class Floats {
 public:
  Floats(const Ort::KernelContext&, const float* data, std::size_t) : data_(data) {}

  Floats(const Ort::KernelContext& context, const Ort::Float16_t* data, std::size_t size)
      : copy_(new float[size]), data_(copy_.get()) {
    parallel_each(context, size, [&](std::size_t i) { copy_[i] = data[i].ToFloat(); });
  }

  const float* data() const { return data_; }

 private:
  std::unique_ptr<float[]> copy_;
  const float* data_;
};

template <class Element>
class CpuAttention {
 public:
  static constexpr const char* kProvider = "CPUExecutionProvider";
  static constexpr ONNXTensorElementDataType kType = Ort::TypeToTensorType<Element>::type;

  explicit CpuAttention(Attributes attributes) : attributes_(std::move(attributes)) {}

  void compute(Ort::KernelContext& context) const {
    const Call call(attributes_, context);
    Element* out = context.GetOutput(0, call.shape(call.heads))
                       .template GetTensorMutableData<Element>();
    if (call.batch == 0 || call.seq_len() == 0) return;
    const auto input = [&](std::size_t index) {
      const Ort::ConstValue value = context.GetInput(index);
      return Floats(context, value.GetTensorData<Element>(),
                    value.GetTensorTypeAndShapeInfo().GetElementCount());
    };
    const Floats q = input(0);
    const Floats k = input(1);
    const Floats v = input(2);
    cpu::AttentionParams params{};
    params.layout = call.layout;
    params.text_first = attributes_.text_first;
    params.batch = call.batch;
    params.heads = call.heads;
    params.qkv_heads = call.qkv_heads;
    params.cache_heads = call.cache_heads;
    params.head_dim = call.head_dim;
    params.scale = attributes_.scale;
    params.q = q.data();
    params.k = k.data();
    params.v = v.data();
    std::copy(call.tasks, call.tasks + call.heads, params.tasks);
    if (call.cache_heads == 0) {
      attend(context, params, out);
    } else {
      const Floats cache = input(3);
      params.cache = cache.data();
      attend(context, params, out);
    }
  }

 private:
  static void attend(const Ort::KernelContext& context, cpu::AttentionParams& params, float* out) {
    params.out = out;
    run(context, cpu::Attention(params));
  }

  static void attend(const Ort::KernelContext& context, cpu::AttentionParams& params,
                     Ort::Float16_t* out) {
    const std::size_t tokens = params.layout.image_tokens + params.layout.text_tokens;
    const std::size_t size = tokens * params.batch * params.heads * params.head_dim;
    const std::unique_ptr<float[]> wide(new float[size]);
    attend(context, params, wide.get());
    parallel_each(context, size, [&](std::size_t i) { out[i] = Ort::Float16_t(wide[i]); });
  }

  Attributes attributes_;
};

}  // namespace

void add_cpu_operators(Ort::CustomOpDomain& domain) {
  add_operators<CpuAttention<float>>(domain);
  add_operators<CpuAttention<Ort::Float16_t>>(domain);
}

}  // namespace arrowhead::ort
