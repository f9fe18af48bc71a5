// Arguments of the passes of Sinkhorn-Knopp, checked and as their kernels take them.
#pragma once

#include "../checks.h"
#include "../cpu/sinkhorn.h"

namespace sslk {

template <typename Tensor>
Sinkhorn sinkhorn_job(const Tensor& rows, const std::optional<Tensor>& center, double temp) {
  Sinkhorn job{};
  job.type = check_features(rows, "rows", 2);
  job.logits = rows.const_data_ptr();
  job.rows = rows.size(0);
  job.width = rows.size(1);
  job.stride = rows.stride(0);
  job.center = vector_data(center, "center", job.width);
  job.scale = float(1 / temp);
  return job;
}

}  // namespace sslk
