#include "contrastive.h"

#define SSLK_KERNEL "contrastive-inl.h"
#include "foreach_isa.h"

namespace sslk {

void finish_gradient(const Gradient& gradient, int64_t begin, int64_t end, Isa isa) {
  SSLK_DISPATCH(isa, finish_gradient, gradient, begin, end);
}

}  // namespace sslk
