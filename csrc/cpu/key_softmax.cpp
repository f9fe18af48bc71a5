#include "key_softmax.h"

#define SSLK_KERNEL "key_softmax-inl.h"
#include "foreach_isa.h"

namespace sslk {

void key_softmax_panel(const KeySoftmaxPanel& panel, int64_t row_begin, int64_t row_end, Isa isa) {
  SSLK_DISPATCH(isa, key_softmax_panel, panel, row_begin, row_end);
}

void key_softmax_rows(const KeySoftmaxRows& job, int64_t begin, int64_t end, Isa isa) {
  SSLK_DISPATCH(isa, key_softmax_rows, job, begin, end);
}

void key_softmax_gradient(const KeySoftmaxGradient& job, int64_t begin, int64_t end, Isa isa) {
  SSLK_DISPATCH(isa, key_softmax_gradient, job, begin, end);
}

}  // namespace sslk
