#include "low_rank_add.h"

#include "entry.h"
#include "kernels.h"

namespace lorafast::entries {

void low_rank_add(int type, Address h, int64_t M, int64_t h_stride, int64_t N, int64_t R, Address F, int F_type, int64_t F_R, int64_t F_l,
        float s, Address scale, Address seed, uint32_t t, Address gain, Address bias, Address inner, int threads, Address out) {
  of_type(type, [&](auto one) {
    using T = decltype(one);
    const Gain<T> after{at<float>(gain), at<float>(bias), {at<T>(inner), M, N, N}};
    lorafast::low_rank_add<T>({at<const T>(h), M, R, h_stride}, factor(F, F_type, R, N, F_R, F_l), {s, nullptr, at<float>(scale)},
                    dropout(seed, t), after, {at<T>(out), M, N, N}, threads);
  });
}

}  // namespace lorafast::entries
