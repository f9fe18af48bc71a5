#include "koleo.h"

#define SSLK_KERNEL "koleo-inl.h"
#include "foreach_isa.h"

namespace sslk {

void koleo_rows(const KoleoPanel& panel, int64_t begin, int64_t end, Isa isa) {
  SSLK_DISPATCH(isa, koleo_rows, panel, begin, end);
}

void koleo_columns(const KoleoPanel& panel, int64_t begin, int64_t end, Isa isa) {
  SSLK_DISPATCH(isa, koleo_columns, panel, begin, end);
}

void koleo_unit_rows(const KoleoRows& rows, float* unit, int64_t begin, int64_t end, Isa isa) {
  SSLK_DISPATCH(isa, koleo_unit_rows, rows, unit, begin, end);
}

void koleo_distances(const KoleoRows& rows, int64_t begin, int64_t end, Isa isa) {
  SSLK_DISPATCH(isa, koleo_distances, rows, begin, end);
}

KoleoGradient::KoleoGradient(const KoleoRows& rows, const float* upstream, int64_t upstream_stride, double unit,
                             void* gradient)
    : rows(rows), gradient(gradient), push(rows.rows), first(rows.rows + 1), those(rows.rows) {
  for (int64_t i = 0; i < rows.rows; ++i) {
    const double weight = upstream[i * upstream_stride] * unit, distance = rows.distance[i];
    push[i] = static_cast<float>(distance > 0 ? weight / (distance * (distance + rows.eps)) : 0 * weight);
    ++first[rows.neighbor[i] + 1];
  }
  for (int64_t i = 0; i < rows.rows; ++i) first[i + 1] += first[i];
  std::vector<int64_t> next(first);
  for (int64_t i = 0; i < rows.rows; ++i) those[next[rows.neighbor[i]]++] = i;
}

void KoleoGradient::write_rows(int64_t begin, int64_t end, Isa isa) const {
  std::vector<float> scratch(rows.width);
  SSLK_DISPATCH(isa, koleo_gradient, *this, scratch.data(), begin, end);
}

}  // namespace sslk
