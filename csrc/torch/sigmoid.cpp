// CPU tensors in, the torch-free tile kernel underneath, torch's own thread pool across rows.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "../jobs/sigmoid.h"
#include "contrastive.h"
#include "parallel.h"
#include "products.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

void run(const sslk::SigmoidPanel& panel) {
  sslk::over_rows(panel.rows, panel.cols, [&](int64_t begin, int64_t end, sslk::Isa isa) {
    sslk::sigmoid_panel(panel, begin, end, isa);
  });
}

void sigmoid_panel_cpu(Tensor tile, Tensor stats, double scale, double bias, std::optional<Tensor> row_ids,
                       std::optional<Tensor> col_ids, bool ignore_same_id, int64_t diagonal, bool write_grad) {
  run(sslk::sigmoid_job(tile, stats, scale, bias, row_ids, col_ids, ignore_same_id, diagonal, write_grad));
}

// All of a forward pass whose similarities are one tile. Returns the loss, the gradients of x and y (empty where not
// wanted), and the scalars of a Result.
std::tuple<Tensor, Tensor, Tensor, Tensor> sigmoid_of_one_tile_cpu(
    Tensor x, Tensor y, double scale, double bias, std::optional<Tensor> x_ids, std::optional<Tensor> y_ids,
    bool ignore_same_id, int64_t positive, double divisor, bool want_dx, bool want_dy, bool want_scalars) {
  using torch::stable::new_empty;
  const Tensor tile = sslk::product(x, sslk::transposed(y));
  const int64_t width = want_dx || want_dy || want_scalars ? 3 : 1;
  const Tensor stats = torch::stable::new_zeros(x, {x.size(0), width}, ScalarType::Double);
  run(sslk::sigmoid_job(tile, stats, scale, bias, x_ids, y_ids, ignore_same_id, positive, want_dx || want_dy));
  const Tensor loss = new_empty(x, {}), scalars = new_empty(x, {3});
  sslk::weighted_sums(stats, std::nullopt, divisor, loss, scalars);
  const Tensor dx = want_dx ? sslk::product(tile, y) : new_empty(x, {0, x.size(1)});
  const Tensor dy = want_dy ? sslk::product(sslk::transposed(tile), x) : new_empty(x, {0, x.size(1)});
  return {loss, dx, dy, scalars};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ssl_kernels, m) {
  m.def(
      "sigmoid_panel_(Tensor(a!) tile, Tensor(b!) stats, float scale, float bias, Tensor? row_ids, Tensor? col_ids, "
      "bool ignore_same_id, int diagonal, bool write_grad) -> ()");
  m.def(
      "sigmoid_of_one_tile(Tensor x, Tensor y, float scale, float bias, Tensor? x_ids, Tensor? y_ids, "
      "bool ignore_same_id, int positive, float divisor, bool want_dx, bool want_dy, bool want_scalars) "
      "-> (Tensor loss, Tensor dx, Tensor dy, Tensor scalars)");
}

STABLE_TORCH_LIBRARY_IMPL(ssl_kernels, CPU, m) {
  m.impl("sigmoid_panel_", TORCH_BOX(&sigmoid_panel_cpu));
  m.impl("sigmoid_of_one_tile", TORCH_BOX(&sigmoid_of_one_tile_cpu));
}
