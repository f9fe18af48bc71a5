// Matrix products, by torch.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>

namespace sslk {

inline torch::stable::Tensor product(const torch::stable::Tensor& a, const torch::stable::Tensor& b) {
  std::array<StableIValue, 2> stack{torch::stable::detail::from(a), torch::stable::detail::from(b)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<torch::stable::Tensor>(stack[0]);
}

inline torch::stable::Tensor transposed(const torch::stable::Tensor& t) { return torch::stable::transpose(t, 0, 1); }

}  // namespace sslk
