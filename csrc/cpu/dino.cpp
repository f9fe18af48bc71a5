#include "dino.h"

#define SSLK_KERNEL "dino-inl.h"
#include "foreach_isa.h"

namespace sslk {

void dino_rows(const Dino& job, int64_t begin, int64_t end, float* scratch, float* teacher_sum, Isa isa) {
  SSLK_DISPATCH(isa, dino_rows, job, begin, end, scratch, teacher_sum);
}

}  // namespace sslk
