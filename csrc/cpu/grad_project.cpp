#include "grad_project.h"

#include "entry.h"
#include "kernels.h"

namespace lorafast::entries {

void grad_project(int type, Address x, int64_t M, int64_t K, int64_t x_stride, Address v, int64_t R, int64_t v_stride, Address seed,
           uint32_t t, Address out, int threads) {
  of_type(type, [&](auto one) {
    using T = decltype(one);
    lorafast::grad_project<T>({at<const T>(x), M, K, x_stride}, {at<const T>(v), M, R, v_stride}, dropout(seed, t),
                       {at<float>(out), R, K, K}, threads);
  });
}

}  // namespace lorafast::entries
