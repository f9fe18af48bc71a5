#include "sigmoid.h"

#define SSLK_KERNEL "sigmoid-inl.h"
#include "foreach_isa.h"

namespace sslk {

void sigmoid_panel(const SigmoidPanel& panel, int64_t row_begin, int64_t row_end, Isa isa) {
  SSLK_DISPATCH(isa, sigmoid_panel, panel, row_begin, row_end);
}

}  // namespace sslk
