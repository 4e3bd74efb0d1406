// HeadNorm and HeadRotary on the CPU provider, in fp32: a row of D at a time.
#include <cmath>

#include "parallel.h"
#include "row_op.h"

namespace arrowhead::ort {
namespace {

inline float widen(float x) { return x; }
inline float widen(Ort::Float16_t x) { return x.ToFloat(); }

template <class Element>
struct OnCpu {
  static constexpr const char* kProvider = "CPUExecutionProvider";
  static constexpr ONNXTensorElementDataType kType = Ort::TypeToTensorType<Element>::type;

  /// Call each(row, x, out) for every row of heads, counted in its order.
  template <class Each>
  static void each_row(const Rows& rows, Ort::KernelContext& context, Each each) {
    const auto* x = context.GetInput(0).template GetTensorData<Element>();
    auto* out = context.GetOutput(0, rows.shape).template GetTensorMutableData<Element>();
    const std::int64_t dim = rows.head_dim();
    const std::int64_t count = rows.shape[0] * rows.tokens() * rows.heads();
    parallel_each(context, static_cast<std::size_t>(count), [&](std::size_t row) {
      each(static_cast<std::int64_t>(row), x + row * dim, out + row * dim);
    });
  }
};

template <class Element>
class CpuNorm : public HeadNorm, public OnCpu<Element> {
 public:
  explicit CpuNorm(const OrtKernelInfo* info)
      : epsilon_(Ort::ConstKernelInfo{info}.GetAttribute<float>("epsilon")) {}

  void compute(Ort::KernelContext& context) const {
    const Rows rows(context);
    const Ort::ConstValue value = rows.weight(context);
    const auto* weight = value.template GetTensorData<Element>();
    const std::int64_t dim = rows.head_dim();
    this->each_row(rows, context, [&](std::int64_t, const Element* x, Element* out) {
      float sum = 0.0f;
      for (std::int64_t d = 0; d < dim; ++d) sum += widen(x[d]) * widen(x[d]);
      const float inverse = 1.0f / std::sqrt(sum / static_cast<float>(dim) + epsilon_);
      for (std::int64_t d = 0; d < dim; ++d) {
        out[d] = Element(widen(x[d]) * inverse * widen(weight[d]));
      }
    });
  }

 private:
  float epsilon_;
};

template <class Element>
class CpuRotary : public HeadRotary, public OnCpu<Element> {
 public:
  explicit CpuRotary(const OrtKernelInfo*) {}

  void compute(Ort::KernelContext& context) const {
    const Rows rows(context);
    const float* cosines = rows.table(context, 1);
    const float* sines = rows.table(context, 2);
    const std::int64_t dim = rows.head_dim();
    this->each_row(rows, context, [&](std::int64_t row, const Element* x, Element* out) {
      const std::int64_t entry = row / rows.heads() % rows.tokens() * dim;
      const float* cos = cosines + entry;
      const float* sin = sines + entry;
      for (std::int64_t d = 0; d + 1 < dim; d += 2) {
        const float a = widen(x[d]);
        const float b = widen(x[d + 1]);
        out[d] = Element(a * cos[d] - b * sin[d]);
        out[d + 1] = Element(b * cos[d + 1] + a * sin[d + 1]);
      }
    });
  }
};

}  // namespace

void add_cpu_row_operators(Ort::CustomOpDomain& domain) {
  domain.Add(new RowOp<CpuNorm<float>>);
  domain.Add(new RowOp<CpuNorm<Ort::Float16_t>>);
  domain.Add(new RowOp<CpuRotary<float>>);
  domain.Add(new RowOp<CpuRotary<Ort::Float16_t>>);
}

}  // namespace arrowhead::ort
