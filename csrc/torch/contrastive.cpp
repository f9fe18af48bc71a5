// CPU tensors in, torch's own thread pool across rows.
#include "../cpu/contrastive.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../checks.h"
#include "contrastive.h"
#include "parallel.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

float* scalar(const Tensor& t, const char* name) {
  sslk::check_tensor(t, name, ScalarType::Float, 0);
  return t.mutable_data_ptr<float>();
}

void finish(const Tensor& sums, double factor, const Tensor& gradient) {
  sslk::check_tensor(sums, "dx, dy", ScalarType::Float, 2);
  sslk::Gradient g{};
  g.sums = sums.const_data_ptr<float>();
  g.rows = sums.size(0);
  g.width = sums.size(1);
  g.row_stride = sums.stride(0);
  g.col_stride = sums.stride(1);
  g.factor = static_cast<float>(factor);
  g.type = sslk::feature_type(gradient, "gradients");
  STD_TORCH_CHECK(gradient.is_contiguous() && gradient.numel() == sums.numel(),
                  "gradients: expected a contiguous tensor of ", sums.numel(), " elements");
  g.out = gradient.mutable_data_ptr();
  sslk::over_rows(g.rows, g.width, [&](int64_t begin, int64_t end, sslk::Isa isa) {
    sslk::finish_gradient(g, begin, end, isa);
  });
}

// scalars: the derivatives by scale and bias, and the unit of all.
void finish_gradients_cpu(std::optional<Tensor> upstream, Tensor scale, Tensor scalars, Tensor dx, Tensor dy,
                          Tensor x_gradient, Tensor y_gradient, Tensor scale_gradient, Tensor bias_gradient) {
  sslk::check_vector(scalars, "scalars", 3);
  const float* derivatives = scalars.const_data_ptr<float>();
  const double shared = double(upstream ? *scalar(*upstream, "upstream") : 1) * derivatives[2];
  finish(dx, shared * *scalar(scale, "scale"), x_gradient);
  finish(dy, shared * *scalar(scale, "scale"), y_gradient);
  *scalar(scale_gradient, "scale_gradient") = static_cast<float>(shared * derivatives[0]);
  *scalar(bias_gradient, "bias_gradient") = static_cast<float>(shared * derivatives[1]);
}

}  // namespace

void sslk::weighted_sums(Tensor stats, std::optional<Tensor> row_weight, double divisor, Tensor loss, Tensor scalars) {
  check_tensor(stats, "stats", ScalarType::Double, 2);
  check_contiguous(stats, "stats");
  const int64_t rows = stats.size(0), width = stats.size(1);
  STD_TORCH_CHECK(width <= 3, "stats: expected at most 3 columns, got ", width);
  const float* weight = vector_data(row_weight, "row_weight", rows);
  const double* data = stats.const_data_ptr<double>();
  double sums[3] = {};
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t k = 0; k < width; ++k) sums[k] += data[row * width + k] * (weight ? double(weight[row]) : 1);
  }
  *::scalar(loss, "loss") = static_cast<float>(sums[0] / divisor);
  float* out = output_data(scalars, "scalars", 3);
  out[0] = static_cast<float>(sums[1]);
  out[1] = static_cast<float>(sums[2]);
  out[2] = static_cast<float>(1 / (divisor > 1 ? divisor : 1));
}

STABLE_TORCH_LIBRARY_FRAGMENT(ssl_kernels, m) {
  m.def(
      "finish_gradients_(Tensor? upstream, Tensor scale, Tensor scalars, Tensor dx, Tensor dy, "
      "Tensor(a!) x_gradient, Tensor(b!) y_gradient, Tensor(c!) scale_gradient, Tensor(d!) bias_gradient) -> ()");
  m.def(
      "weighted_sums_(Tensor stats, Tensor? row_weight, float divisor, Tensor(a!) loss, Tensor(b!) scalars) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(ssl_kernels, CPU, m) {
  m.impl("finish_gradients_", TORCH_BOX(&finish_gradients_cpu));
  m.impl("weighted_sums_", TORCH_BOX(&sslk::weighted_sums));
}
