// The extension module ssl_kernels._native: the torch-free kernels on NumPy arrays, one instruction set at a time.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>

#include "../cpu/dino.h"
#include "../cpu/ema.h"
#include "../cpu/key_softmax.h"
#include "../cpu/koleo.h"
#include "../cpu/queue.h"
#include "../cpu/sigmoid.h"
#include "../cpu/sinkhorn.h"
#include "../cpu/softmax.h"

namespace py = pybind11;

namespace {

template <typename T>
using Array = py::array_t<T>;

std::string shape_of(const py::array& a) { return py::str(a.attr("shape")); }

const int64_t* ids_data(const std::optional<Array<int64_t>>& ids, const char* name, int64_t size) {
  if (!ids) return nullptr;
  if (ids->ndim() != 1 || ids->shape(0) != size || (size > 1 && ids->strides(0) != sizeof(int64_t))) {
    throw py::value_error(std::string(name) + ": expected a contiguous vector of " + std::to_string(size) +
                          " ids, got shape " + shape_of(*ids));
  }
  return ids->data();
}

void check_matrix(const py::array& a, const char* name) {
  const int64_t item = a.itemsize();
  const bool has_layout =
      a.ndim() == 2 && (a.size() == 0 || ((a.shape(1) == 1 || a.strides(1) == item) && a.strides(0) % item == 0 &&
                                          (a.shape(0) == 1 || a.strides(0) >= a.shape(1) * item)));
  if (!has_layout) {
    throw py::value_error(std::string(name) + ": expected a matrix with unit stride along columns and rows that do "
                          "not overlap, got shape " + shape_of(a));
  }
}

int64_t row_stride(const py::array& a) { return a.strides(0) / a.itemsize(); }

sslk::Isa choose_isa(const std::optional<std::string>& name) {
  return name ? sslk::parse_isa(*name) : sslk::active_isa();
}

void sigmoid_panel(Array<float> tile, Array<double> stats, float scale, float bias,
                   std::optional<Array<int64_t>> row_ids, std::optional<Array<int64_t>> col_ids, bool ignore_same_id,
                   int64_t diagonal, bool write_grad, std::optional<std::string> isa) {
  check_matrix(tile, "tile");
  const bool has_width = stats.ndim() == 2 && (stats.shape(1) == 3 || (stats.shape(1) == 1 && !write_grad));
  if (!has_width || stats.shape(0) != tile.shape(0) || !(stats.flags() & py::array::c_style)) {
    throw py::value_error("stats: expected a contiguous [" + std::to_string(tile.shape(0)) +
                          ", 3] array (or 1 column for the loss alone), got shape " + shape_of(stats));
  }
  if (row_ids.has_value() != col_ids.has_value()) {
    throw py::value_error("row_ids, col_ids: expected both or neither");
  }
  sslk::SigmoidPanel panel{};
  panel.tile = tile.mutable_data();
  panel.rows = tile.shape(0);
  panel.cols = tile.shape(1);
  panel.row_stride = row_stride(tile);
  panel.stats = stats.mutable_data();
  panel.stats_width = stats.shape(1);
  panel.scale = scale;
  panel.bias = bias;
  panel.row_ids = ids_data(row_ids, "row_ids", panel.rows);
  panel.col_ids = ids_data(col_ids, "col_ids", panel.cols);
  panel.ignore_same_id = ignore_same_id;
  panel.diagonal = diagonal;
  panel.write_grad = write_grad;
  const sslk::Isa chosen = choose_isa(isa);
  py::gil_scoped_release release;
  sslk::sigmoid_panel(panel, 0, panel.rows, chosen);
}

template <typename T>
const T* vector_data(const Array<T>& a, const char* name, int64_t size) {
  if (a.ndim() != 1 || a.shape(0) != size || !(a.flags() & py::array::c_style)) {
    throw py::value_error(std::string(name) + ": expected a contiguous vector of " + std::to_string(size) +
                          ", got shape " + shape_of(a));
  }
  return a.data();
}

sslk::SoftmaxTile softmax_tile(Array<float>& tile, float scale, const std::optional<Array<int64_t>>& row_ids,
                               const std::optional<Array<int64_t>>& col_ids, bool ignore_same_id, int64_t positive,
                               int64_t excluded) {
  check_matrix(tile, "tile");
  if (scale < 0) throw py::value_error("scale: expected a number >= 0, got " + std::to_string(scale));
  if (row_ids.has_value() != col_ids.has_value()) {
    throw py::value_error("row_ids, col_ids: expected both or neither");
  }
  sslk::SoftmaxTile result{};
  result.raw = tile.mutable_data();
  result.rows = tile.shape(0);
  result.cols = tile.shape(1);
  result.row_stride = row_stride(tile);
  result.scale = scale;
  result.row_ids = ids_data(row_ids, "row_ids", result.rows);
  result.col_ids = ids_data(col_ids, "col_ids", result.cols);
  result.ignore_same_id = ignore_same_id;
  result.positive = positive;
  result.excluded = excluded;
  return result;
}

double* softmax_stats_data(Array<double>& stats, const char* name, int64_t size, bool uniform) {
  const int64_t width = uniform ? sslk::kUniformStats : sslk::kStats;
  if (stats.ndim() != 2 || stats.shape(0) != size || stats.shape(1) != width ||
      !(stats.flags() & py::array::c_style)) {
    throw py::value_error(std::string(name) + ": expected a contiguous [" + std::to_string(size) + ", " +
                          std::to_string(width) + "] array, got shape " + shape_of(stats));
  }
  return stats.mutable_data();
}

void softmax_stats(Array<float> tile, Array<double> row_stats, std::optional<Array<double>> col_stats, float scale,
                   std::optional<Array<int64_t>> row_ids, std::optional<Array<int64_t>> col_ids, bool ignore_same_id,
                   int64_t positive, int64_t excluded, int64_t parts, std::optional<std::string> isa) {
  const sslk::SoftmaxTile pairs = softmax_tile(tile, scale, row_ids, col_ids, ignore_same_id, positive, excluded);
  if (parts < 1) throw py::value_error("parts: expected at least 1, got " + std::to_string(parts));
  const bool uniform = row_stats.ndim() == 2 && row_stats.shape(1) == sslk::kUniformStats;
  double* rows = softmax_stats_data(row_stats, "row_stats", pairs.rows, uniform);
  double* cols = col_stats ? softmax_stats_data(*col_stats, "col_stats", pairs.cols, uniform) : nullptr;
  const sslk::Isa chosen = choose_isa(isa);
  py::gil_scoped_release release;
  sslk::SoftmaxStats stats(pairs, rows, cols, uniform);
  for (int64_t part = 0; part < parts; ++part) {
    stats.add_rows(stats.chunks() * part / parts, stats.chunks() * (part + 1) / parts, chosen);
  }
  const int64_t group = 64, groups = (pairs.cols + group - 1) / group;  // of columns: whole vectors
  for (int64_t part = 0; cols && part < parts; ++part) {
    const int64_t begin = groups * part / parts * group, end = groups * (part + 1) / parts * group;
    stats.add_columns(begin, end < pairs.cols ? end : pairs.cols, chosen);
  }
}

void softmax_grad(Array<float> tile, Array<double> stats, float scale, Array<float> row_top, Array<float> col_top,
                  Array<float> row_log_sum, Array<float> col_log_sum, Array<float> row_weight,
                  Array<float> col_weight, Array<float> row_target, Array<float> col_target,
                  std::optional<Array<float>> row_uniform, std::optional<Array<float>> col_uniform,
                  std::optional<Array<int64_t>> row_ids, std::optional<Array<int64_t>> col_ids, bool ignore_same_id,
                  int64_t positive, int64_t excluded, bool write, std::optional<std::string> isa) {
  if (row_uniform.has_value() != col_uniform.has_value()) {
    throw py::value_error("row_uniform, col_uniform: expected both or neither");
  }
  sslk::SoftmaxGrad grad{};
  grad.tile = softmax_tile(tile, scale, row_ids, col_ids, ignore_same_id, positive, excluded);
  const int64_t rows = grad.tile.rows, cols = grad.tile.cols;
  vector_data(stats, "stats", rows);
  grad.stats = stats.mutable_data();
  grad.row = {vector_data(row_top, "row_top", rows), vector_data(row_log_sum, "row_log_sum", rows),
              vector_data(row_weight, "row_weight", rows), vector_data(row_target, "row_target", rows),
              row_uniform ? vector_data(*row_uniform, "row_uniform", rows) : nullptr};
  grad.col = {vector_data(col_top, "col_top", cols), vector_data(col_log_sum, "col_log_sum", cols),
              vector_data(col_weight, "col_weight", cols), vector_data(col_target, "col_target", cols),
              col_uniform ? vector_data(*col_uniform, "col_uniform", cols) : nullptr};
  grad.write = write;
  const sslk::Isa chosen = choose_isa(isa);
  py::gil_scoped_release release;
  sslk::softmax_grad(grad, 0, rows, chosen);
}

void key_softmax_panel(Array<float> tile, Array<double> stats, std::optional<Array<float>> mean, float scale,
                       std::optional<std::string> isa) {
  check_matrix(tile, "tile");
  if (stats.ndim() != 2 || stats.shape(0) != tile.shape(0) || stats.shape(1) != 2 ||
      !(stats.flags() & py::array::c_style)) {
    throw py::value_error("stats: expected a contiguous [" + std::to_string(tile.shape(0)) + ", 2] array, got shape " +
                          shape_of(stats));
  }
  sslk::KeySoftmaxPanel panel{};
  panel.tile = tile.mutable_data();
  panel.rows = tile.shape(0);
  panel.cols = tile.shape(1);
  panel.row_stride = row_stride(tile);
  panel.stats = stats.mutable_data();
  if (mean) {
    check_matrix(*mean, "mean");
    if (mean->shape(0) != panel.rows) {
      throw py::value_error("mean: expected " + std::to_string(panel.rows) + " rows, got shape " + shape_of(*mean));
    }
    panel.mean = mean->mutable_data();
    panel.width = mean->shape(1);
    panel.mean_stride = row_stride(*mean);
  }
  panel.scale = scale;
  const sslk::Isa chosen = choose_isa(isa);
  py::gil_scoped_release release;
  sslk::key_softmax_panel(panel, 0, panel.rows, chosen);
}

void koleo_panel(Array<float> tile, Array<float> best, Array<int64_t> neighbor, int64_t first_row, int64_t first_col,
                 std::optional<std::string> isa) {
  check_matrix(tile, "tile");
  const int64_t size = best.size(), rows = tile.shape(0), cols = tile.shape(1);
  vector_data(best, "best", size);
  vector_data(neighbor, "neighbor", size);
  if (rows > INT32_MAX || cols > INT32_MAX) {
    throw py::value_error("tile: expected at most 2**31 - 1 rows and columns, got shape " + shape_of(tile));
  }
  for (const auto& [name, first, count] : {std::tuple{"first_row", first_row, rows}, {"first_col", first_col, cols}}) {
    if (first < 0 || first > size - count) {
      throw py::value_error(std::string(name) + ": expected 0 to " + std::to_string(size - count) + ", got " +
                            std::to_string(first));
    }
  }
  const auto side = [&](int64_t first) {
    return sslk::KoleoSide{best.mutable_data() + first, neighbor.mutable_data() + first, first};
  };
  const sslk::KoleoPanel panel{tile.mutable_data(), rows, cols, row_stride(tile), side(first_row), side(first_col)};
  const sslk::Isa chosen = choose_isa(isa);
  py::gil_scoped_release release;
  sslk::koleo_rows(panel, 0, rows, chosen);
  if (first_row != first_col) sslk::koleo_columns(panel, 0, cols, chosen);
}

sslk::FeatureType feature_type(const py::array& a, const char* name) {
  const std::string dtype = py::str(a.dtype());
  if (dtype == "float32") return sslk::FeatureType::kFloat32;
  if (dtype == "float16") return sslk::FeatureType::kFloat16;
  if (dtype == "uint16") return sslk::FeatureType::kBFloat16;
  throw py::type_error(std::string(name) + ": expected dtype float32, float16 or uint16 (bits of bfloat16), got " +
                       dtype);
}

int64_t enqueue(py::array queue, int64_t pointer, py::array keys, bool normalize, std::optional<std::string> isa) {
  check_matrix(queue, "queue");
  check_matrix(keys, "keys");
  if (queue.shape(0) == 0) throw py::value_error("queue: expected at least 1 row, got 0");
  if (keys.shape(1) != queue.shape(1)) {
    throw py::value_error("keys: expected " + std::to_string(queue.shape(1)) + " columns as queue has, got shape " +
                          shape_of(keys));
  }
  sslk::Enqueue job{};
  job.queue_type = feature_type(queue, "queue");
  job.keys_type = feature_type(keys, "keys");
  job.queue = queue.mutable_data();
  job.size = queue.shape(0);
  job.queue_stride = row_stride(queue);
  job.keys = keys.data();
  job.keys_stride = row_stride(keys);
  job.width = queue.shape(1);
  job.start = (pointer % job.size + job.size) % job.size;
  job.normalize = normalize;
  const int64_t batch = keys.shape(0);
  const sslk::Isa chosen = choose_isa(isa);
  py::gil_scoped_release release;
  sslk::enqueue_rows(job, batch > job.size ? batch - job.size : 0, batch, chosen);
  return (job.start + batch) % job.size;
}

void check_size(const py::array& a, const char* name, int64_t size) {
  if (a.size() != size || !(a.flags() & py::array::c_style)) {
    throw py::value_error(std::string(name) + ": expected a contiguous array of " + std::to_string(size) +
                          " elements, got shape " + shape_of(a));
  }
}

void ema_update(std::vector<py::array> targets, std::vector<py::array> sources, double momentum,
                std::optional<std::vector<std::optional<py::array>>> copies, int64_t parts,
                std::optional<std::string> isa) {
  if (sources.size() != targets.size() || (copies && copies->size() != targets.size())) {
    throw py::value_error("sources, copies: expected " + std::to_string(targets.size()) + " arrays as targets has");
  }
  if (!(momentum >= 0 && momentum <= 1)) {
    throw py::value_error("momentum: expected a number in [0, 1], got " + std::to_string(momentum));
  }
  if (parts < 1) throw py::value_error("parts: expected at least 1, got " + std::to_string(parts));
  std::vector<sslk::EmaTensor> tensors;
  for (size_t i = 0; i < targets.size(); ++i) {
    sslk::EmaTensor t{};
    t.size = targets[i].size();
    check_size(targets[i], "targets", t.size);
    t.target_type = feature_type(targets[i], "targets");
    t.target = targets[i].mutable_data();
    check_size(sources[i], "sources", t.size);
    t.source_type = feature_type(sources[i], "sources");
    t.source = sources[i].data();
    if (copies && (*copies)[i]) {
      py::array& copy = *(*copies)[i];
      check_size(copy, "copies", t.size);
      t.copy_type = feature_type(copy, "copies");
      t.copy = copy.mutable_data();
    }
    tensors.push_back(t);
  }
  const sslk::Isa chosen = choose_isa(isa);
  py::gil_scoped_release release;
  const sslk::Ema ema(std::move(tensors), momentum);
  for (int64_t part = 0; part < parts; ++part) {
    ema.update(ema.blocks() * part / parts, ema.blocks() * (part + 1) / parts, chosen);
  }
}

// Crops of a contiguous array [crops, samples, width].
std::vector<sslk::Crop> crops_of(const py::array& a, const char* name) {
  if (a.ndim() != 3 || !(a.flags() & py::array::c_style)) {
    throw py::value_error(std::string(name) + ": expected a contiguous [crops, samples, width] array, got shape " +
                          shape_of(a));
  }
  std::vector<sslk::Crop> crops;
  for (int64_t i = 0; i < a.shape(0); ++i) crops.push_back({a.size() ? a.data(i) : nullptr, a.shape(2)});
  return crops;
}

const float* optional_data(const std::optional<Array<float>>& a, const char* name, int64_t size) {
  return a ? vector_data(*a, name, size) : nullptr;
}

py::tuple dino(py::array students, py::array teachers, std::optional<Array<float>> center,
               std::optional<Array<float>> weights, float student_temp, float teacher_temp, bool distinct,
               bool teacher_probs, bool stream_gradient, std::optional<std::string> isa) {
  const std::vector<sslk::Crop> ours = crops_of(students, "students"), theirs = crops_of(teachers, "teachers");
  const int64_t samples = students.shape(1), width = students.shape(2);
  if (teachers.shape(0) == 0 || teachers.shape(1) != samples || teachers.shape(2) != width) {
    throw py::value_error("teachers: expected the samples and width of students, got shape " + shape_of(teachers));
  }
  Array<float> losses(samples), teacher_sum(width);
  std::fill_n(teacher_sum.mutable_data(), width, 0.f);
  py::array gradient(students.dtype(), std::vector<py::ssize_t>(students.shape(), students.shape() + 3));
  sslk::Dino job{};
  job.students = ours.data();
  job.n_students = ours.size();
  job.student_type = feature_type(students, "students");
  job.teachers = theirs.data();
  job.n_teachers = theirs.size();
  job.teacher_type = feature_type(teachers, "teachers");
  job.width = width;
  job.center = optional_data(center, "center", width);
  job.weights = optional_data(weights, "weights", samples);
  job.student_scale = 1 / student_temp;
  job.teacher_scale = 1 / teacher_temp;
  job.distinct = distinct;
  job.teacher_probs = teacher_probs;
  job.losses = losses.mutable_data();
  job.gradient = gradient.mutable_data();
  job.stream_gradient = stream_gradient;
  job.samples = samples;
  job.gradient_scale = 1 / student_temp;
  float* sum = teacher_sum.mutable_data();
  const sslk::Isa chosen = choose_isa(isa);
  {
    py::gil_scoped_release release;
    std::vector<float> scratch(sslk::dino_scratch(job));
    sslk::dino_rows(job, 0, samples, scratch.data(), sum, chosen);
  }
  return py::make_tuple(losses, gradient, teacher_sum);
}

sslk::Sinkhorn sinkhorn_job(const py::array& rows, const std::optional<Array<float>>& center, float temp) {
  check_matrix(rows, "rows");
  sslk::Sinkhorn job{};
  job.type = feature_type(rows, "rows");
  job.logits = rows.data();
  job.rows = rows.shape(0);
  job.width = rows.shape(1);
  job.stride = row_stride(rows);
  job.center = optional_data(center, "center", job.width);
  job.scale = 1 / temp;
  return job;
}

py::tuple sinkhorn_column_lse(py::array rows, float temp, std::optional<std::string> isa) {
  const sslk::Sinkhorn job = sinkhorn_job(rows, std::nullopt, temp);
  if (job.rows == 0) throw py::value_error("rows: expected at least 1 row, got 0");
  Array<float> maxima(job.width), totals(job.width);
  sslk::sinkhorn_column_lse(job, 0, job.width, maxima.mutable_data(), totals.mutable_data(), false, choose_isa(isa));
  return py::make_tuple(maxima, totals);
}

Array<float> sinkhorn_column_sums(py::array rows, std::optional<Array<float>> center, float temp,
                                  std::optional<std::string> isa) {
  const sslk::Sinkhorn job = sinkhorn_job(rows, center, temp);
  Array<float> sums(job.width);
  std::fill_n(sums.mutable_data(), job.width, 0.f);
  std::vector<float> scratch(sslk::sinkhorn_scratch(job));
  sslk::sinkhorn_column_sums(job, 0, job.rows, scratch.data(), sums.mutable_data(), choose_isa(isa));
  return sums;
}

Array<float> centered_softmax(py::array rows, std::optional<Array<float>> center, float temp,
                              std::optional<std::string> isa) {
  const sslk::Sinkhorn job = sinkhorn_job(rows, center, temp);
  Array<float> out({job.rows, job.width});
  std::vector<float> scratch(sslk::sinkhorn_scratch(job));
  sslk::centered_softmax(job, 0, job.rows, scratch.data(), out.mutable_data(), choose_isa(isa));
  return out;
}

py::dict build_info() {
  py::dict info;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "gcc " __VERSION__;
#endif
#if SSLK_X86
  info["architecture"] = "x86_64";
  info["compiled_isas"] = std::vector<std::string>{"baseline", "avx2", "avx512"};
#else
  info["architecture"] = "portable";
  info["compiled_isas"] = std::vector<std::string>{"baseline"};
#endif
  std::vector<std::string> available;
  for (sslk::Isa isa : sslk::available_isas()) available.push_back(sslk::isa_name(isa));
  info["available_isas"] = available;
  info["active_isa"] = sslk::isa_name(sslk::active_isa());
  return info;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "The kernels of ssl_kernels on NumPy arrays, without torch.";
  m.def("build_info", &build_info, "Compiler, architecture and instruction sets of this build.");
  m.def("sigmoid_panel", &sigmoid_panel, py::arg("tile").noconvert(), py::arg("stats").noconvert(), py::arg("scale"),
        py::arg("bias"), py::arg("row_ids").noconvert() = py::none(), py::arg("col_ids").noconvert() = py::none(),
        py::arg("ignore_same_id") = false, py::arg("diagonal") = 0, py::arg("write_grad") = true,
        py::arg("isa") = py::none(),
        R"(Sigmoid contrastive loss over one tile of raw similarities, in place.

tile [m, n] float32: x_i . y_j on entry, d loss / d (scale * x_i . y_j + bias) on return (if write_grad).
stats [m, 3] float64: per-row sums of the loss, of G * raw and of G are added; with one column, only the loss.
row_ids [m], col_ids [n] int64: equal ids are positives, or left out of the sum with ignore_same_id.
diagonal: (i, i + diagonal) is always positive.
isa: "baseline", "avx2" or "avx512"; the active one by default.)");
  m.def("softmax_stats", &softmax_stats, py::arg("tile").noconvert(), py::arg("row_stats").noconvert(),
        py::arg("col_stats").noconvert().none(true), py::arg("scale"), py::arg("row_ids").noconvert() = py::none(),
        py::arg("col_ids").noconvert() = py::none(), py::arg("ignore_same_id") = false, py::arg("positive") = 0,
        py::arg("excluded") = sslk::kNoDiagonal, py::arg("parts") = 1, py::arg("isa") = py::none(),
        R"(Statistics of the rows and columns of one tile of raw similarities, for a softmax over either.

tile [m, n] float32: x_i . y_j, unchanged. z = scale * tile, scale >= 0.
row_stats [m, 4] and col_stats [n, 4] float64, or None for no columns: what other tiles gave to the maximum of x_i . y_j
    and to the sum of exp(scale * (x_i . y_j - maximum)), over the pairs that count, and to the sum of x_i . y_j over
    positives and their number; start from -inf, 0, 0, 0. With 6 columns, then the sum over all pairs that count and their number.
row_ids [m], col_ids [n] int64: equal ids are positives, or left out with ignore_same_id.
positive, excluded: (i, i + positive) is a positive pair, (i, i + excluded) is left out; out of range for none.
parts: in how many steps to take rows and columns; the result is the same.)");
  m.def("softmax_grad", &softmax_grad, py::arg("tile").noconvert(), py::arg("stats").noconvert(), py::arg("scale"),
        py::arg("row_top").noconvert(), py::arg("col_top").noconvert(), py::arg("row_log_sum").noconvert(),
        py::arg("col_log_sum").noconvert(), py::arg("row_weight").noconvert(), py::arg("col_weight").noconvert(),
        py::arg("row_target").noconvert(), py::arg("col_target").noconvert(),
        py::arg("row_uniform").noconvert() = py::none(), py::arg("col_uniform").noconvert() = py::none(),
        py::arg("row_ids").noconvert() = py::none(), py::arg("col_ids").noconvert() = py::none(),
        py::arg("ignore_same_id") = false, py::arg("positive") = 0, py::arg("excluded") = sslk::kNoDiagonal,
        py::arg("write") = true, py::arg("isa") = py::none(),
        R"(Gradient of a two-sided softmax loss by z = scale * tile, in place of the tile (if write).

G = row_weight exp(z - lse of the row) + col_weight exp(z - lse of the column) - (row_uniform + col_uniform), less
row_target + col_target on positives, and 0 for pairs that are left out. tile and pairs as in softmax_stats, and on
either side lse = scale * top + log_sum.
stats [m] float64: the row sums of G * tile are added. The other vectors are float32.)");
  m.def("key_softmax_panel", &key_softmax_panel, py::arg("tile").noconvert(), py::arg("stats").noconvert(),
        py::arg("mean").noconvert().none(true), py::arg("scale"), py::arg("isa") = py::none(),
        R"(Online softmax over one tile of raw similarities q_i . k_j, in place.

tile [m, n] float32: on return exp(scale q_i . k_j - |scale| maximum), or unchanged if mean is None.
stats [m, 2] float64: the running maximum of q_i . k_j, or of -q_i . k_j if the scale is negative, and the sum of
    exp(scale q_i . k_j - |scale| maximum); start from -inf and 0.
mean [m, d] float32 or None: what the exponentials of earlier tiles have weighed, rescaled to the new maximum.)");
  m.def("koleo_panel", &koleo_panel, py::arg("tile").noconvert(), py::arg("best").noconvert(),
        py::arg("neighbor").noconvert(), py::arg("first_row"), py::arg("first_col"), py::arg("isa") = py::none(),
        R"(Largest similarities of one tile u_i . u_j, and whose they are.

tile [m, n] float32: rows first_row .. and columns first_col .. of the matrix of all similarities. Where first_row is
    first_col, it is one on the diagonal and is searched along its rows only; a row's own place is to hold -inf.
best [b] float32, neighbor [b] int64: the largest so far of each row and its place, written where the tile has a larger
    one, the first of equals; start from -inf.)");
  m.def("enqueue", &enqueue, py::arg("queue").noconvert(), py::arg("pointer"), py::arg("keys").noconvert(),
        py::arg("normalize") = false, py::arg("isa") = py::none(),
        R"(Writes keys [b, d] over rows (pointer + r) mod K of queue [K, d], in place, and returns the moved pointer.

Both are float32, float16, or uint16 that holds the bits of bfloat16. normalize: divide each key by its norm first.)");
  m.def("ema_update", &ema_update, py::arg("targets"), py::arg("sources"), py::arg("momentum"),
        py::arg("copies") = py::none(), py::arg("parts") = 1, py::arg("isa") = py::none(),
        R"(Exponential moving averages of lists of arrays, in place: target = momentum target + (1 - momentum) source.

targets, sources: contiguous arrays of float32, float16, or uint16 that holds the bits of bfloat16.
copies: as many arrays, or None for those without, that receive the new targets in their own type.
parts: in how many steps to go through all elements; the result is the same.)");
  m.def("dino", &dino, py::arg("students").noconvert(), py::arg("teachers").noconvert(),
        py::arg("center").noconvert() = py::none(), py::arg("weights").noconvert() = py::none(),
        py::arg("student_temp") = 0.1f, py::arg("teacher_temp") = 0.04f, py::arg("distinct") = true,
        py::arg("teacher_probs") = false, py::arg("stream_gradient") = false, py::arg("isa") = py::none(),
        R"(Cross-entropy of the student's crops under the teacher's, summed over pairs of crops.

students [v, b, k], teachers [t, b, k]: contiguous logits, float32, float16, or uint16 that holds the bits of bfloat16.
center [k], weights [b]: float32 or None. distinct: without pairs of the same crop.
teacher_probs: the teacher's rows are probabilities. stream_gradient: write float32 gradients past the caches.
Returns the losses [b], their gradient by the students [v, b, k] and the sum of the teacher's logits [k].)");
  m.def("sinkhorn_column_lse", &sinkhorn_column_lse, py::arg("rows").noconvert(), py::arg("temp"),
        py::arg("isa") = py::none(),
        "The maximum m of each column of rows [n, k], and the sum of exp((rows - m) / temp).");
  m.def("sinkhorn_column_sums", &sinkhorn_column_sums, py::arg("rows").noconvert(), py::arg("center").noconvert(),
        py::arg("temp"), py::arg("isa") = py::none(), "The sum over rows of softmax((rows - center) / temp).");
  m.def("centered_softmax", &centered_softmax, py::arg("rows").noconvert(), py::arg("center").noconvert(),
        py::arg("temp"), py::arg("isa") = py::none(), "softmax((rows - center) / temp) over the columns of each row.");
}
