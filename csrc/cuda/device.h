// What every CUDA op's shell needs: where it is registered, its device and stream, launches and their errors.
//
// With SSLK_EMULATED, a host compiler and headers that emulate CUDA make CPU ops of the same sources, in a library of
// their own.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#ifdef SSLK_EMULATED
#define SSLK_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_FRAGMENT(ssl_kernels_emulated, m)
#define SSLK_CUDA_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(ssl_kernels_emulated, CPU, m)
#else
#define SSLK_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_FRAGMENT(ssl_kernels, m)
#define SSLK_CUDA_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(ssl_kernels, CUDA, m)
#endif

namespace sslk {

// The device of a tensor, current for as long as this lives, and its current stream.
#ifdef SSLK_EMULATED
struct Device {
  explicit Device(const torch::stable::Tensor&) {}
  cudaStream_t stream = nullptr;
};

inline bool is_on(const torch::stable::Tensor& t, const torch::stable::Tensor&) { return t.is_cpu(); }
#else
struct Device {
  explicit Device(const torch::stable::Tensor& t) : guard(t.get_device_index()) {
    void* current = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &current));
    stream = static_cast<cudaStream_t>(current);
  }

  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream = nullptr;
};

inline bool is_on(const torch::stable::Tensor& t, const torch::stable::Tensor& other) {
  return t.is_cuda() && other.is_cuda() && t.get_device_index() == other.get_device_index();
}
#endif

inline void check_launch(cudaError_t error, const char* op) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // it is reported here, and by nobody else's check
  STD_TORCH_CHECK(false, op, ": the CUDA kernel was not launched: ", cudaGetErrorString(error));
}

template <typename... Parameters, typename... Arguments>
void launch(const char* op, const Device& device, void (*kernel)(Parameters...), unsigned blocks, unsigned threads,
            const Arguments&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.stream = device.stream;
  check_launch(cudaLaunchKernelEx(&config, kernel, arguments...), op);
}

}  // namespace sslk
