// CPU tensors in, the torch-free kernel underneath, torch's own thread pool across samples.
#include "../cpu/dino.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <new>
#include <vector>

#include "../checks.h"
#include "huge_pages.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

// The crops of blocks [n, samples, width], one after the other.
std::vector<sslk::Crop> crops_of(const std::vector<Tensor>& blocks, const char* name, int64_t samples, int64_t width,
                                 sslk::FeatureType& type) {
  std::vector<sslk::Crop> crops;
  for (const Tensor& block : blocks) {
    type = sslk::check_features(block, name, 3);
    STD_TORCH_CHECK(block.scalar_type() == blocks[0].scalar_type(), name, ": expected blocks of one dtype");
    sslk::check_size(block, name, 1, samples);
    sslk::check_size(block, name, 2, width);
    const int64_t item = type == sslk::FeatureType::kFloat32 ? 4 : 2;
    for (int64_t i = 0; i < block.size(0); ++i) {
      crops.push_back({static_cast<const char*>(block.const_data_ptr()) + i * block.stride(0) * item, block.stride(1)});
    }
  }
  return crops;
}

// Samples [begin, end), whose teachers' logits are added to teacher_sum.
void dino_rows_cpu(std::vector<Tensor> students, std::vector<Tensor> teachers, std::optional<Tensor> center,
                   std::optional<Tensor> weights, double student_temp, double teacher_temp, bool distinct,
                   bool teacher_probs, Tensor losses, std::optional<Tensor> gradient, double scale,
                   std::optional<Tensor> teacher_sum, int64_t begin, int64_t end) {
  STD_TORCH_CHECK(!students.empty() && !teachers.empty(), "students, teachers: expected at least one block each");
  STD_TORCH_CHECK(students[0].dim() == 3, "students: expected 3 dimensions, got ", students[0].dim());
  const int64_t samples = students[0].size(1), width = students[0].size(2);
  sslk::check_range(begin, end, samples);
  sslk::Dino job{};
  const std::vector<sslk::Crop> ours = crops_of(students, "students", samples, width, job.student_type);
  const std::vector<sslk::Crop> theirs = crops_of(teachers, "teachers", samples, width, job.teacher_type);
  job.students = ours.data();
  job.n_students = ours.size();
  job.teachers = theirs.data();
  job.n_teachers = theirs.size();
  job.width = width;
  job.center = sslk::vector_data(center, "center", width);
  job.weights = sslk::vector_data(weights, "weights", samples);
  job.student_scale = float(1 / student_temp);
  job.teacher_scale = float(1 / teacher_temp);
  job.distinct = distinct;
  job.teacher_probs = teacher_probs;
  job.losses = sslk::output_data(losses, "losses", samples);
  job.samples = samples;
  if (gradient) {
    sslk::check_tensor(*gradient, "gradient", students[0].scalar_type(), 3);
    sslk::check_size(*gradient, "gradient", 0, job.n_students);
    sslk::check_size(*gradient, "gradient", 1, samples);
    sslk::check_size(*gradient, "gradient", 2, width);
    STD_TORCH_CHECK(gradient->is_contiguous(), "gradient: expected a contiguous tensor");
    job.gradient = gradient->mutable_data_ptr();
    // In half precision there is no room for 1 / temperature.
    job.gradient_scale = float(job.student_type == sslk::FeatureType::kFloat16 ? scale : scale / student_temp);
    job.stream_gradient = gradient->numel() * gradient->element_size() > 16 << 20;
    if (begin == 0) sslk::prefer_huge_pages(*gradient);
  }
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
