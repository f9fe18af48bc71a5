#include "unit_rows.h"

#define SSLK_KERNEL "unit_rows-inl.h"
#include "foreach_isa.h"

namespace sslk {

void unit_rows(const UnitRows& job, int64_t begin, int64_t end, Isa isa) {
  SSLK_DISPATCH(isa, unit_rows, job, begin, end);
}

void unit_rows_gradient(const UnitRows& job, int64_t begin, int64_t end, Isa isa) {
  SSLK_DISPATCH(isa, unit_rows_gradient, job, begin, end);
}

}  // namespace sslk
