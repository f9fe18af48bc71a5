#include "queue.h"

#define SSLK_KERNEL "queue-inl.h"
#include "foreach_isa.h"

namespace sslk {

void enqueue_rows(const Enqueue& job, int64_t begin, int64_t end, Isa isa) {
  SSLK_DISPATCH(isa, enqueue_rows, job, begin, end);
}

}  // namespace sslk
