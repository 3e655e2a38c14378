#include "cuda_kernels.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <array>

#include "precision.h"

namespace lorafast::host::cuda {
namespace {

using at::Tensor;

// As lorafast/engine/cuda_kernels.py has them.
constexpr std::array<int, 5> TILES{1, 2, 4, 8, 16};
constexpr int64_t STEPS = 4;
// low_rank_add's flags for a factor that it reads as it is.
constexpr int RAW = 32, ACROSS = 64;
// As lorafast/engine/philox.py has them.
constexpr int64_t GROUP = 8;
constexpr uint32_t PHILOX_STEPS = 65536;

// A padded to [ranks,width], aligned, in dtype; A itself if it is that, or in fp32.
Tensor factor_of(const Device& device, const Tensor& A, at::ScalarType dtype, int64_t ranks,
                 int64_t width) {
  // For more ranks there are no registers to round it in.
  const bool as_it_is = A.scalar_type() == dtype || (A.scalar_type() == at::kFloat && ranks <= 64);
  const bool fits = as_it_is && A.size(0) == ranks && A.size(1) == width;
  return fits && is_aligned(A) ? A : scale(device, A, dtype, {ranks, width, 1, {}, {}});
}

// True for a full core that is too wide for registers: torch multiplies by it.
bool by_product(int64_t R, const Tensor& core) {
  return core.defined() && core.dim() == 2 && R > 64;
}

// The flags by which low_rank_add reads a factor as it is, 0 if it has to be copied. flags: the
// others.
int raw_flags(const Tensor& factor, int flags) {
  const int64_t N = factor.size(0), R = factor.size(1);
  const bool aligned = flags & ALIGNED && reinterpret_cast<uintptr_t>(factor.data_ptr()) % 16 == 0;
  if (!aligned || factor.scalar_type() != at::kFloat || N < 8 || R % 4) return 0;
  const int64_t down = factor.stride(0), right = factor.stride(1);
  // B lies by rows, and what is added beside a mask, A, across.
  if (right == 1 && down % 4 == 0 && !(flags & DROPS)) return RAW;
  return down == 1 && right % 4 == 0 && !(flags & 24) ? RAW + ACROSS : 0;
}

// A vector dense and in fp32, 16 bytes aligned if asked for: t itself if it is that.
Tensor vector_of(const Device& device, const Tensor& t, bool aligned) {
  if (!t.defined()) return t;
  const bool misplaced = aligned && reinterpret_cast<uintptr_t>(t.data_ptr()) % 16;
  if (t.scalar_type() == at::kFloat && t.is_contiguous() && !misplaced) return t;
  return scale(device, t.unsqueeze(0), at::kFloat, {-1, -1, 1, {}, {}})[0];
}

// A vector dense and in fp32.
Tensor dense(const Tensor& t) { return t.defined() ? cast(t, at::kFloat).contiguous() : t; }

// The warps of a block of row_norm: Form.threads of the twin.
int row_norm_warps(const Form& form) {
  return form.tiles <= 2 && at::elementSize(form.dtype) == 2 ? 12 : 8;
}

}  // namespace

int tiles_of(int64_t R) {
  for (const int tiles : TILES)
    if (8 * tiles >= R) return tiles;
  return TILES.back();
}

bool is_aligned(const Tensor& matrix) {
  const int64_t size = matrix.itemsize();
  return matrix.size(1) % 8 == 0 && reinterpret_cast<uintptr_t>(matrix.data_ptr()) % 16 == 0 &&
         (matrix.stride(1) == 1 || matrix.size(1) == 1) &&
         (matrix.stride(0) * size % 16 == 0 || matrix.size(0) == 1);
}

Tensor flatten_tokens(const Tensor& x) {
  return x.dim() == 2 && x.size(0) != 1 ? x : x.reshape({tokens(x), x.size(-1)});
}

Tensor empty(const Tensor& like, at::IntArrayRef sizes, at::ScalarType dtype) {
  return at::empty(sizes, like.options().dtype(dtype));
}

Split split(const Device& device, int64_t blocks, int64_t steps, int64_t busy) {
  const int64_t wanted = busy * device.multiprocessors / std::max<int64_t>(1, blocks);
  const int64_t each = ceil_div(steps, std::max<int64_t>(1, std::min(wanted, steps / STEPS)));
  return {std::max<int64_t>(1, ceil_div(steps, std::max<int64_t>(1, each))), each};
}

Masks masks_of(int64_t K, const Drop& drop) {
  const double scale = double{PHILOX_STEPS} / (PHILOX_STEPS - drop.threshold);
  return {ceil_div(K, GROUP), drop.threshold * 0x10001u, static_cast<float>(scale)};
}

Tensor small(const Tensor& t) {
  if (!t.defined()) return t;
  const Tensor read = t.scalar_type() == at::kDouble ? t.to(at::kFloat) : t;
  return read.dim() == 1 ? read.contiguous() : read;
}

Tensor scale(const Device& device, const Tensor& given, at::ScalarType dtype, Scaled how) {
  const int64_t rows = how.rows < 0 ? given.size(0) : how.rows;
  const int64_t width = how.width < 0 ? given.size(1) : how.width;
  Tensor out = empty(given, {rows, up_to(width, 8)}, dtype);
  if (out.size(1) != width) out = out.narrow(1, 0, width);
  const Tensor F = small(given), row_scale = small(how.row_scale),
               column_scale = small(how.column_scale), tensor;
  const bool aligned =
      F.scalar_type() == dtype && F.size(1) == width && is_aligned(F) && is_aligned(out);
  device.launch({Stem::scale, dtype, 2, aligned * ALIGNED, how.tf32},
                {ceil_div(rows * ceil_div(width, 8), 256), 1, 1}, F, row_scale, column_scale,
                tensor, out, F.size(0), rows, F.stride(0), F.stride(1), out.stride(0),
                i32(F.size(1)), i32(width), number_of(F), number_of(row_scale),
                number_of(column_scale), 0, static_cast<float>(how.scaling));
  return out;
}

void drop_into(const Device& device, const Tensor& out, const Tensor& x2, const Drop& drop) {
  const int64_t M = x2.size(0), K = x2.size(1);
  const Masks masks = masks_of(K, drop);
  const int flags = (is_aligned(x2) && is_aligned(out)) * ALIGNED;
  device.launch({Stem::drop, out.scalar_type(), 2, flags}, {ceil_div(M * masks.groups, 256), 1, 1},
                x2, drop.seed, out, int64_t{0}, M, x2.stride(0), x2.stride(1), out.stride(0),
                masks.groups, i32(K), masks.threshold, masks.factor);
}

std::pair<Tensor, Tensor> project(const Device& device, const Tensor& x2, const Tensor& given_A,
                                  const Tensor& given_core, const Drop& drop,
                                  at::ScalarType dtype) {
  const int64_t M = x2.size(0), K = x2.size(1), R = given_A.size(0);
  const auto type = x2.scalar_type();
  // Twice as many registers hold fp32.
  const int tiles = std::min(tiles_of(R), x2.itemsize() < 4 ? 16 : 8);
  const Tensor core = small(given_core);
  const int64_t blocks = ceil_div(R, 8 * tiles), high = tiles <= 4 ? 32 : 16;
  const Tensor A = factor_of(device, given_A, type, blocks * 8 * tiles, up_to(K, 8));
  const Masks masks = masks_of(K, drop);
  const auto [count, steps] = split(device, ceil_div(M, high) * blocks, ceil_div(K, 32));
  const bool parts = count > 1 || blocks > 1 || dtype != type || by_product(R, core);
  const Tensor out = parts ? empty(x2, {count, M, R}, at::kFloat) : empty(x2, {M, R}, dtype);
  const Tensor none, own_core = parts ? none : core;
  const Tensor h_core = own_core.defined() ? at::empty_like(out) : none;
  const bool raw = A.scalar_type() != type;
  const int flags = (drop.threshold > 0) * DROPS + is_aligned(x2) * ALIGNED + parts * 4 + raw * 8;
  const auto [core_rows, core_columns] = core_strides(own_core);
  device.launch(form_of(Stem::project, type, tiles, flags), {ceil_div(M, high), count, blocks}, x2,
                A, drop.threshold ? drop.seed : none, out, h_core, own_core, M, x2.stride(0),
                x2.stride(1), A.stride(0), core_rows, core_columns, masks.groups, i32(K), i32(R),
                i32(steps), masks.threshold, masks.factor, core_dims(own_core),
                number_of(own_core));
  if (parts) return finish(device, out, core, masks.factor, dtype);
  return {out, h_core.defined() ? h_core : out};
}

std::pair<Tensor, Tensor> finish(const Device& device, const Tensor& parts,
                                 const Tensor& given_core, float factor, at::ScalarType dtype) {
  const int64_t count = parts.size(0), M = parts.size(1), R = parts.size(2);
  const int tiles = tiles_of(R);
  const bool multiplied = by_product(R, given_core);
  const Tensor none, core = small(given_core), own_core = multiplied ? none : core;
  const Tensor h = empty(parts, {M, R}, dtype);
  const Tensor h_core = own_core.defined() ? at::empty_like(h) : none;
  const auto [core_rows, core_columns] = core_strides(own_core);
  device.launch(form_of(Stem::project_finish, dtype, tiles),
                {ceil_div(M, 16), ceil_div(R, 8 * tiles), 1}, parts, h, h_core, own_core, M,
                core_rows, core_columns, i32(R), i32(count), factor, core_dims(own_core),
                number_of(own_core));
  if (multiplied) return {h, apply_core(h, core)};
  return {h, h_core.defined() ? h_core : h};
}

Tensor sum_parts(const Device& device, const Tensor& parts, float factor, bool root) {
  if (parts.size(0) == 1 && factor == 1 && !root) return parts[0];
  const Tensor out = empty(parts, parts.sizes().slice(1), parts.scalar_type());
  device.launch({Stem::sum_parts, at::kFloat, 2, root}, {ceil_div(out.numel(), 256), 1, 1}, parts,
                out, out.numel(), i32(parts.size(0)), factor);
  return out;
}

std::pair<Tensor, Tensor> quotient(const Device& device, const Tensor& given, const Tensor& first,
                                   const Tensor& second, const Tensor& factor) {
  const int64_t n = given.size(0);
  const Tensor out = empty(second, {n}, at::kFloat), none;
  const Tensor product = factor.defined() ? at::empty_like(out) : none, a = small(given);
  device.launch({Stem::quotient, at::kFloat}, {ceil_div(n, 256), 1, 1}, a, dense(first),
                dense(second), dense(factor), out, product, i32(n), number_of(a));
  return {out, product};
}

std::pair<Tensor, Tensor> gain_operands(const Gain& gain) {
  return {small(gain.magnitude), dense(gain.norm)};
}

Tensor gain_tensor(const Device& device, const Gain& gain) {
  if (!gain.norm.defined()) return gain.magnitude;
  const Tensor none;
  return quotient(device, gain.magnitude, none, gain.norm, none).first;
}

Tensor grad_project(const Device& device, const Tensor& x2, const Tensor& given, const Drop& drop) {
  const auto type = x2.scalar_type();
  Tensor v = given, inverse;
  if (v.scalar_type() != type && type == at::kHalf) std::tie(v, inverse) = scaled_to_fp16(v);
  const int64_t M = x2.size(0), K = x2.size(1), R = v.size(1);
  const bool aligned = is_aligned(x2);
  const int tiles = std::min(tiles_of(R), aligned && x2.itemsize() < 4 ? 8 : 4);
  v = token_factor(device, v, type, tiles);
  const int64_t ranks = v.size(1), blocks = ceil_div(ranks, 8 * tiles);
  const Masks masks = masks_of(K, drop);
  const int64_t busy = drop.threshold ? BLOCKS : MORE_BLOCKS;
  const auto [count, steps] = split(device, ceil_div(K, 64) * blocks, ceil_div(M, 16), busy);
  const Tensor none, out = empty(x2, {count, ranks, K}, at::kFloat);
  const int flags = (drop.threshold > 0) * DROPS + aligned * ALIGNED;
  device.launch(form_of(Stem::grad_project, type, tiles, flags), {ceil_div(K, 64), count, blocks},
                x2, v, drop.threshold ? drop.seed : none, out, M, x2.stride(0), x2.stride(1),
                v.stride(0), masks.groups, steps, i32(K), i32(ranks), masks.threshold,
                count > 1 ? 1.0f : masks.factor);
  Tensor total = sum_parts(device, out, count > 1 ? masks.factor : 1.0f).narrow(0, 0, R);
  return inverse.defined() ? total.mul_(inverse) : total;
}

Tensor token_factor(const Device& device, const Tensor& v, at::ScalarType dtype, int tiles) {
  const int64_t count = std::min(tiles, 8), size = at::elementSize(dtype);
  const int64_t width = std::min<int64_t>(16, count * size);
  const bool fits = v.scalar_type() == dtype && v.size(1) % count == 0 &&
                    (v.stride(1) == 1 || v.size(1) == 1) &&
                    reinterpret_cast<uintptr_t>(v.data_ptr()) % static_cast<size_t>(width) == 0 &&
                    v.stride(0) * size % width == 0;
  return fits ? v : scale(device, v, dtype, {-1, up_to(v.size(1), count), 1, {}, {}});
}

void low_rank_add(const Device& device, const Tensor& out, const Addition& addition) {
  const Tensor& factor = addition.factor;
  const int64_t M = out.size(0), N = out.size(1), R = factor.size(1);
  const auto type = out.scalar_type();
  const Drop& drop = addition.drop;
  const bool aligned = is_aligned(out), gains = addition.gain.defined() || addition.bias.defined();
  const int tiles = std::max(2, tiles_of(R));
  const int flags = (drop.threshold > 0) * DROPS + aligned * ALIGNED + 4 * addition.accumulate +
                    8 * gains + 16 * addition.inner.defined();
  const bool copies = addition.row_scale.defined() || 8 * tiles > 128 / out.itemsize();
  const int raw = copies ? 0 : raw_flags(factor, flags);
  Tensor F = factor, none;
  int64_t F_down = factor.stride(raw == RAW + ACROSS);
  if (!raw) {
    F = scale(device, factor, type,
              {up_to(N, 32),
               up_to(R, std::min(8 * tiles, 64)),
               addition.scaling,
               addition.row_scale,
               {}});
    F_down = F.stride(0);
  }
  const Tensor h = token_factor(device, addition.h, type, 4);
  const auto [m, norm] = gain_operands(addition.gain);
  const Tensor bias = vector_of(device, addition.bias, aligned);
  const Masks masks = masks_of(N, drop);
  const auto [count, steps] = split(device, ceil_div(M, 128), ceil_div(N, 32));
  device.launch(form_of(Stem::low_rank_add, type, tiles, flags + raw), {ceil_div(M, 128), count, 1},
                h, F, none, drop.threshold ? drop.seed : none, m, norm, bias, out, addition.inner,
                M, h.stride(0), F_down, masks.groups, i32(N), i32(h.size(1)), i32(steps),
                masks.threshold, 0, number_of(m), raw ? static_cast<float>(addition.scaling) : 1.0f,
                masks.factor);
}

Tensor row_norm(const Device& device, const Tensor& weight, const Tensor& A, const Tensor& B,
                double scaling, bool by_row) {
  const int64_t N = weight.size(0), K = weight.size(1), R = A.size(0);
  const int tiles = std::max(2, tiles_of(R));
  const int64_t width = up_to(R, std::min(8 * tiles, 64));
  // Beside half precision the factors are multiplied in tf32.
  const bool tf32 = weight.itemsize() < 4 || in_tf32(), many = 8 * tiles > 128 / weight.itemsize();
  // The kernel multiplies s into the factor of the side along which it does not move.
  const int64_t length = by_row ? N : K, along = by_row ? K : N;
  Tensor fixed = by_row ? B : A.t();
  if (many)
    fixed = scale(device, fixed, at::kFloat, {up_to(length, 32), width, scaling, {}, {}, tf32});
  const int aligned = is_aligned(weight) * ALIGNED;
  const bool across = by_row && !many && raw_flags(A.t(), aligned) == RAW + ACROSS;
  const Tensor moving = across ? A
                               : scale(device, by_row ? A.t() : B, at::kFloat,
                                       {up_to(along, 32), width, 1, {}, {}, tf32});
  fixed = cast(fixed, at::kFloat);
  const Tensor &rows = by_row ? fixed : moving, &columns = by_row ? moving : fixed;
  const Form form =
      form_of(Stem::row_norm, weight.scalar_type(), tiles, by_row + aligned + 4 * across);
  // A block has two or three times as many warps as others, which take steps in turn.
  const int64_t blocks = ceil_div(length, 32), in_turn = row_norm_warps(form);
  const auto [count, steps] = split(device, 2 * blocks, ceil_div(along, 32 * in_turn));
  const Tensor none, out = empty(weight, {count, length}, at::kFloat);
  device.launch(form, {blocks, count, 1}, weight, rows, columns, none, out, weight.stride(0),
                weight.stride(1), rows.stride(0), columns.stride(0), fixed.stride(1), i32(N),
                i32(K), i32(R), i32(steps * in_turn), 0, i32(count == 1),
                many ? 1.0f : static_cast<float>(scaling));
  return count == 1 ? out[0] : sum_parts(device, out, 1, true);
}

}  // namespace lorafast::host::cuda
