#include "sinkhorn.h"

#define SSLK_KERNEL "sinkhorn-inl.h"
#include "foreach_isa.h"

namespace sslk {

void sinkhorn_column_lse(const Sinkhorn& job, int64_t begin, int64_t end, float* maxima, float* totals, bool more,
                         Isa isa) {
  SSLK_DISPATCH(isa, sinkhorn_column_lse, job, begin, end, maxima, totals, more);
}

void sinkhorn_column_sums(const Sinkhorn& job, int64_t begin, int64_t end, float* scratch, float* sums, Isa isa) {
  SSLK_DISPATCH(isa, sinkhorn_column_sums, job, begin, end, scratch, sums);
}

void centered_softmax(const Sinkhorn& job, int64_t begin, int64_t end, float* scratch, float* out, Isa isa) {
  SSLK_DISPATCH(isa, centered_softmax, job, begin, end, scratch, out);
}

}  // namespace sslk
