// CPU tensors in, the torch-free kernels underneath, torch's own thread pool across rows.
#include "../cpu/unit_rows.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../checks.h"
#include "rows.h"

using torch::stable::Tensor;

namespace {

// Of the rows of `z`, whose unit rows and norms start at row `first` of those of all.
sslk::UnitRows make_job(const Tensor& z, double eps, const Tensor& unit, const Tensor& norm, int64_t first) {
  sslk::UnitRows job{};
  job.type = sslk::check_features(z, "z", 2);
  job.z = z.const_data_ptr();
  job.rows = z.size(0);
  job.width = z.size(1);
  job.stride = z.stride(0);
  job.eps = static_cast<float>(eps);
  sslk::check_tensor(unit, "unit", torch::headeronly::ScalarType::Float, 2);
  STD_TORCH_CHECK(unit.is_contiguous() && unit.size(1) == job.width && unit.size(0) >= first + job.rows,
                  "unit: expected a contiguous matrix of the rows of z");
  job.norm = sslk::output_data(norm, "norm", unit.size(0)) + first;
  job.unit = unit.mutable_data_ptr<float>() + first * job.width;
  return job;
}

void unit_rows_cpu(std::vector<Tensor> z, double eps, Tensor unit, Tensor norm) {
  int64_t first = 0;
  for (const Tensor& rows : z) {
    const sslk::UnitRows job = make_job(rows, eps, unit, norm, first);
    sslk::over_rows(job.rows, job.width,
                    [&](int64_t begin, int64_t end, sslk::Isa isa) { sslk::unit_rows(job, begin, end, isa); });
    first += rows.size(0);
  }
}

void unit_rows_gradient_cpu(Tensor upstream, Tensor z, Tensor norm, double eps, Tensor gradient) {
  sslk::UnitRows job = make_job(z, eps, upstream, norm, 0);
  STD_TORCH_CHECK(sslk::check_features(gradient, "gradient", 2) == job.type && gradient.is_contiguous() &&
                      gradient.size(0) == job.rows && gradient.size(1) == job.width,
                  "gradient: expected a contiguous tensor of the dtype and shape of z");
  job.gradient = gradient.mutable_data_ptr();
  sslk::over_rows(job.rows, job.width,
                  [&](int64_t begin, int64_t end, sslk::Isa isa) { sslk::unit_rows_gradient(job, begin, end, isa); });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ssl_kernels, m) {
  m.def("unit_rows_(Tensor[] z, float eps, Tensor(a!) unit, Tensor(b!) norm) -> ()");
  m.def("unit_rows_gradient_(Tensor upstream, Tensor z, Tensor norm, float eps, Tensor(a!) gradient) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(ssl_kernels, CPU, m) {
  m.impl("unit_rows_", TORCH_BOX(&unit_rows_cpu));
  m.impl("unit_rows_gradient_", TORCH_BOX(&unit_rows_gradient_cpu));
}
