#include "axes.h"

#include <algorithm>
#include <cstring>

#include "tiles.h"

namespace mpisjax {

std::vector<Meeting> meetings(int64_t taps, int64_t dilation, int64_t phase, int64_t low) {
  std::vector<Meeting> found;
  for (int64_t k = 0; k < taps; ++k) {
    int64_t reach = phase + k - low;
    if (((reach % dilation) + dilation) % dilation == 0) found.push_back({k, reach / dilation});
  }
  return found;
}

Axis::Axis(int64_t in, int64_t out, int64_t taps, int64_t stride, int64_t dilation, int64_t low)
    : in(in), out(out), taps(taps), stride(stride), dilation(dilation), low(low), before(0), padded(in) {
  int64_t end = in;
  for (int64_t phase = 0; phase < dilation; ++phase) {
    int64_t last = count(phase) - 1;
    if (last < 0) continue;
    for (const Meeting& one : meetings(taps, dilation, phase, low)) {
      before = std::max(before, -one.offset);
      end = std::max(end, last * stride + one.offset + 1);
    }
  }
  padded = before + end;
}

void pad(const float* image, const Axis& rows, const Axis& columns, int64_t channels, int64_t wide, float* padded) {
  const int64_t row = columns.padded * wide, before = columns.before * wide, width = columns.in * wide;
  std::memset(padded, 0, sizeof(float) * rows.before * row);
  for (int64_t y = 0; y < rows.in; ++y) {
    float* to = padded + (rows.before + y) * row;
    std::memset(to, 0, sizeof(float) * before);
    widen(image + y * columns.in * channels, columns.in, channels, wide, to + before);
    std::memset(to + before + width, 0, sizeof(float) * (row - before - width));
  }
  std::memset(padded + (rows.before + rows.in) * row, 0, sizeof(float) * (rows.padded - rows.before - rows.in) * row);
}

}  // namespace mpisjax
