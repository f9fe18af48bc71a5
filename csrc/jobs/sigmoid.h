// Arguments of the sigmoid loss, checked and as its kernel takes them.
#pragma once

#include "../checks.h"
#include "../cpu/sigmoid.h"

namespace sslk {

template <typename Tensor>
SigmoidPanel sigmoid_job(const Tensor& tile, const Tensor& stats, double scale, double bias,
                         const std::optional<Tensor>& row_ids, const std::optional<Tensor>& col_ids,
                         bool ignore_same_id, int64_t diagonal, bool write_grad) {
  check_tile(tile, "tile");
  check_tensor(stats, "stats", torch::headeronly::ScalarType::Double, 2);
  STD_TORCH_CHECK(stats.size(1) == 3 || (stats.size(1) == 1 && !write_grad),
                  "stats: expected 3 columns (1 when only the loss is wanted), got ", stats.size(1));
  STD_TORCH_CHECK(row_ids.has_value() == col_ids.has_value(), "row_ids, col_ids: expected both or neither");
  SigmoidPanel panel{};
  panel.rows = tile.size(0);
  panel.cols = tile.size(1);
  panel.tile = static_cast<float*>(tile.mutable_data_ptr());
  panel.row_stride = tile.stride(0);
  panel.stats_width = stats.size(1);
  panel.stats = stats_data(stats, "stats", panel.rows, panel.stats_width);
  panel.scale = static_cast<float>(scale);
  panel.bias = static_cast<float>(bias);
  panel.row_ids = check_ids(row_ids, "row_ids", panel.rows);
  panel.col_ids = check_ids(col_ids, "col_ids", panel.cols);
  panel.ignore_same_id = ignore_same_id;
  panel.diagonal = diagonal;
  panel.write_grad = write_grad;
  return panel;
}

}  // namespace sslk
