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

}  // namespace sslk
