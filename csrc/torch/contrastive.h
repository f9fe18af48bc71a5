// What follows the tiles of a contrastive loss, for more than one op's shell.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

namespace sslk {

// loss = sum_i row_weight_i stats_i0 / divisor; scalars: the same sums of the other columns, if there are any, and one
// over the divisor.
void weighted_sums(torch::stable::Tensor stats, std::optional<torch::stable::Tensor> row_weight, double divisor,
                   torch::stable::Tensor loss, torch::stable::Tensor scalars);

}  // namespace sslk
