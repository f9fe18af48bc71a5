// CPU tensors in, the torch-free kernel underneath, torch's own thread pool across samples.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <new>
#include <vector>

#include "../jobs/dino.h"
#include "huge_pages.h"

using torch::stable::Tensor;

namespace {

// Samples [begin, end), whose teachers' logits are added to teacher_sum.
void dino_rows_cpu(std::vector<Tensor> students, std::vector<Tensor> teachers, std::optional<Tensor> center,
                   std::optional<Tensor> weights, double student_temp, double teacher_temp, bool distinct,
                   bool teacher_probs, Tensor losses, std::optional<Tensor> gradient, double scale,
                   std::optional<Tensor> teacher_sum, int64_t begin, int64_t end) {
  const auto job = sslk::dino_job(students, teachers, center, weights, student_temp, teacher_temp, distinct,
                                  teacher_probs, losses, gradient, scale);
  sslk::check_range(begin, end, job.samples);
  const int64_t width = job.width;
  if (gradient && begin == 0) sslk::prefer_huge_pages(*gradient);
  float* sum = teacher_sum ? sslk::output_data(*teacher_sum, "teacher_sum", width) : nullptr;

  const sslk::Isa isa = sslk::active_isa();
  const int64_t rows = end - begin, parts = std::min<int64_t>(rows, torch::stable::get_num_threads());
  if (parts == 0) return;
  std::vector<std::unique_ptr<float[]>> scratch(parts);
  for (auto& part : scratch) {
    const int64_t floats = sslk::dino_scratch(job);
    if (floats <= PTRDIFF_MAX / int64_t{sizeof(float)}) part.reset(new (std::nothrow) float[floats]);
    STD_TORCH_CHECK(part, "teachers: not enough memory for the probabilities of ", job.n_teachers, " crops of ", width,
                    " prototypes");
  }
  // The first part adds the teacher's logits to the output, the others to sums of their own.
  std::vector<float> sums(sum ? (parts - 1) * width : 0);
  torch::stable::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
    for (int64_t part = first; part < last; ++part) {
      float* here = part == 0 || !sum ? sum : sums.data() + (part - 1) * width;
      sslk::dino_rows(job, begin + part * rows / parts, begin + (part + 1) * rows / parts, scratch[part].get(), here, isa);
    }
  });
  for (auto from = sums.begin(); from != sums.end(); from += width) {
    std::transform(from, from + width, sum, sum, std::plus<float>());
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ssl_kernels, m) {
  m.def(
      "dino_rows_(Tensor[] students, Tensor[] teachers, Tensor? center, Tensor? weights, float student_temp, "
      "float teacher_temp, bool distinct, bool teacher_probs, Tensor(a!) losses, Tensor(b!)? gradient, float scale, "
      "Tensor(c!)? teacher_sum, int begin, int end) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(ssl_kernels, CPU, m) { m.impl("dino_rows_", TORCH_BOX(&dino_rows_cpu)); }
