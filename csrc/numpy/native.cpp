// The extension module ssl_kernels._native: the torch-free kernels on NumPy arrays, one instruction set at a time.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../ema_lists.h"
#include "../jobs/dino.h"
#include "../jobs/key_softmax.h"
#include "../jobs/koleo.h"
#include "../jobs/queue.h"
#include "../jobs/row_softmax.h"
#include "../jobs/sigmoid.h"
#include "../jobs/sinkhorn.h"
#include "../jobs/softmax.h"

namespace py = pybind11;
using torch::headeronly::ScalarType;

namespace {

// A NumPy array with what the jobs ask of a tensor; uint16 stands for the bits of bfloat16.
class Tensor : public py::array {
 public:
  using py::array::array;

  bool is_cpu() const { return true; }
  int64_t dim() const { return ndim(); }
  int64_t size(int64_t axis) const { return shape(axis); }
  int64_t stride(int64_t axis) const {
    if (strides(axis) % itemsize() != 0) throw py::value_error("expected strides of whole elements");
    return strides(axis) / itemsize();
  }
  int64_t numel() const { return py::array::size(); }
  bool is_contiguous() const { return flags() & py::array::c_style; }
  const void* const_data_ptr() const { return data(); }
  void* mutable_data_ptr() const { return const_cast<Tensor*>(this)->mutable_data(); }
  ScalarType scalar_type() const {
    if (py::isinstance<py::array_t<float>>(*this)) return ScalarType::Float;
    if (py::isinstance<py::array_t<double>>(*this)) return ScalarType::Double;
    if (py::isinstance<py::array_t<int64_t>>(*this)) return ScalarType::Long;
    if (py::isinstance<py::array_t<uint16_t>>(*this)) return ScalarType::BFloat16;
    return dtype().equal(py::dtype("float16")) ? ScalarType::Half : ScalarType::Undefined;
  }
};

using Name = std::optional<std::string>;  // of an instruction set; the active one by default

sslk::Isa choose_isa(const Name& name) { return name ? sslk::parse_isa(*name) : sslk::active_isa(); }

// A function of the arguments of a job, and of the name of an instruction set, that makes the job and runs it.
template <typename Job, typename... Arguments, typename Run>
auto shell(Job (*make)(Arguments...), Run run) {
  return [make, run](Arguments... arguments, const Name& isa) {
    Job job = make(arguments...);
    const sslk::Isa chosen = choose_isa(isa);
    py::gil_scoped_release release;
    run(job, chosen);
  };
}

void check_parts(int64_t parts) {
  if (parts < 1) throw py::value_error("parts: expected at least 1, got " + std::to_string(parts));
}

void softmax_stats(const Tensor& tile, const Tensor& row_stats, const std::optional<Tensor>& col_stats, double scale,
                   const std::optional<Tensor>& row_ids, const std::optional<Tensor>& col_ids, bool ignore_same_id,
                   int64_t positive, int64_t excluded, int64_t parts, const Name& isa) {
  check_parts(parts);
  auto stats =
      sslk::softmax_stats_job(tile, row_stats, col_stats, scale, row_ids, col_ids, ignore_same_id, positive, excluded);
  const sslk::Isa chosen = choose_isa(isa);
  py::gil_scoped_release release;
  for (int64_t part = 0; part < parts; ++part) {
    stats.add_rows(stats.chunks() * part / parts, stats.chunks() * (part + 1) / parts, chosen);
  }
  const int64_t cols = stats.tile.cols, group = 64, groups = (cols + group - 1) / group;  // of columns: whole vectors
  for (int64_t part = 0; stats.col_stats && part < parts; ++part) {
    const int64_t begin = groups * part / parts * group, end = groups * (part + 1) / parts * group;
    stats.add_columns(begin, end < cols ? end : cols, chosen);
  }
}

using Maybe = std::optional<Tensor>;
using Scales = std::tuple<double, double, double>;

sslk::RowPairs<Tensor> row_pairs(const Tensor& target, const Maybe& row_ids, const Maybe& col_ids, int64_t same_id,
                                 bool guided, const Scales& scales, const Maybe& bias, const Maybe& row_factors,
                                 const Maybe& col_factors) {
  const auto [scale, same, other] = scales;
  const bool logits = bias || row_factors || same != scale || other != scale;
  return {target, row_ids, col_ids, same_id, guided, logits, scale, same, other, bias, row_factors, col_factors};
}

void row_softmax_stats(const std::vector<Tensor>& tiles, const Tensor& stats, const Tensor& target,
                       const Scales& scales, const Maybe& row_ids, const Maybe& col_ids, int64_t same_id, bool guided,
                       const Maybe& bias, const Maybe& row_factors, const Maybe& col_factors, int64_t parts,
                       const Name& isa) {
  check_parts(parts);
  const auto job = sslk::row_stats_job<Tensor>(
      tiles, stats, row_pairs(target, row_ids, col_ids, same_id, guided, scales, bias, row_factors, col_factors));
  const sslk::Isa chosen = choose_isa(isa);
  py::gil_scoped_release release;
  const int64_t rows = job[0].tile.rows, count = static_cast<int64_t>(job.size());
  for (int64_t part = 0; part < parts; ++part) {
    sslk::row_softmax_stats(job.data(), count, rows * part / parts, rows * (part + 1) / parts, chosen);
  }
}

void row_softmax_guide(const Tensor& tile, const Tensor& scores, const Tensor& threshold, const Tensor& target,
                       const Maybe& row_ids, const Maybe& col_ids, int64_t same_id, const Name& isa) {
  const auto job = sslk::row_guide_job<Tensor>(
      tile, scores, threshold, row_pairs(target, row_ids, col_ids, same_id, false, {0, 0, 0}, {}, {}, {}));
  const sslk::Isa chosen = choose_isa(isa);
  py::gil_scoped_release release;
  sslk::row_softmax_guide(job, 0, job.tile.rows, chosen);
}

void row_softmax_grad(const std::vector<Tensor>& tiles, const Tensor& moments, const Tensor& col_sums,
                      const Tensor& sides, const Tensor& target, const Scales& scales, const Maybe& row_ids,
                      const Maybe& col_ids, int64_t same_id, bool guided, const Maybe& bias, const Maybe& row_factors,
                      const Maybe& col_factors, bool write, bool summed, int64_t parts, const Name& isa) {
  check_parts(parts);
  const auto job = sslk::row_grad_job<Tensor>(
      tiles, moments, col_sums,
      row_pairs(target, row_ids, col_ids, same_id, guided, scales, bias, row_factors, col_factors), sides, write);
  const sslk::Isa chosen = choose_isa(isa);
  py::gil_scoped_release release;
  const int64_t steps = job[0].steps(), count = static_cast<int64_t>(job.size());
  for (int64_t part = 0; part < parts; ++part) {
    sslk::row_softmax_grad(job.data(), count, summed, steps * part / parts, steps * (part + 1) / parts, chosen);
  }
}

void row_softmax_visit(const std::vector<Tensor>& tiles, const Tensor& stats, const Tensor& moments,
                       const Tensor& col_sums, const Tensor& target, const Scales& scales, const Maybe& row_ids,
                       const Maybe& col_ids, int64_t same_id, bool guided, const Maybe& bias, const Maybe& row_factors,
                       const Maybe& col_factors, const Maybe& weights, double largest,
                       const std::vector<double>& shares, double label_smoothing, bool write, int64_t parts,
                       const Name& isa) {
  check_parts(parts);
  const auto job = sslk::row_visit_job<Tensor>(
      tiles, stats, moments, col_sums,
      row_pairs(target, row_ids, col_ids, same_id, guided, scales, bias, row_factors, col_factors), weights, largest,
      shares, label_smoothing, write);
  const sslk::RowVisit visit = job.here();
  const sslk::Isa chosen = choose_isa(isa);
  py::gil_scoped_release release;
  const int64_t steps = visit.grads->steps();
  for (int64_t part = 0; part < parts; ++part) {
    sslk::row_softmax_visit(visit, steps * part / parts, steps * (part + 1) / parts, chosen);
  }
}

int64_t enqueue(const Tensor& queue, int64_t pointer, const Tensor& keys, bool normalize, const Name& isa) {
  const auto job = sslk::enqueue_job(queue, pointer, keys, normalize);
  const int64_t batch = keys.size(0);
  const sslk::Isa chosen = choose_isa(isa);
  py::gil_scoped_release release;
  sslk::enqueue_rows(job, batch > job.size ? batch - job.size : 0, batch, chosen);
  return (job.start + batch) % job.size;
}

void ema_update(const std::vector<Tensor>& targets, const std::vector<Tensor>& sources, double momentum,
                const std::vector<Tensor>& copies, int64_t parts, const Name& isa) {
  STD_TORCH_CHECK(momentum >= 0 && momentum <= 1, "momentum: expected a number in [0, 1], got ", momentum);
  check_parts(parts);
  const auto is_here = [](const Tensor&) { return true; };
  const sslk::Ema ema(sslk::ema_tensors(targets, sources, copies, is_here, ""), momentum);
  const sslk::Isa chosen = choose_isa(isa);
  py::gil_scoped_release release;
  for (int64_t part = 0; part < parts; ++part) {
    ema.update(ema.blocks() * part / parts, ema.blocks() * (part + 1) / parts, chosen);
  }
}

Tensor zeros(const py::dtype& dtype, std::vector<py::ssize_t> shape) {
  Tensor made(dtype, std::move(shape));
  std::fill_n(static_cast<char*>(made.mutable_data_ptr()), made.nbytes(), 0);
  return made;
}

Tensor zeros(std::vector<py::ssize_t> shape) { return zeros(py::dtype::of<float>(), std::move(shape)); }

float* floats(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

py::tuple dino(const Tensor& students, const Tensor& teachers, const std::optional<Tensor>& center,
               const std::optional<Tensor>& weights, double student_temp, double teacher_temp, bool distinct,
               bool teacher_probs, bool stream_gradient, const Name& isa) {
  sslk::check_features(students, "students", 3);
  const Tensor losses = zeros({students.size(1)}), teacher_sum = zeros({students.size(2)});
  const Tensor gradient = zeros(students.dtype(), {students.size(0), students.size(1), students.size(2)});
  const double scale = students.scalar_type() == ScalarType::Half ? 1 / student_temp : 1;
  auto job = sslk::dino_job<Tensor>({students}, {teachers}, center, weights, student_temp, teacher_temp, distinct,
                                    teacher_probs, losses, gradient, scale);
  job.stream_gradient = stream_gradient;
  const sslk::Isa chosen = choose_isa(isa);
  {
    py::gil_scoped_release release;
    std::vector<float> scratch(sslk::dino_scratch(job));
    sslk::dino_rows(job, 0, job.samples, scratch.data(), floats(teacher_sum), chosen);
  }
  return py::make_tuple(losses, gradient, teacher_sum);
}

py::tuple sinkhorn_column_lse(const Tensor& rows, double temp, const Name& isa) {
  const auto job = sslk::sinkhorn_job<Tensor>(rows, std::nullopt, temp);
  STD_TORCH_CHECK(job.rows > 0, "rows: expected at least 1 row, got 0");
  const Tensor maxima = zeros({job.width}), totals = zeros({job.width});
  sslk::sinkhorn_column_lse(job, 0, job.width, floats(maxima), floats(totals), false, choose_isa(isa));
  return py::make_tuple(maxima, totals);
}

Tensor sinkhorn_column_sums(const Tensor& rows, const std::optional<Tensor>& center, double temp, const Name& isa) {
  const auto job = sslk::sinkhorn_job(rows, center, temp);
  const Tensor sums = zeros({job.width});
  std::vector<float> scratch(sslk::sinkhorn_scratch(job));
  sslk::sinkhorn_column_sums(job, 0, job.rows, scratch.data(), floats(sums), choose_isa(isa));
  return sums;
}

Tensor centered_softmax(const Tensor& rows, const std::optional<Tensor>& center, double temp, const Name& isa) {
  const auto job = sslk::sinkhorn_job(rows, center, temp);
  const Tensor out = zeros({job.rows, job.width});
  std::vector<float> scratch(sslk::sinkhorn_scratch(job));
  sslk::centered_softmax(job, 0, job.rows, scratch.data(), floats(out), choose_isa(isa));
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
  m.doc() = "The kernels of ssl_kernels on NumPy arrays, without torch. A bad argument is a ValueError.";
  py::register_local_exception_translator([](std::exception_ptr thrown) {
    try {
      std::rethrow_exception(thrown);
    } catch (const std::runtime_error& error) {  // of STD_TORCH_CHECK
      py::set_error(PyExc_ValueError, error.what());
    }
  });
  m.def("build_info", &build_info, "Compiler, architecture and instruction sets of this build.");
  m.def("sigmoid_panel", shell(&sslk::sigmoid_job<Tensor>, [](const sslk::SigmoidPanel& panel, sslk::Isa isa) {
          sslk::sigmoid_panel(panel, 0, panel.rows, isa);
        }),
        py::arg("tile"), py::arg("stats"), py::arg("scale"),
        py::arg("bias"), py::arg("row_ids") = py::none(), py::arg("col_ids") = py::none(),
        py::arg("ignore_same_id") = false, py::arg("diagonal") = 0, py::arg("write_grad") = true,
        py::arg("isa") = py::none(),
        R"(Sigmoid contrastive loss over one tile of raw similarities, in place.

tile [m, n] float32: x_i . y_j on entry, d loss / d (scale * x_i . y_j + bias) on return (if write_grad).
stats [m, 3] float64: per-row sums of the loss, of G * raw and of G are added; with one column, only the loss.
row_ids [m], col_ids [n] int64: equal ids are positives, or left out of the sum with ignore_same_id.
diagonal: (i, i + diagonal) is always positive.
isa: "baseline", "avx2" or "avx512"; the active one by default.)");
  m.def("softmax_stats", &softmax_stats, py::arg("tile"), py::arg("row_stats"),
        py::arg("col_stats").none(true), py::arg("scale"), py::arg("row_ids") = py::none(),
        py::arg("col_ids") = py::none(), py::arg("ignore_same_id") = false, py::arg("positive") = 0,
        py::arg("excluded") = sslk::kNoDiagonal, py::arg("parts") = 1, py::arg("isa") = py::none(),
        R"(Statistics of the rows and columns of one tile of raw similarities, for a softmax over either.

tile [m, n] float32: x_i . y_j, unchanged. z = scale * tile, scale >= 0.
row_stats [m, 4] and col_stats [n, 4] float64, or None for no columns: what other tiles gave to the maximum of x_i . y_j
    and to the sum of exp(scale * (x_i . y_j - maximum)), over the pairs that count, and to the sum of x_i . y_j over
    positives and their number; start from -inf, 0, 0, 0. With 6 columns, then the sum over all pairs that count and their number.
row_ids [m], col_ids [n] int64: equal ids are positives, or left out with ignore_same_id.
positive, excluded: (i, i + positive) is a positive pair, (i, i + excluded) is left out; out of range for none.
parts: in how many steps to take rows and columns; the result is the same.)");
  m.def("softmax_grad", shell(&sslk::softmax_grad_job<Tensor>, [](const sslk::SoftmaxGrad& grad, sslk::Isa isa) {
          sslk::softmax_grad(grad, 0, grad.tile.rows, isa);
        }),
        py::arg("tile"), py::arg("stats"), py::arg("scale"),
        py::arg("row_ids") = py::none(), py::arg("col_ids") = py::none(), py::arg("ignore_same_id") = false,
        py::arg("positive") = 0, py::arg("excluded") = sslk::kNoDiagonal, py::kw_only(), py::arg("row_side"),
        py::arg("col_side"), py::arg("write") = true, py::arg("isa") = py::none(),
        R"(Gradient of a two-sided softmax loss by z = scale * tile, in place of the tile (if write).

G = row_weight exp(z - lse of the row) + col_weight exp(z - lse of the column) - (row_uniform + col_uniform), less
row_target + col_target on positives, and 0 for pairs that are left out. tile and pairs as in softmax_stats, and on
either side lse = scale * top + log_sum.
stats [m, 1] float64: the row sums of G * tile are added.
row_side [4, m] or [5, m], col_side [4, n] or [5, n] float32: top, log_sum, weight, target, uniform.)");
  m.def("row_softmax_stats", &row_softmax_stats, py::arg("tiles"), py::arg("stats"), py::arg("target"),
        py::arg("scales"), py::arg("row_ids") = py::none(), py::arg("col_ids") = py::none(), py::arg("same_id") = 0,
        py::arg("guided") = false, py::arg("bias") = py::none(), py::arg("row_factors") = py::none(),
        py::arg("col_factors") = py::none(), py::arg("parts") = 1, py::arg("isa") = py::none(),
        R"(Statistics of the rows of one tile of raw similarities, for a softmax over rows alone.

tiles: K times [m, n] float32, one for each prefix of the features: x_i . y_j over the features that it adds to the one
    before, and on return over all of its own. s = tile row_factor_i col_factor_j; z = t_ij s + bias_j.
stats [K, m, 4] or [K, m, 6] float64: as in softmax_stats, but of v instead of x_i . y_j: v is s where z is a multiple of
    it, else z itself.
target [m] int64: the column of each row's positive; out of range for none.
scales: t of positives, of other pairs of equal ids, and of the rest.
row_ids [m], col_ids [n] int64: pairs of equal ids off the target are left out (same_id 0), positive (1) or ordinary (2).
guided: similarities below -1e38 stand for pairs that are left out.
bias [n], row_factors [K, m], col_factors [K, n]: float32 or None.
parts: in how many steps to take the rows; the result is the same.)");
  m.def("row_softmax_guide", &row_softmax_guide, py::arg("tile"), py::arg("scores"), py::arg("threshold"),
        py::arg("target"), py::arg("row_ids") = py::none(), py::arg("col_ids") = py::none(), py::arg("same_id") = 0,
        py::arg("isa") = py::none(),
        R"(Leaves pairs out whose score exceeds the threshold of their row, unless they are positive: tile gets -2e38.

tile, scores [m, n] float32; threshold [m] float32; target, ids and same_id as in row_softmax_stats.)");
  m.def("row_softmax_grad", &row_softmax_grad, py::arg("tiles"), py::arg("moments"), py::arg("col_sums"),
        py::arg("sides"), py::arg("target"), py::arg("scales"), py::arg("row_ids") = py::none(),
        py::arg("col_ids") = py::none(), py::arg("same_id") = 0, py::arg("guided") = false,
        py::arg("bias") = py::none(), py::arg("row_factors") = py::none(), py::arg("col_factors") = py::none(),
        py::arg("write") = true, py::arg("summed") = true, py::arg("parts") = 1, py::arg("isa") = py::none(),
        R"(Gradient of a softmax over rows by z, times the factors if there are some, in place of the tile (if write).

tiles: as row_softmax_stats returns them if summed, else as it takes them. Each receives the sum over its prefix and all
    longer ones.

G = weight exp(z - lse) - all, less target on positives, and 0 for pairs that are left out; lse = unit top + log_sum,
where the unit is 1, or the scale where statistics are those of s. Pairs as in row_softmax_stats.
moments [m, K] float64: the row sums of G s are added.
col_sums [K, 2, c, n], [K, 1, c, n] or [K, 0, c, n] float32, c = ceil(m / 64): column sums of G, and of G s, of 64 rows
    each; one alone is that of G s where there are factors, else of G.
sides [K, 4, m] or [K, 5, m] float32: top, log_sum, weight, target, all.)");
  m.def("row_softmax_visit", &row_softmax_visit, py::arg("tiles"), py::arg("stats"), py::arg("moments"),
        py::arg("col_sums"), py::arg("target"), py::arg("scales"), py::arg("row_ids") = py::none(),
        py::arg("col_ids") = py::none(), py::arg("same_id") = 0, py::arg("guided") = false,
        py::arg("bias") = py::none(), py::arg("row_factors") = py::none(), py::arg("col_factors") = py::none(),
        py::arg("weights") = py::none(), py::arg("largest") = 1.0, py::arg("shares") = std::vector<double>{1},
        py::arg("label_smoothing") = 0.0, py::arg("write") = true, py::arg("parts") = 1, py::arg("isa") = py::none(),
        R"(Statistics and gradients of tiles that have all columns of their rows, as row_softmax_stats and row_softmax_grad
make them one after the other.

stats start from -inf and 0.
weights [m] float32 or None for 1, and the largest of them, by which they are divided; shares: the weight of each prefix.)");
  m.def("key_softmax_panel",
        shell(&sslk::key_softmax_job<Tensor>, [](const sslk::KeySoftmaxPanel& panel, sslk::Isa isa) {
          sslk::key_softmax_panel(panel, 0, panel.rows, isa);
        }),
        py::arg("tile"), py::arg("stats"),
        py::arg("mean").none(true), py::arg("scale"), py::arg("isa") = py::none(),
        R"(Online softmax over one tile of raw similarities q_i . k_j, in place.

tile [m, n] float32: on return exp(scale q_i . k_j - |scale| maximum), or unchanged if mean is None.
stats [m, 2] float64: the running maximum of q_i . k_j, or of -q_i . k_j if the scale is negative, and the sum of
    exp(scale q_i . k_j - |scale| maximum); start from -inf and 0.
mean [m, d] float32 or None: what the exponentials of earlier tiles have weighed, rescaled to the new maximum.)");
  m.def("koleo_panel", shell(&sslk::koleo_job<Tensor>, [](const sslk::KoleoPanel& panel, sslk::Isa isa) {
          sslk::koleo_rows(panel, 0, panel.rows, isa);
          if (panel.row.first != panel.col.first) sslk::koleo_columns(panel, 0, panel.cols, isa);
        }),
        py::arg("tile"), py::arg("best"),
        py::arg("neighbor"), py::arg("first_row"), py::arg("first_col"), py::arg("isa") = py::none(),
        R"(Largest similarities of one tile u_i . u_j, and whose they are.

tile [m, n] float32: rows first_row .. and columns first_col .. of the matrix of all similarities. Where first_row is
    first_col, it is one on the diagonal: it must be square, is searched along its rows only, and the place of each row's
    similarity with itself becomes -inf.
best [b] float32, neighbor [b] int64: the largest so far of each row and its place, written where the tile has a larger
    one, the first of equals; start from -inf.)");
  m.def("enqueue", &enqueue, py::arg("queue"), py::arg("pointer"), py::arg("keys"),
        py::arg("normalize") = false, py::arg("isa") = py::none(),
        R"(Writes keys [b, d] over rows (pointer + r) mod K of queue [K, d], in place, and returns the moved pointer.

Both are float32, float16, or uint16 that holds the bits of bfloat16. normalize: divide each key by its norm first.)");
  m.def("ema_update", &ema_update, py::arg("targets"), py::arg("sources"), py::arg("momentum"),
        py::arg("copies") = std::vector<Tensor>(), py::arg("parts") = 1, py::arg("isa") = py::none(),
        R"(Exponential moving averages of lists of arrays, in place: target = momentum target + (1 - momentum) source.

targets, sources: contiguous arrays of float32, float16, or uint16 that holds the bits of bfloat16.
copies: arrays that receive the new targets, of the first of them, in their own type.
parts: in how many steps to go through all elements; the result is the same.)");
  m.def("dino", &dino, py::arg("students"), py::arg("teachers"),
        py::arg("center") = py::none(), py::arg("weights") = py::none(),
        py::arg("student_temp") = 0.1f, py::arg("teacher_temp") = 0.04f, py::arg("distinct") = true,
        py::arg("teacher_probs") = false, py::arg("stream_gradient") = false, py::arg("isa") = py::none(),
        R"(Cross-entropy of the student's crops under the teacher's, summed over pairs of crops.

students [v, b, k], teachers [t, b, k]: contiguous logits, float32, float16, or uint16 that holds the bits of bfloat16.
center [k], weights [b]: float32 or None. distinct: without pairs of the same crop.
teacher_probs: the teacher's rows are probabilities. stream_gradient: write float32 gradients past the caches.
Returns the losses [b], their gradient by the students [v, b, k] and the sum of the teacher's logits [k].)");
  m.def("sinkhorn_column_lse", &sinkhorn_column_lse, py::arg("rows"), py::arg("temp"),
        py::arg("isa") = py::none(),
        "The maximum m of each column of rows [n, k], and the sum of exp((rows - m) / temp).");
  m.def("sinkhorn_column_sums", &sinkhorn_column_sums, py::arg("rows"), py::arg("center"),
        py::arg("temp"), py::arg("isa") = py::none(), "The sum over rows of softmax((rows - center) / temp).");
  m.def("centered_softmax", &centered_softmax, py::arg("rows"), py::arg("center"),
        py::arg("temp"), py::arg("isa") = py::none(), "softmax((rows - center) / temp) over the columns of each row.");
}
