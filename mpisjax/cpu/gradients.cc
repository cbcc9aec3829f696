// The gradient of a convolution with respect to its kernel, called by XLA:CPU. 8 input channels times 48
// output channels stay in registers while the routine walks over an image's pixels. Images are padded as for
// the convolution, one after another.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "axes.h"
#include "share.h"
#include "tiles.h"
#include "xla/ffi/api/ffi.h"

namespace {

using namespace mpisjax;
namespace ffi = xla::ffi;

constexpr int kRows = kLanes == 16 ? 8 : 4;  // input channels at a time

// Adds one image's share to a part of one tap's gradient: kRows input channels by `vectors` vectors of output
// channels.
template <int vectors>
void outer(const float* x, const float* g, int64_t height, int64_t width, int64_t x_row, int64_t x_step,
           int64_t g_step, float* gradient, int64_t out_channels) {
  Vec sums[kRows][vectors] = {};
  for (int64_t i = 0; i < height; ++i, x += x_row) {
    const float* at = x;
    for (int64_t j = 0; j < width; ++j, at += x_step, g += g_step) {
      Vec other[vectors];
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) other[v] = load(g + v * kLanes);
#pragma GCC unroll 14
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) sums[r][v] += at[r] * other[v];
      }
    }
  }
#pragma GCC unroll 14
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      float* to = gradient + r * out_channels + v * kLanes;
      store(to, load(to) + sums[r][v]);  // first an image's sum, then the batch's: that rounds less
    }
  }
}

// Threads add up gradients of their own, of so many floats (32 MiB) in all. With larger kernels they share
// the input channels of one gradient instead.
constexpr int64_t kPartialGradients = int64_t{1} << 23;

// A part of the work: the samples and input channels from the first to before the last.
struct Part {
  int64_t first_sample, last_sample, first_channel, last_channel;
};

// Adds a part to a gradient [taps, in, out], whose numbers of channels are rounded up.
void kernel_gradient(const float* x, const float* g, const Part& part, const Axis& rows, const Axis& columns,
                     int64_t x_channels, int64_t g_channels, float* gradient) {
  const int64_t in_channels = round_up_channels(x_channels), out_channels = round_up_channels(g_channels);
  const int64_t pixels = rows.out * columns.out, in_pixels = rows.in * columns.in;
  Scratch padded(ScratchSlot::kImage, rows.padded * columns.padded * in_channels);
  Scratch kept(ScratchSlot::kKernel, pixels * out_channels);
  Scratch wide(ScratchSlot::kOutput, g_channels == out_channels ? 0 : pixels * out_channels);
  for (int64_t b = part.first_sample; b < part.last_sample; ++b) {
    pad(x + b * in_pixels * x_channels, rows, columns, x_channels, in_channels, padded.data());
    const float* of_image = g + b * pixels * g_channels;
    if (g_channels != out_channels) {
      pad_channels(of_image, pixels, g_channels, out_channels, wide.data());
      of_image = wide.data();
    }
    const float* from = by_blocks(of_image, pixels, out_channels, kept.data());
    for (int64_t first = 0; first < out_channels;) {
      const int vectors = vectors_at_a_time((out_channels - first) / kLanes);
      const auto run = vectors == 1 ? outer<1> : vectors == 2 ? outer<2> : outer<kMaxVectors>;
      for (int64_t i = 0; i < rows.taps; ++i) {
        for (int64_t j = 0; j < columns.taps; ++j) {
          const int64_t row = i - rows.low + rows.before, column = j - columns.low + columns.before;
          const float* at = padded.data() + (row * columns.padded + column) * in_channels;
          float* to = gradient + (i * columns.taps + j) * in_channels * out_channels + first;
          for (int64_t c = part.first_channel; c < part.last_channel; c += kRows) {
            run(at + c, from, rows.out, columns.out, rows.stride * columns.padded * in_channels,
                columns.stride * in_channels, vectors * kLanes, to + c * out_channels, out_channels);
          }
        }
      }
      first += vectors * kLanes;
      from += pixels * vectors * kLanes;
    }
  }
}

// `numbers`: a version, threads, stride, rows and columns of zeros before the image.
ffi::Error KernelGradient(ffi::ThreadPool pool, Array x, Array g, Numbers numbers, Result w) {
  const char* name = "mpisjax_kernel_gradient";
  ffi::Error error =
      check(name, {{has_rank(x, 4) && has_rank(g, 4) && has_rank(*w, 4), "the arrays have four axes"},
                   {numbers.element_count() == 5, "there are five numbers"}});
  if (error.failure()) return error;
  const int32_t* number = numbers.typed_data();
  const int64_t threads = number[1], stride = number[2], top = number[3], left = number[4];
  const auto in = x.dimensions(), out = g.dimensions(), kernel = w->dimensions();
  error =
      check(name, {{in[0] == out[0], "the batches differ"},
                   {in[3] == kernel[2], "the input and the kernel differ in channels"},
                   {out[3] == kernel[3], "the output and the kernel differ in channels"},
                   {stride >= 1, "the stride is wrong"},
                   {top >= 0 && left >= 0 && top <= kernel[0] && left <= kernel[1], "the padding is wrong"}});
  if (error.failure()) return error;
  if (w->element_count() == 0) return ffi::Error::Success();
  const Axis rows(in[1], out[1], kernel[0], stride, 1, top);
  const Axis columns(in[2], out[2], kernel[1], stride, 1, left);
  const int64_t in_channels = round_up_channels(in[3]), out_channels = round_up_channels(out[3]);
  const bool even = in[3] == in_channels && out[3] == out_channels;
  const int64_t taps = kernel[0] * kernel[1], size = taps * in_channels * out_channels;
  const int64_t wanted = parts_of(in[0], threads);
  const int64_t sums = std::min(wanted, std::max<int64_t>(1, kPartialGradients / size));
  const int64_t groups = (in[3] + kRows - 1) / kRows;  // of input channels
  const int64_t slices = sums == wanted ? 1 : std::min(groups, (wanted + sums - 1) / sums);
  std::vector<float> others(size * (even ? sums - 1 : sums));
  float* sum = even ? w->typed_data() : others.data() + (sums - 1) * size;
  std::memset(sum, 0, sizeof(float) * size);
  run_parts(pool, threads, sums * slices, [&](int64_t n) {
    const int64_t at = n / slices, slice = n % slices;
    const Part part{at * in[0] / sums, (at + 1) * in[0] / sums, slice * groups / slices * kRows,
                    std::min(in[3], (slice + 1) * groups / slices * kRows)};
    kernel_gradient(x.typed_data(), g.typed_data(), part, rows, columns, in[3], out[3],
                    at ? others.data() + (at - 1) * size : sum);
  });
  for (int64_t other = 0; other + 1 < sums; ++other) {  // in order, so that the result is always the same
    for (int64_t i = 0; i < size; ++i) sum[i] += others[other * size + i];
  }
  for (int64_t tap = 0; !even && tap < taps; ++tap) {
    crop_channels(sum + tap * in_channels * out_channels, in[3], out_channels, out[3],
                  w->typed_data() + tap * in[3] * out[3]);
  }
  return ffi::Error::Success();
}

ffi::Error GuardedKernelGradient(ffi::ThreadPool pool, Array x, Array g, Numbers numbers, Result w) {
  return guarded([&] { return KernelGradient(pool, x, g, numbers, w); });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(MpisjaxKernelGradient, GuardedKernelGradient, ffi_signature());
