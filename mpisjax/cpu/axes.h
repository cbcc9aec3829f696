// One direction of a convolution: which input pixels an output pixel meets. And images with the zeros that
// this asks for.

#ifndef MPISJAX_CPU_AXES_H_
#define MPISJAX_CPU_AXES_H_

#include <cstdint>
#include <vector>

namespace mpisjax {

// A tap that the outputs of one phase meet, and where it falls: so many input pixels from the output's place.
struct TapOffset {
  int64_t tap, offset;
};

std::vector<TapOffset> tap_offsets(int64_t taps, int64_t dilation, int64_t phase, int64_t low);

// One direction: its sizes, and how an output's coordinate becomes an input's.
// An output meets the input pixels (stride * output + tap - low) / dilation, for each tap where that is a
// whole number. Outputs that lie `dilation` apart meet the same taps: they are one phase.
struct Axis {
  int64_t in, out, taps, stride, dilation, low;
  int64_t before, padded;  // zeros before the image, and the size with all zeros

  Axis(int64_t in, int64_t out, int64_t taps, int64_t stride, int64_t dilation, int64_t low);

  // How many outputs a phase has.
  int64_t count(int64_t phase) const { return phase < out ? (out - phase + dilation - 1) / dilation : 0; }
};

// Copies an image [rows, columns, channels] with zeros around it, and zeros behind its channels up to
// `padded_channels`.
void pad(const float* image, const Axis& rows, const Axis& columns, int64_t channels, int64_t padded_channels,
         float* to);

}  // namespace mpisjax

#endif  // MPISJAX_CPU_AXES_H_
