// launch_attention on the host, in plain loops: libarrowhead_trt_host.so has it in place of the
// kernels, so that what the plugins ask for can be computed, and checked, without a GPU.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <vector>

#include "kernels/launch.h"

namespace arrowhead {
namespace {

float load(Element element, const void* at) {
  return element == Element::kFloat16 ? __half2float(*static_cast<const __half*>(at))
                                      : __bfloat162float(*static_cast<const __nv_bfloat16*>(at));
}

void store(Element element, void* at, float value) {
  if (element == Element::kFloat16) {
    *static_cast<__half*>(at) = __float2half_rn(value);
  } else {
    *static_cast<__nv_bfloat16*>(at) = __float2bfloat16_rn(value);
  }
}

/// One row of one head of one batch row.
struct Row {
  Segment segment;
  int token;
  int batch;
};

char* address(const SegmentViews& views, const Row& row, int head) {
  const TensorView& view = row.segment == Segment::kText ? views.text : views.image;
  const std::int64_t offset =
      row.batch * view.batch_stride + row.token * view.token_stride + head * view.head_stride;
  return static_cast<char*>(view.data) + 2 * offset;
}

struct Problem {
  const AttentionParams& params;
  TokenLayout layout{params.image_tokens, params.text_tokens, params.block};

  std::vector<float> read(const SegmentViews& views, const Row& row, int head) const {
    std::vector<float> values(params.head_dim);
    const char* at = address(views, row, head);
    for (int i = 0; i < params.head_dim; ++i) values[i] = load(params.element, at + 2 * i);
    return values;
  }

  std::vector<float> attend(const Row& row, const HeadTask& task) const {
    const std::vector<float> q = read(params.q, row, task.source);
    std::vector<double> out(params.head_dim);
    double weights = 0;
    for (const Segment segment : {Segment::kText, Segment::kImage}) {
      const Range keys = visible_keys(layout, row.segment, segment, row.token, task.mode);
      for (int token = keys.begin; token < keys.end; ++token) {
        const Row key{segment, token, row.batch};
        const std::vector<float> k = read(params.k, key, task.source);
        const std::vector<float> v = read(params.v, key, task.source);
        double score = 0;
        for (int i = 0; i < params.head_dim; ++i) score += double{q[i]} * k[i];
        const double weight = std::exp(score * params.scale);  // small scores: no maximum needed
        weights += weight;
        for (int i = 0; i < params.head_dim; ++i) out[i] += weight * v[i];
      }
    }
    for (double& value : out) value /= weights;
    return {out.begin(), out.end()};
  }
};

}  // namespace

cudaError_t launch_attention(const AttentionParams& params, cudaStream_t) {
  const Problem problem{params};
  for (int batch = 0; batch < params.batch; ++batch) {
    for (const Segment segment : {Segment::kText, Segment::kImage}) {
      for (int token = 0; token < problem.layout.tokens(segment); ++token) {
        const Row row{segment, token, batch};
        for (int head = 0; head < params.heads; ++head) {
          const HeadTask& task = params.tasks[head];
          const std::vector<float> values = task.mode == kCached
                                                ? problem.read(params.cache, row, task.source)
                                                : problem.attend(row, task);
          char* at = address(params.out, row, head);
          for (int i = 0; i < params.head_dim; ++i) store(params.element, at + 2 * i, values[i]);
        }
      }
    }
  }
  return cudaSuccess;
}

}  // namespace arrowhead
