#include "low_rank_add.h"

#include "entry.h"
#include "kernels.h"

namespace lorafast::entries {

void low_rank_add(int type, int h_type, Address h, int64_t M, int64_t h_stride, int64_t N,
                  int64_t R, Address F, int F_type, int64_t F_R, int64_t F_l, float s,
                  Address scale, Address seed, uint32_t threshold, Address gain, Address bias,
                  Address inner, int threads, Address out) {
  with_activation_type(type, [&](auto element) {
    using T = decltype(element);
    const GainArguments<T> gain_arguments{
        pointer<float>(gain), pointer<float>(bias), {pointer<T>(inner), M, N, N}};
    const auto add = [&](auto h_element) {
      using H = decltype(h_element);
      lorafast::low_rank_add<T, H>({pointer<const H>(h), M, R, h_stride},
                                   factor(F, F_type, R, N, F_R, F_l),
                                   {s, nullptr, pointer<float>(scale)}, dropout(seed, threshold),
                                   gain_arguments, {pointer<T>(out), M, N, N}, threads);
    };
    if (h_type == type)
      add(T{});
    else
      add(LowRankGrad<T>{});
  });
}

}  // namespace lorafast::entries
