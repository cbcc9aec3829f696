// Convolutions that skip silent places: where a neuron's activity is zero there is nothing to add.
//
// A third of all spikes or fewer are not zero. Of the rates, and of the cotangents of the backward solve, a
// third to a half are not zero (a neuron at a bound passes no cotangent on). An image becomes a list of its
// active places, once. An output pixel's sum then runs over the places that its kernel covers, one row of the
// kernel at a time. The places of a row lie one after another in the list.

#ifndef MPISJAX_CPU_ACTIVITY_H_
#define MPISJAX_CPU_ACTIVITY_H_

#include <cstdint>
#include <vector>

#include "tiles.h"

namespace mpisjax {

// How many of `count` values are not zero.
int64_t active(const float* values, int64_t count);

// Whether an image with `active` places of `count` is convolved faster by its list than by tiles.
bool worthwhile(int64_t active, int64_t count, int64_t out_channels);

// The active places of an image [rows, columns, channels]. A thread uses its memory again for the next image.
struct Activity {
  int64_t columns;
  std::vector<int32_t> starts;  // [rows, columns + 1]: where a pixel's places begin in the list
  std::vector<int32_t> places;  // column * padded_channels + channel, within a row
  std::vector<float> values;

  // `padded_channels` is how many input channels the kernels have in memory.
  void list(const float* image, int64_t rows, int64_t columns, int64_t channels, int64_t padded_channels);

  // Gives the memory back if it is larger than a thread should keep.
  void give_back();
};

// What one row of a kernel adds to a row of outputs.
struct SparseRow {
  int64_t first, stride;  // the first output's first input pixel, and the distance to the next output's
  int64_t taps;           // how many pixels each output covers, from there on
  int64_t in_channels;
  const float* weights;  // [taps, in_channels, vectors * kLanes]
  bool add;              // add to the outputs; otherwise replace them
};

// Does so for `count` outputs, which lie `out_step` floats apart.
void add_sparse_row(const Activity& activity, int64_t row, const SparseRow& one, int vectors, int64_t count,
                    float* out, int64_t out_step);

}  // namespace mpisjax

#endif  // MPISJAX_CPU_ACTIVITY_H_
