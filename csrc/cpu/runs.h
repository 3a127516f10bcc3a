// What differs from group to group, along the flat vector.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace adaqn::cpu {

/// Calls body(run, first, last) for every part first..last of 0..n, elements from `begin` on, that
/// lies in one run.  A run has an `end`, and reaches there from the end of the run before.
template <class Run, class Body>
inline void for_runs(const std::vector<Run>& runs, int64_t begin, int64_t n, const Body& body) {
  auto run = std::upper_bound(runs.begin(), runs.end(), begin,
                              [](int64_t at, const Run& r) { return at < r.end; });
  for (int64_t first = 0; first < n; ++run) {
    const int64_t last = std::min(n, run->end - begin);
    body(*run, first, last);
    first = last;
  }
}

/// The run of element `at`.
template <class Run>
inline const Run& run_at(const std::vector<Run>& runs, int64_t at) {
  return *std::upper_bound(runs.begin(), runs.end(), at,
                           [](int64_t place, const Run& r) { return place < r.end; });
}

}  // namespace adaqn::cpu
