#include "grad_project.h"

#include "entry.h"
#include "kernels.h"

namespace lorafast::entries {

void grad_project(int type, Address x, int64_t M, int64_t K, int64_t x_stride, Address v, int64_t R,
                  int64_t v_stride, Address seed, uint32_t threshold, Address out, int threads) {
  with_activation_type(type, [&](auto element) {
    using T = decltype(element);
    lorafast::grad_project<T>({pointer<const T>(x), M, K, x_stride},
                              {pointer<const LowRankGrad<T>>(v), M, R, v_stride},
                              dropout(seed, threshold), {pointer<float>(out), R, K, K}, threads);
  });
}

}  // namespace lorafast::entries
