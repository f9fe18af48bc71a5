// The extension module ssl_kernels._native: the torch-free kernels on NumPy arrays, one instruction set at a time.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../cpu/key_softmax.h"
#include "../cpu/queue.h"
#include "../cpu/sigmoid.h"
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

void softmax_grad(Array<float> tile, Array<double> stats, float scale, Array<double> row_lse, Array<double> col_lse,
                  Array<float> row_weight, Array<float> col_weight, Array<float> row_target, Array<float> col_target,
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
  grad.row = {vector_data(row_lse, "row_lse", rows), vector_data(row_weight, "row_weight", rows),
              vector_data(row_target, "row_target", rows),
              row_uniform ? vector_data(*row_uniform, "row_uniform", rows) : nullptr};
  grad.col = {vector_data(col_lse, "col_lse", cols), vector_data(col_weight, "col_weight", cols),
              vector_data(col_target, "col_target", cols),
              col_uniform ? vector_data(*col_uniform, "col_uniform", cols) : nullptr};
  grad.write = write;
  const sslk::Isa chosen = choose_isa(isa);
  py::gil_scoped_release release;
  sslk::softmax_grad_prepare(grad);
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
row_stats [m, 4] and col_stats [n, 4] float64, or None for no columns: what other tiles gave to the maximum of z and to
    the sum of exp(z - maximum), over the pairs that count, and to the sum of x_i . y_j over positives and their
    number; start from -inf, 0, 0, 0. With 6 columns, then the sum over all pairs that count and their number.
row_ids [m], col_ids [n] int64: equal ids are positives, or left out with ignore_same_id.
positive, excluded: (i, i + positive) is a positive pair, (i, i + excluded) is left out; out of range for none.
parts: in how many steps to take rows and columns; the result is the same.)");
  m.def("softmax_grad", &softmax_grad, py::arg("tile").noconvert(), py::arg("stats").noconvert(), py::arg("scale"),
        py::arg("row_lse").noconvert(), py::arg("col_lse").noconvert(), py::arg("row_weight").noconvert(),
        py::arg("col_weight").noconvert(), py::arg("row_target").noconvert(), py::arg("col_target").noconvert(),
        py::arg("row_uniform").noconvert() = py::none(), py::arg("col_uniform").noconvert() = py::none(),
        py::arg("row_ids").noconvert() = py::none(), py::arg("col_ids").noconvert() = py::none(),
        py::arg("ignore_same_id") = false, py::arg("positive") = 0, py::arg("excluded") = sslk::kNoDiagonal,
        py::arg("write") = true, py::arg("isa") = py::none(),
        R"(Gradient of a two-sided softmax loss by z = scale * tile, in place of the tile (if write).

G = row_weight exp(z - row_lse) + col_weight exp(z - col_lse) - (row_uniform + col_uniform), less row_target +
col_target on positives, and 0 for pairs that are left out. tile and pairs as in softmax_stats.
stats [m] float64: the row sums of G * tile are added. Log-sum-exps are float64, the other vectors float32.)");
  m.def("key_softmax_panel", &key_softmax_panel, py::arg("tile").noconvert(), py::arg("stats").noconvert(),
        py::arg("mean").noconvert().none(true), py::arg("scale"), py::arg("isa") = py::none(),
        R"(Online softmax over one tile of raw similarities q_i . k_j, in place.

tile [m, n] float32: on return exp(scale q_i . k_j - maximum), or unchanged if mean is None.
stats [m, 2] float64: the running maximum and the sum of exp(scale q_i . k_j - maximum); start from -inf and 0.
mean [m, d] float32 or None: what the exponentials of earlier tiles have weighed, rescaled to the new maximum.)");
  m.def("enqueue", &enqueue, py::arg("queue").noconvert(), py::arg("pointer"), py::arg("keys").noconvert(),
        py::arg("normalize") = false, py::arg("isa") = py::none(),
        R"(Writes keys [b, d] over rows (pointer + r) mod K of queue [K, d], in place, and returns the moved pointer.

Both are float32, float16, or uint16 that holds the bits of bfloat16. normalize: divide each key by its norm first.)");
}
