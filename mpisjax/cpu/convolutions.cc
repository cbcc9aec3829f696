// Convolutions of float32 activity [batch, height, width, channels], called by XLA:CPU.
//
// The convolutions of a spiking stream are small: 16 to 64 channels, 7 to 28 pixels a side, often strided. A
// library makes a matrix of patches and multiplies it, and spends more time on the patches than on the
// product. Here an image is copied once, with its padding, and then read in place: a tile of 8 pixels times
// 48 channels, or 14 times 32, stays in registers while every tap and input channel is added to it
// (tiles.cc).
//
// Only one thing varies: which input pixels an output pixel meets (axes.h). So one routine serves a
// convolution, a strided one, and the transposed one, whose outputs of one phase meet every second tap. An
// image with few active places goes by their list instead (activity.cc). The working copies have a multiple
// of 16 channels; outputs are cropped to theirs.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "activity.h"
#include "axes.h"
#include "share.h"
#include "tiles.h"
#include "xla/ffi/api/ffi.h"

namespace {

using namespace mpisjax;
namespace ffi = xla::ffi;

// Copies a kernel [taps, in, out] with both numbers of channels rounded up.
const float* pad_kernel(const float* kernel, int64_t taps, int64_t in_channels, int64_t out_channels,
                        float* to) {
  const int64_t in = round_up_channels(in_channels), out = round_up_channels(out_channels),
                used = in_channels * out;
  for (int64_t tap = 0; tap < taps; ++tap) {
    pad_channels(kernel + tap * in_channels * out_channels, in_channels, out_channels, out,
                 to + tap * in * out);
    std::memset(to + tap * in * out + used, 0, sizeof(float) * (in * out - used));
  }
  return to;
}

// Lays out a kernel [rows, columns, in, out] in the order in which outputs meet it: [block of output
// channels, column phase, row, column of that phase, in, channel of the block]. With one phase the taps stay
// where they are.
const float* by_phases(const float* kernel, const Axis& rows, const Axis& columns, int64_t in_channels,
                       int64_t out_channels, float* moved, float* to) {
  const int64_t size = in_channels * out_channels;
  if (columns.dilation > 1) {
    float* at = moved;
    for (int64_t phase = 0; phase < columns.dilation; ++phase) {
      const std::vector<TapOffset> met = tap_offsets(columns.taps, columns.dilation, phase, columns.low);
      for (int64_t y = 0; y < rows.taps; ++y) {
        for (const TapOffset& x : met) {
          std::memcpy(at, kernel + (y * columns.taps + x.tap) * size, sizeof(float) * size);
          at += size;
        }
      }
    }
    kernel = moved;
  }
  return by_blocks(kernel, rows.taps * columns.taps * in_channels, out_channels, to);
}

// An image, in the form that is convolved.
struct Image {
  int64_t channels;          // those of the image; the padded copy has zeros behind them
  const float* padded;       // the copy, for tiles
  const Activity* activity;  // the list of active places, or null where the image goes by tiles
};

// Computes the outputs of one phase, for `vectors` vectors of output channels. `weights` is that part of the
// kernel.
void convolve_phase(const Image& image, const Axis& rows, const Axis& columns, int64_t row_phase,
                    int64_t column_phase, int64_t in_channels, int64_t out_channels, int vectors,
                    const float* weights, float* out) {
  const std::vector<TapOffset> down = tap_offsets(rows.taps, rows.dilation, row_phase, rows.low);
  const std::vector<TapOffset> across =
      tap_offsets(columns.taps, columns.dilation, column_phase, columns.low);
  const int64_t height = rows.count(row_phase), width = columns.count(column_phase),
                channels = vectors * kLanes;
  if (height <= 0 || width <= 0) return;
  const int64_t taps = across.size(), out_step = columns.dilation * out_channels;
  const int64_t out_row = rows.dilation * columns.out * out_channels;
  out += (row_phase * columns.out + column_phase) * out_channels;
  if (image.activity && taps && !down.empty()) {
    for (const TapOffset& y : down) {
      const float* row_weights = weights + y.tap * taps * in_channels * channels;
      SparseRow one{across[0].offset, columns.stride, taps, in_channels, row_weights, &y != &down[0]};
      for (int64_t n = 0; n < height; ++n) {
        const int64_t row = n * rows.stride + y.offset;
        const bool outside = row < 0 || row >= rows.in;
        if (outside && one.add) continue;
        SparseRow none = one;
        none.taps = 0;
        add_sparse_row(*image.activity, outside ? 0 : row, outside ? none : one, vectors, width,
                       out + n * out_row, out_step);
      }
    }
    return;
  }
  std::vector<Tap> all;
  for (const TapOffset& y : down) {
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
      const int64_t at = std::min(x, width - pixels);  // the last tile may compute some pixels again
      run(in + at * step, all, image.channels, channels, out + n * out_row + at * out_step, out_step, step);
    }
  }
}

// All outputs of one image.
void convolve(const Image& image, const Axis& rows, const Axis& columns, int64_t in_channels,
              int64_t out_channels, const float* weights, float* out) {
  for (int64_t first = 0; first < out_channels;) {
    const int vectors = vectors_at_a_time((out_channels - first) / kLanes);
    for (int64_t j = 0; j < columns.dilation; ++j) {
      for (int64_t i = 0; i < rows.dilation; ++i) {
        convolve_phase(image, rows, columns, i, j, in_channels, out_channels, vectors, weights, out + first);
      }
      const int64_t taps = tap_offsets(columns.taps, columns.dilation, j, columns.low).size();
      weights += rows.taps * taps * in_channels * vectors * kLanes;
    }
    first += vectors * kLanes;
  }
}

// `numbers`: a version, threads, stride, dilation, rows and columns of zeros before the image.
ffi::Error Convolve(ffi::ThreadPool pool, Array x, Array w, Numbers numbers, Result y) {
  const char* name = "mpisjax_convolve";
  ffi::Error error =
      check(name, {{has_rank(x, 4) && has_rank(w, 4) && has_rank(*y, 4), "the arrays have four axes"},
                   {numbers.element_count() == 6, "there are six numbers"}});
  if (error.failure()) return error;
  const int32_t* number = numbers.typed_data();
  const int64_t threads = number[1], stride = number[2], dilation = number[3], top = number[4],
                left = number[5];
  const auto in = x.dimensions(), kernel = w.dimensions(), out = y->dimensions();
  error = check(
      name, {{in[0] == out[0], "the batches differ"},
             {in[3] == kernel[2], "the input and the kernel differ in channels"},
             {out[3] == kernel[3], "the output and the kernel differ in channels"},
             {stride >= 1 && dilation >= 1 && (stride == 1 || dilation == 1), "stride or dilation is wrong"},
             {top >= 0 && left >= 0 && top <= kernel[0] && left <= kernel[1], "the padding is wrong"}});
  if (error.failure()) return error;
  if (y->element_count() == 0) return ffi::Error::Success();
  const Axis rows(in[1], out[1], kernel[0], stride, dilation, top);
  const Axis columns(in[2], out[2], kernel[1], stride, dilation, left);
  const int64_t in_channels = round_up_channels(in[3]), out_channels = round_up_channels(out[3]);
  const bool even = in[3] == in_channels && out[3] == out_channels;
  const int64_t taps = kernel[0] * kernel[1], size = taps * in_channels * out_channels;
  const int64_t pixels = in[1] * in[2], out_pixels = out[1] * out[2];
  const bool listable = pixels * in_channels < std::numeric_limits<int32_t>::max() - kLanes;
  Scratch kept(ScratchSlot::kKernel, (even ? 2 : 3) * size);
  const float* laid = w.typed_data();
  if (!even) laid = pad_kernel(laid, taps, in[3], out[3], kept.data() + 2 * size);
  const float* weights =
      by_phases(laid, rows, columns, in_channels, out_channels, kept.data(), kept.data() + size);
  share(pool, threads, in[0], [&](int64_t begin, int64_t end) {
    thread_local Activity activity;
    Scratch padded(ScratchSlot::kImage, rows.padded * columns.padded * in_channels);
    Scratch wide(ScratchSlot::kOutput, out[3] == out_channels ? 0 : out_pixels * out_channels);
    for (int64_t b = begin; b < end; ++b) {
      const float* from = x.typed_data() + b * pixels * in[3];
      float* to = y->typed_data() + b * out_pixels * out[3];
      const int64_t count = active(from, pixels * in[3]);
      if (count == 0) {  // as all feedback is before the first step
        std::memset(to, 0, sizeof(float) * out_pixels * out[3]);
        continue;
      }
      const bool sparse = listable && worthwhile(count, pixels * in[3], out_channels);
      if (sparse) {
        activity.list(from, in[1], in[2], in[3], in_channels);
      } else {
        pad(from, rows, columns, in[3], in_channels, padded.data());
      }
      const bool crop = out[3] != out_channels;
      convolve({in[3], padded.data(), sparse ? &activity : nullptr}, rows, columns, in_channels, out_channels,
               weights, crop ? wide.data() : to);
      if (crop) crop_channels(wide.data(), out_pixels, out_channels, out[3], to);
    }
    activity.give_back();
  });
  return ffi::Error::Success();
}

ffi::Error GuardedConvolve(ffi::ThreadPool pool, Array x, Array w, Numbers numbers, Result y) {
  return guarded([&] { return Convolve(pool, x, w, numbers, y); });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(MpisjaxConvolve, GuardedConvolve, ffi_signature());
