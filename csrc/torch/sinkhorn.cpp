// CPU tensors in, the torch-free kernels underneath, torch's own thread pool across columns or rows.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <vector>

#include "../jobs/sinkhorn.h"
#include "huge_pages.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

// Rows [begin, end) as a job of their own.
sslk::Sinkhorn part_of(sslk::Sinkhorn job, int64_t begin, int64_t end) {
  sslk::check_range(begin, end, job.rows);
  job.logits = static_cast<const char*>(job.logits) + begin * job.stride * sslk::item_size(job.type);
  job.rows = end - begin;
  return job;
}

// Rows [begin, end); those before are in maxima and totals already.
void column_lse_cpu(Tensor rows, double temp, Tensor maxima, Tensor totals, int64_t begin, int64_t end) {
  const sslk::Sinkhorn job = part_of(sslk::sinkhorn_job<Tensor>(rows, std::nullopt, temp), begin, end);
  STD_TORCH_CHECK(job.rows > 0, "rows: expected at least 1 row, got 0");
  float* maximum = sslk::output_data(maxima, "maxima", job.width);
  float* total = sslk::output_data(totals, "totals", job.width);
  const sslk::Isa isa = sslk::active_isa();
  // Whole pages of a row, and blocks whose maxima and totals stay in the first-level cache.
  const int64_t block = 1024, blocks = (job.width + block - 1) / block;
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      sslk::sinkhorn_column_lse(job, i * block, std::min((i + 1) * block, job.width), maximum, total, begin > 0, isa);
    }
  });
}

// Adds the sums of rows [begin, end).
void column_sums_cpu(Tensor rows, Tensor center, double temp, Tensor sums, int64_t begin, int64_t end) {
  const sslk::Sinkhorn job = part_of(sslk::sinkhorn_job<Tensor>(rows, center, temp), begin, end);
  float* out = sslk::output_data(sums, "sums", job.width);
  const sslk::Isa isa = sslk::active_isa();
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(job.rows, torch::stable::get_num_threads()));
  // The first part adds to the output, the others to sums of their own.
  std::vector<float> others((parts - 1) * job.width);
  torch::stable::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
    const std::unique_ptr<float[]> scratch(new float[sslk::sinkhorn_scratch(job)]);
    for (int64_t part = first; part < last; ++part) {
      float* here = part == 0 ? out : others.data() + (part - 1) * job.width;
      sslk::sinkhorn_column_sums(job, part * job.rows / parts, (part + 1) * job.rows / parts, scratch.get(), here, isa);
    }
  });
  for (auto from = others.begin(); from != others.end(); from += job.width) {
    std::transform(from, from + job.width, out, out, std::plus<float>());
  }
}

// Rows [begin, end) of both.
void centered_softmax_cpu(Tensor rows, std::optional<Tensor> center, double temp, Tensor out, int64_t begin, int64_t end) {
  const sslk::Sinkhorn job = sslk::sinkhorn_job(rows, center, temp);
  sslk::check_tensor(out, "out", ScalarType::Float, 2);
  sslk::check_size(out, "out", 0, job.rows);
  sslk::check_range(begin, end, job.rows);
  sslk::check_size(out, "out", 1, job.width);
  sslk::check_contiguous(out, "out");
  float* probabilities = out.mutable_data_ptr<float>();
  if (begin == 0) sslk::prefer_huge_pages(out);
  const sslk::Isa isa = sslk::active_isa();
  const int64_t elements_per_task = 16384;
  torch::stable::parallel_for(begin, end, elements_per_task / (job.width > 0 ? job.width : 1) + 1, [&](int64_t first, int64_t last) {
    const std::unique_ptr<float[]> scratch(new float[sslk::sinkhorn_scratch(job)]);
    sslk::centered_softmax(job, first, last, scratch.get(), probabilities, isa);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ssl_kernels, m) {
  m.def("sinkhorn_column_lse_(Tensor rows, float temp, Tensor(a!) maxima, Tensor(b!) totals, int begin, int end) -> ()");
  m.def("sinkhorn_column_sums_(Tensor rows, Tensor center, float temp, Tensor(a!) sums, int begin, int end) -> ()");
  m.def("centered_softmax_(Tensor rows, Tensor? center, float temp, Tensor(a!) out, int begin, int end) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(ssl_kernels, CPU, m) {
  m.impl("sinkhorn_column_lse_", TORCH_BOX(&column_lse_cpu));
  m.impl("sinkhorn_column_sums_", TORCH_BOX(&column_sums_cpu));
  m.impl("centered_softmax_", TORCH_BOX(&centered_softmax_cpu));
}
