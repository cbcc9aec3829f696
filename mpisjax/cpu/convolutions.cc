// Convolutions of float32 activity [batch, height, width, channels], called by XLA:CPU.
//
// The convolutions of a spiking stream are small: 16 to 64 channels, 7 to 28 pixels a side, often strided. A library's
// way, a matrix product of patches, spends more time on making the patches than on the product. Here an image is copied
// once, with its padding, and then read in place: a tile of 8 pixels times 48 channels, or 14 times 32, is held in
// registers while every tap and input channel is added to it (tiles.cc).
//
// What varies is which input pixels an output pixel meets, so that one routine serves a convolution, a strided one, and
// the transposed one, whose outputs of one phase meet every second tap. An image of which little is active goes by the
// list of that instead (activity.cc). Channels in other than multiples of 16 are laid out as the next one (`laid_out`), in
// the copies; only outputs are copied once more for it.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "activity.h"
#include "axes.h"
#include "share.h"
#include "tiles.h"
#include "xla/ffi/api/ffi.h"

namespace {

using namespace mpisjax;
namespace ffi = xla::ffi;

// A kernel [taps, in, out] as its channels are laid out.
const float* wide_kernel(const float* kernel, int64_t taps, int64_t in_channels, int64_t out_channels, float* to) {
  const int64_t in = laid_out(in_channels), out = laid_out(out_channels), used = in_channels * out;
  for (int64_t tap = 0; tap < taps; ++tap) {
    widen(kernel + tap * in_channels * out_channels, in_channels, out_channels, out, to + tap * in * out);
    std::memset(to + tap * in * out + used, 0, sizeof(float) * (in * out - used));
  }
  return to;
}

// Kernels [rows, columns, in, out] as outputs of one phase meet them, `by_blocks`: [block, phase, row, column of that
// phase, in, channels of the block]. With one phase nothing moves.
const float* by_phases(const float* kernel, const Axis& rows, const Axis& columns, int64_t in_channels,
                       int64_t out_channels, float* moved, float* to) {
  const int64_t size = in_channels * out_channels;
  if (columns.dilation > 1) {
    float* at = moved;
    for (int64_t phase = 0; phase < columns.dilation; ++phase) {
      const std::vector<Meeting> met = meetings(columns.taps, columns.dilation, phase, columns.low);
      for (int64_t y = 0; y < rows.taps; ++y) {
        for (const Meeting& x : met) {
          std::memcpy(at, kernel + (y * columns.taps + x.tap) * size, sizeof(float) * size);
          at += size;
        }
      }
    }
    kernel = moved;
  }
  return by_blocks(kernel, rows.taps * columns.taps * in_channels, out_channels, to);
}

// A convolution of one image, and which way it goes.
struct Image {
  int64_t channels;          // of those that are laid out, the others being zero
  const float* padded;       // by tiles
  const Activity* activity;  // or, where that is null, by what is active
};

// The outputs of one phase, `vectors` vectors of their channels; the phase's part of the kernel.
void convolve_phase(const Image& image, const Axis& rows, const Axis& columns, int64_t row_phase, int64_t column_phase,
                    int64_t in_channels, int64_t out_channels, int vectors, const float* weights, float* out) {
  const std::vector<Meeting> down = meetings(rows.taps, rows.dilation, row_phase, rows.low);
  const std::vector<Meeting> across = meetings(columns.taps, columns.dilation, column_phase, columns.low);
  const int64_t height = rows.count(row_phase), width = columns.count(column_phase), channels = vectors * kLanes;
  if (height <= 0 || width <= 0) return;
  const int64_t taps = across.size(), out_step = columns.dilation * out_channels;
  const int64_t out_row = rows.dilation * columns.out * out_channels;
  out += (row_phase * columns.out + column_phase) * out_channels;
  if (image.activity && taps && !down.empty()) {
    for (const Meeting& y : down) {
      const float* row_weights = weights + y.tap * taps * in_channels * channels;
      Sweep one{across[0].offset, columns.stride, taps, in_channels, row_weights, &y != &down[0]};
      for (int64_t n = 0; n < height; ++n) {
        const int64_t row = n * rows.stride + y.offset;
        const bool outside = row < 0 || row >= rows.in;
        if (outside && one.add) continue;
        Sweep none = one;
        none.taps = 0;
        sweep(*image.activity, outside ? 0 : row, outside ? none : one, vectors, width, out + n * out_row, out_step);
      }
    }
    return;
  }
  std::vector<Tap> all;
  for (const Meeting& y : down) {
    for (int64_t x = 0; x < taps; ++x) {
      const int64_t offset = (rows.before + y.offset) * columns.padded + columns.before + across[x].offset;
      all.push_back({offset * in_channels, weights + (y.tap * taps + x) * in_channels * channels});
    }
  }
  const int64_t step = columns.stride * in_channels;
  const int pixels = pixels_at_a_time(width, vectors);
  const Tile run = find_tile(vectors, pixels, step);
  for (int64_t n = 0; n < height; ++n) {
    const float* in = image.padded + n * rows.stride * columns.padded * in_channels;
    for (int64_t x = 0; x < width; x += pixels) {
      const int64_t at = std::min(x, width - pixels);  // the last tile may do some pixels again
      run(in + at * step, all, image.channels, channels, out + n * out_row + at * out_step, out_step, step);
    }
  }
}

void convolve(const Image& image, const Axis& rows, const Axis& columns, int64_t in_channels, int64_t out_channels,
              const float* weights, float* out) {
  for (int64_t first = 0; first < out_channels;) {
    const int vectors = vectors_at_a_time((out_channels - first) / kLanes);
    for (int64_t j = 0; j < columns.dilation; ++j) {
      for (int64_t i = 0; i < rows.dilation; ++i) {
        convolve_phase(image, rows, columns, i, j, in_channels, out_channels, vectors, weights, out + first);
      }
      const int64_t taps = meetings(columns.taps, columns.dilation, j, columns.low).size();
      weights += rows.taps * taps * in_channels * vectors * kLanes;
    }
    first += vectors * kLanes;
  }
}

// `numbers`: a version, threads, stride, dilation, rows and columns of zeros before.
ffi::Error Convolve(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> w,
                    ffi::Buffer<ffi::S32> numbers, ffi::ResultBuffer<ffi::F32> y) {
  const int32_t* number = numbers.typed_data();
  const int64_t threads = number[1], stride = number[2], dilation = number[3], top = number[4], left = number[5];
  const auto in = x.dimensions(), kernel = w.dimensions(), out = y->dimensions();
  const Axis rows(in[1], out[1], kernel[0], stride, dilation, top);
  const Axis columns(in[2], out[2], kernel[1], stride, dilation, left);
  const int64_t in_channels = laid_out(in[3]), out_channels = laid_out(out[3]);
  const bool even = in[3] == in_channels && out[3] == out_channels;
  const int64_t taps = kernel[0] * kernel[1], size = taps * in_channels * out_channels;
  const int64_t pixels = in[1] * in[2], out_pixels = out[1] * out[2];
  float* kept = scratch(1, (even ? 2 : 3) * size);
  const float* laid = w.typed_data();
  if (!even) laid = wide_kernel(laid, taps, in[3], out[3], kept + 2 * size);
  const float* weights = by_phases(laid, rows, columns, in_channels, out_channels, kept, kept + size);
  share(pool, threads, in[0], [&](int64_t, int64_t begin, int64_t end) {
    thread_local Activity activity;
    float* padded = scratch(0, rows.padded * columns.padded * in_channels);
    float* wide = out[3] == out_channels ? nullptr : scratch(2, out_pixels * out_channels);
    for (int64_t b = begin; b < end; ++b) {
      const float* from = x.typed_data() + b * pixels * in[3];
      float* to = y->typed_data() + b * out_pixels * out[3];
      const int64_t count = active(from, pixels * in[3]);
      if (count == 0) {  // as all feedback is before the first step
        std::memset(to, 0, sizeof(float) * out_pixels * out[3]);
        continue;
      }
      const bool sparse = worthwhile(count, pixels * in[3], out_channels);
      if (sparse) {
        activity.list(from, in[1], in[2], in[3], in_channels);
      } else {
        pad(from, rows, columns, in[3], in_channels, padded);
      }
      convolve({in[3], padded, sparse ? &activity : nullptr}, rows, columns, in_channels, out_channels, weights,
               wide ? wide : to);
      if (wide) narrow(wide, out_pixels, out_channels, out[3], to);
    }
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(MpisjaxConvolve, Convolve, bound());
