// What orders memory accesses of different threads, told to ThreadSanitizer where the kernels are
// compiled for it (ADAQN_EMULATE_RACES): then every CUDA thread is a thread of its own to it, and
// accesses that nothing here orders are reported as a race.  Elsewhere nothing.

#pragma once

#ifdef ADAQN_EMULATE_RACES

#include <sanitizer/tsan_interface.h>

namespace emulation::order {

using Thread = void*;

constexpr bool kObserved = true;

inline Thread this_thread() { return __tsan_get_current_fiber(); }
inline Thread make_thread() { return __tsan_create_fiber(0); }
inline void end_thread(Thread thread) { __tsan_destroy_fiber(thread); }
/// What follows is done by that thread; it is not ordered after what came before.
inline void become(Thread thread) {
  __tsan_switch_to_fiber(thread, __tsan_switch_to_fiber_no_sync);
}
/// What a thread did before it released `at` comes before what another does after it acquires it.
inline void release(void* at) { __tsan_release(at); }
inline void acquire(void* at) { __tsan_acquire(at); }

}  // namespace emulation::order

#else

namespace emulation::order {

struct Thread {};

constexpr bool kObserved = false;

inline Thread this_thread() { return {}; }
inline Thread make_thread() { return {}; }
inline void end_thread(Thread) {}
inline void become(Thread) {}
inline void release(void*) {}
inline void acquire(void*) {}

}  // namespace emulation::order

#endif
