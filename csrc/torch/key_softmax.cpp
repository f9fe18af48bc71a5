// CPU tensors in, the torch-free kernels underneath, torch's own thread pool across rows.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <limits>
#include <tuple>
#include <vector>

#include "../jobs/key_softmax.h"
#include "products.h"
#include "rows.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

void run_panel(const sslk::KeySoftmaxPanel& panel) {
  sslk::over_rows(panel.rows, panel.cols, [&](int64_t begin, int64_t end, sslk::Isa isa) {
    sslk::key_softmax_panel(panel, begin, end, isa);
  });
}

void key_softmax_panel_cpu(Tensor tile, Tensor stats, std::optional<Tensor> mean, double scale) {
  run_panel(sslk::key_softmax_job(tile, stats, mean, scale));
}

// The statistics of the rows where all similarities are one tile, and the keys weighed by their exponentials.
std::tuple<Tensor, Tensor> key_softmax_of_one_tile_cpu(Tensor query, Tensor keys, double scale, bool want_mean) {
  const Tensor tile = sslk::product(query, sslk::transposed(keys));
  const Tensor stats = torch::stable::new_empty(query, {query.size(0), 2}, ScalarType::Double);
  double* data = stats.mutable_data_ptr<double>();
  for (int64_t i = 0; i < query.size(0); ++i) {
    data[2 * i] = -std::numeric_limits<double>::infinity();
    data[2 * i + 1] = 0;
  }
  const Tensor mean = torch::stable::new_zeros(query, {want_mean ? query.size(0) : 0, query.size(1)});
  run_panel(sslk::key_softmax_job(tile, stats, want_mean ? std::optional(mean) : std::nullopt, scale));
  return {stats, want_mean ? sslk::product(tile, keys) : mean};
}

// The data of a matrix of the rows, or null if it has none: then it is not wanted.
void* wanted_data(const Tensor& t, const char* name, sslk::FeatureType type, int64_t rows, int64_t width) {
  return t.size(0) ? sslk::matrix_data(t, name, type, rows, width) : nullptr;
}

void run_rows(sslk::KeySoftmaxRows job, const Tensor& stats, double scale, const Tensor& mean, bool average,
              const Tensor& loss) {
  job.rows = stats.size(0);
  job.width = mean.size(1);
  job.stats = sslk::stats_data(stats, "stats", job.rows, 2);
  job.scale = scale;
  job.mean = static_cast<float*>(wanted_data(mean, "mean", sslk::FeatureType::kFloat32, job.rows, job.width));
  job.unit = average && job.rows > 0 ? 1.0 / double(job.rows) : 1.0;
  std::vector<double> values(job.rows);
  job.values = values.data();
  sslk::over_rows(job.rows, job.width, [&](int64_t begin, int64_t end, sslk::Isa isa) {
    sslk::key_softmax_rows(job, begin, end, isa);
  });
  sslk::reduce_rows(values, average, loss);
}

void key_softmax_rows_cpu(Tensor stats, double scale, Tensor mean, Tensor lse) {
  run_rows({}, stats, scale, mean, false, lse);
}

void info_nce_rows_cpu(Tensor stats, double scale, Tensor query, Tensor positive, bool positive_is_key, bool average,
                       Tensor mean, Tensor loss, Tensor slopes) {
  sslk::KeySoftmaxRows job{};
  job.positive_is_key = positive_is_key;
  job.type = sslk::check_features(query, "query", 2);
  STD_TORCH_CHECK(sslk::check_features(positive, "positive", 2) == job.type, "positive: expected the dtype of query");
  for (const auto& [t, name] : {std::pair(query, "query"), {positive, "positive"}}) {
    sslk::check_size(t, name, 0, stats.size(0));
    sslk::check_size(t, name, 1, mean.size(1));
  }
  job.query = query.const_data_ptr();
  job.query_stride = query.stride(0);
  job.positive = positive.const_data_ptr();
  job.positive_stride = positive.stride(0);
  job.slopes = sslk::output_data(slopes, "slopes", stats.size(0));
  run_rows(job, stats, scale, mean, average, loss);
}

void key_softmax_gradients_cpu(Tensor upstream, std::optional<Tensor> slopes, Tensor query, Tensor pull, double scale,
                               Tensor by_query, Tensor by_positive, Tensor by_scale) {
  sslk::KeySoftmaxGradient job{};
  job.type = sslk::check_features(query, "query", 2);
  job.rows = query.size(0);
  job.width = query.size(1);
  job.query = query.const_data_ptr();
  job.query_stride = query.stride(0);
  const bool scale_too = by_scale.numel() > 0;
  if (by_query.size(0) || scale_too) sslk::check_size(pull, "pull", 0, job.rows);
  job.pull = static_cast<float*>(wanted_data(pull, "pull", sslk::FeatureType::kFloat32, job.rows, job.width));
  job.scale = scale;
  job.upstream = sslk::upstream_data(upstream, job.rows);
  job.upstream_stride = sslk::upstream_stride(upstream);
  job.slopes = sslk::vector_data(slopes, "slopes", job.rows);
  job.by_query = wanted_data(by_query, "by_query", job.type, job.rows, job.width);
  job.by_positive = wanted_data(by_positive, "by_positive", job.type, job.rows, job.width);
  std::vector<double> terms(job.rows);
  if (scale_too) job.by_scale = terms.data();
  sslk::over_rows(job.rows, job.width, [&](int64_t begin, int64_t end, sslk::Isa isa) {
    sslk::key_softmax_gradient(job, begin, end, isa);
  });
  if (scale_too) sslk::reduce_rows(terms, false, by_scale);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ssl_kernels, m) {
  m.def("key_softmax_panel_(Tensor(a!) tile, Tensor(b!) stats, Tensor(c!)? mean, float scale) -> ()");
  m.def(
      "key_softmax_of_one_tile(Tensor query, Tensor keys, float scale, bool want_mean) "
      "-> (Tensor stats, Tensor mean)");
  m.def("key_softmax_rows_(Tensor stats, float scale, Tensor(a!) mean, Tensor(b!) lse) -> ()");
  m.def(
      "info_nce_rows_(Tensor stats, float scale, Tensor query, Tensor positive, bool positive_is_key, bool average, "
      "Tensor(a!) mean, Tensor(b!) loss, Tensor(c!) slopes) -> ()");
  m.def(
      "key_softmax_gradients_(Tensor upstream, Tensor? slopes, Tensor query, Tensor pull, float scale, "
      "Tensor(a!) by_query, Tensor(b!) by_positive, Tensor(c!) by_scale) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(ssl_kernels, CPU, m) {
  m.impl("key_softmax_panel_", TORCH_BOX(&key_softmax_panel_cpu));
  m.impl("key_softmax_of_one_tile", TORCH_BOX(&key_softmax_of_one_tile_cpu));
  m.impl("key_softmax_rows_", TORCH_BOX(&key_softmax_rows_cpu));
  m.impl("info_nce_rows_", TORCH_BOX(&info_nce_rows_cpu));
  m.impl("key_softmax_gradients_", TORCH_BOX(&key_softmax_gradients_cpu));
}
