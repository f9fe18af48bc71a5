// Arguments of the softmax over frozen keys, checked and as its kernel takes them.
#pragma once

#include "../checks.h"
#include "../cpu/key_softmax.h"

namespace sslk {

template <typename Tensor>
KeySoftmaxPanel key_softmax_job(const Tensor& tile, const Tensor& stats, const std::optional<Tensor>& mean,
                                double scale) {
  check_tile(tile, "tile");
  KeySoftmaxPanel panel{};
  panel.tile = static_cast<float*>(tile.mutable_data_ptr());
  panel.rows = tile.size(0);
  panel.cols = tile.size(1);
  panel.row_stride = tile.stride(0);
  panel.stats = stats_data(stats, "stats", panel.rows, 2);
  if (mean) {
    check_tile(*mean, "mean");
    check_size(*mean, "mean", 0, panel.rows);
    panel.mean = static_cast<float*>(mean->mutable_data_ptr());
    panel.width = mean->size(1);
    panel.mean_stride = mean->stride(0);
  }
  panel.scale = static_cast<float>(scale);
  return panel;
}

}  // namespace sslk
