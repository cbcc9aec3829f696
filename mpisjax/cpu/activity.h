// Convolutions that skip what is silent: where a neuron's activity is zero there is nothing to add.
//
// Of spikes a third and less are not zero, of rates (and of the adjoint's cotangents, which a neuron at a bound passes
// nothing of) a third to a half. An image becomes a list of its active places, once; an output pixel's sum then runs over
// the places that its kernel meets, one row of the kernel at a time, and these lie one after another in the list.

#ifndef MPISJAX_NATIVE_ACTIVITY_H_
#define MPISJAX_NATIVE_ACTIVITY_H_

#include <cstdint>
#include <vector>

#include "tiles.h"

namespace mpisjax {

// How many of `count` values are not zero.
int64_t active(const float* values, int64_t count);

// Whether an image with so many active places of `count` is convolved faster by its list than by tiles.
bool worthwhile(int64_t active, int64_t count, int64_t out_channels);

// The active places of an image [rows, columns, channels], in whose kernels there are `wide` channels (`laid_out`); the
// same thread uses the same memory again.
struct Activity {
  int64_t columns;
  std::vector<int32_t> starts;  // [rows, columns + 1]: where a pixel's places begin in the list
  std::vector<int32_t> places;  // column * wide + channel, within a row
  std::vector<float> values;

  void list(const float* image, int64_t rows, int64_t columns, int64_t channels, int64_t wide);
};

// What one row of a kernel adds to a row of `count` outputs, `out_step` floats apart.
struct Sweep {
  int64_t first, stride;    // the first output's first input pixel, and from one output to the next
  int64_t taps;             // pixels that each output meets, from there on
  int64_t in_channels;
  const float* weights;     // [taps, in_channels, vectors * kLanes]
  bool add;                 // to what is there, or in place of it
};

void sweep(const Activity& activity, int64_t row, const Sweep& one, int vectors, int64_t count, float* out,
           int64_t out_step);

}  // namespace mpisjax

#endif  // MPISJAX_NATIVE_ACTIVITY_H_
