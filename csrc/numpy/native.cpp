// The extension module ssl_kernels._native: the torch-free kernels on NumPy arrays, one instruction set at a time.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../cpu/sigmoid.h"

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

void sigmoid_panel(Array<float> tile, Array<double> stats, float scale, float bias,
                   std::optional<Array<int64_t>> row_ids, std::optional<Array<int64_t>> col_ids, bool ignore_same_id,
                   int64_t diagonal, bool write_grad, std::optional<std::string> isa) {
  const int64_t item = sizeof(float);
  const bool is_matrix = tile.ndim() == 2;
  const bool has_layout = is_matrix && (tile.size() == 0 || ((tile.shape(1) == 1 || tile.strides(1) == item) &&
                                                             tile.strides(0) % item == 0 &&
                                                             (tile.shape(0) == 1 || tile.strides(0) >= tile.shape(1) * item)));
  if (!has_layout) {
    throw py::value_error("tile: expected a matrix with unit stride along columns and rows that do not overlap, "
                          "got shape " + shape_of(tile));
  }
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
  panel.row_stride = tile.strides(0) / item;
  panel.stats = stats.mutable_data();
  panel.stats_width = stats.shape(1);
  panel.scale = scale;
  panel.bias = bias;
  panel.row_ids = ids_data(row_ids, "row_ids", panel.rows);
  panel.col_ids = ids_data(col_ids, "col_ids", panel.cols);
  panel.ignore_same_id = ignore_same_id;
  panel.diagonal = diagonal;
  panel.write_grad = write_grad;
  const sslk::Isa chosen = isa ? sslk::parse_isa(*isa) : sslk::active_isa();
  py::gil_scoped_release release;
  sslk::sigmoid_panel(panel, 0, panel.rows, chosen);
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
}
