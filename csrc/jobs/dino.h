// Arguments of DINO's cross-entropy, checked and as its kernel takes them.
#pragma once

#include <vector>

#include "../checks.h"
#include "../cpu/dino.h"

namespace sslk {

// The crops of blocks [n, samples, width], one after the other.
template <typename Tensor>
std::vector<Crop> crops_of(const std::vector<Tensor>& blocks, const char* name, int64_t samples, int64_t width,
                           FeatureType& type) {
  std::vector<Crop> crops;
  for (const Tensor& block : blocks) {
    type = check_features(block, name, 3);
    STD_TORCH_CHECK(block.scalar_type() == blocks[0].scalar_type(), name, ": expected blocks of one dtype");
    check_size(block, name, 1, samples);
    check_size(block, name, 2, width);
    for (int64_t i = 0; i < block.size(0); ++i) {
      const char* data = static_cast<const char*>(block.const_data_ptr());
      crops.push_back({data + i * block.stride(0) * item_size(type), block.stride(1)});
    }
  }
  return crops;
}

// A job with the crops that it points to.
struct DinoJob : Dino {
  std::vector<Crop> ours, theirs;
};

template <typename Tensor>
DinoJob dino_job(const std::vector<Tensor>& students, const std::vector<Tensor>& teachers,
                 const std::optional<Tensor>& center, const std::optional<Tensor>& weights, double student_temp,
                 double teacher_temp, bool distinct, bool teacher_probs, const Tensor& losses,
                 const std::optional<Tensor>& gradient, double scale) {
  STD_TORCH_CHECK(!students.empty() && !teachers.empty(), "students, teachers: expected at least one block each");
  STD_TORCH_CHECK(students[0].dim() == 3, "students: expected 3 dimensions, got ", students[0].dim());
  DinoJob job{};
  job.samples = students[0].size(1);
  job.width = students[0].size(2);
  job.ours = crops_of(students, "students", job.samples, job.width, job.student_type);
  job.theirs = crops_of(teachers, "teachers", job.samples, job.width, job.teacher_type);
  job.students = job.ours.data();
  job.n_students = job.ours.size();
  job.teachers = job.theirs.data();
  job.n_teachers = job.theirs.size();
  STD_TORCH_CHECK(job.n_teachers > 0, "teachers: expected at least one crop");
  job.center = vector_data(center, "center", job.width);
  job.weights = vector_data(weights, "weights", job.samples);
  job.student_scale = float(1 / student_temp);
  job.teacher_scale = float(1 / teacher_temp);
  job.distinct = distinct;
  job.teacher_probs = teacher_probs;
  job.losses = output_data(losses, "losses", job.samples);
  if (gradient) {
    check_tensor(*gradient, "gradient", students[0].scalar_type(), 3);
    check_size(*gradient, "gradient", 0, job.n_students);
    check_size(*gradient, "gradient", 1, job.samples);
    check_size(*gradient, "gradient", 2, job.width);
    check_contiguous(*gradient, "gradient");
    job.gradient = gradient->mutable_data_ptr();
    // In half precision there is no room for 1 / temperature.
    job.gradient_scale = float(job.student_type == FeatureType::kFloat16 ? scale : scale / student_temp);
    job.stream_gradient = gradient->numel() * item_size(job.student_type) > 16 << 20;
  }
  return job;
}

}  // namespace sslk
