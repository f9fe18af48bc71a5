// CPU tensors in, the torch-free tile kernels underneath, torch's own thread pool across rows and across columns.
#include "../cpu/koleo.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../checks.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

void koleo_panel_cpu(Tensor tile, Tensor best, Tensor neighbor, int64_t first_row, int64_t first_col) {
  sslk::check_tile(tile, "tile");
  sslk::check_tensor(best, "best", ScalarType::Float, 1);
  sslk::check_tensor(neighbor, "neighbor", ScalarType::Long, 1);
  const int64_t rows = tile.size(0), cols = tile.size(1), size = best.size(0);
  sslk::check_size(neighbor, "neighbor", 0, size);
  STD_TORCH_CHECK(best.is_contiguous(), "best: expected a contiguous tensor");
  STD_TORCH_CHECK(neighbor.is_contiguous(), "neighbor: expected a contiguous tensor");
  STD_TORCH_CHECK(rows <= INT32_MAX && cols <= INT32_MAX, "tile: expected at most 2**31 - 1 rows and columns, got ",
                  rows, " and ", cols);
  STD_TORCH_CHECK(0 <= first_row && first_row <= size - rows, "first_row: expected 0 to ", size - rows, ", got ",
                  first_row);
  STD_TORCH_CHECK(0 <= first_col && first_col <= size - cols, "first_col: expected 0 to ", size - cols, ", got ",
                  first_col);

  const auto side = [&](int64_t first) {
    return sslk::KoleoSide{best.mutable_data_ptr<float>() + first, neighbor.mutable_data_ptr<int64_t>() + first, first};
  };
  const sslk::KoleoPanel panel{tile.const_data_ptr<float>(), rows, cols, tile.stride(0), side(first_row),
                               side(first_col)};
  const sslk::Isa isa = sslk::active_isa();
  const int64_t elements_per_task = 131072;  // about 10 us of work, so that small tiles stay on one thread
  const auto grain = [&](int64_t length) { return elements_per_task / (length > 0 ? length : 1) + 1; };
  torch::stable::parallel_for(0, rows, grain(cols),
                              [&](int64_t begin, int64_t end) { sslk::koleo_rows(panel, begin, end, isa); });
  if (first_row == first_col) return;  // the columns are the rows
  torch::stable::parallel_for(0, cols, grain(rows),
                              [&](int64_t begin, int64_t end) { sslk::koleo_columns(panel, begin, end, isa); });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ssl_kernels, m) {
  m.def(
      "koleo_panel_(Tensor tile, Tensor(a!) best, Tensor(b!) neighbor, int first_row, int first_col) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(ssl_kernels, CPU, m) { m.impl("koleo_panel_", TORCH_BOX(&koleo_panel_cpu)); }
