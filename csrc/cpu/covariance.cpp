#include "covariance.h"

#define SSLK_KERNEL "covariance-inl.h"
#include "foreach_isa.h"

namespace sslk {

void center_views(const Views& views, int64_t begin, int64_t end, Isa isa) {
  SSLK_DISPATCH(isa, center_views, views, begin, end);
}

void row_products(const RowProducts& job, int64_t begin, int64_t end, Isa isa) {
  SSLK_DISPATCH(isa, row_products, job, begin, end);
}

void vicreg_gradient(const Views& views, int view, const ViewGradient& job, int64_t begin, int64_t end, Isa isa) {
  SSLK_DISPATCH(isa, vicreg_gradient, views, view, job, begin, end);
}

void barlow_twins_gradient(const Views& views, int view, const ViewGradient& job, int64_t begin, int64_t end, Isa isa) {
  SSLK_DISPATCH(isa, barlow_twins_gradient, views, view, job, begin, end);
}

}  // namespace sslk
