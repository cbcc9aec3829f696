// Which input pixels an output pixel meets, by direction, and images with the zeros around them that it asks for.

#ifndef MPISJAX_NATIVE_AXES_H_
#define MPISJAX_NATIVE_AXES_H_

#include <cstdint>
#include <vector>

namespace mpisjax {

// The taps of one direction that outputs of one phase meet, and where: (tap, offset in input pixels).
struct Meeting {
  int64_t tap, offset;
};

std::vector<Meeting> meetings(int64_t taps, int64_t dilation, int64_t phase, int64_t low);

// One direction: sizes, and how an output's coordinate becomes an input's.
struct Axis {
  int64_t in, out, taps, stride, dilation, low;
  int64_t before, padded;  // zeros before, and the size with all zeros

  Axis(int64_t in, int64_t out, int64_t taps, int64_t stride, int64_t dilation, int64_t low);

  // Outputs of a phase.
  int64_t count(int64_t phase) const { return phase < out ? (out - phase + dilation - 1) / dilation : 0; }
};

// An image [rows, columns, channels] with zeros around it, and behind its channels up to `wide`.
void pad(const float* image, const Axis& rows, const Axis& columns, int64_t channels, int64_t wide, float* padded);

}  // namespace mpisjax

#endif  // MPISJAX_NATIVE_AXES_H_
