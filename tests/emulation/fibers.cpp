// Not compiled for ThreadSanitizer, which therefore sees what the kernels do and nothing of this.
#include "fibers.h"

#include <ucontext.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <vector>

#include "order.h"

namespace emulation {
namespace {

constexpr size_t kStackBytes = order::kObserved ? 256 << 10 : 64 << 10;  // reports need some
constexpr size_t kCanaryBytes = 16 << 10;
constexpr unsigned char kFill = 0xff;  // NaN in every floating-point format

struct Barrier {
  const char* name;
  unsigned expected = 0, arrived = 0, generation = 0;
  // Released on arrival and acquired on leaving, by turns: the first to leave may arrive again
  // before the last has left.
  char meeting[2] = {};
};

struct Warp {
  Barrier barrier{"warp"};
  uint64_t lane[32];
};

struct Block {
  uint3 index;
  Barrier barrier{"block"};
  std::vector<Warp> warps;
  std::vector<unsigned char> shared;
};

/// Where a fiber, or the scheduler, goes on.
struct Point {
  void* registers[5];
  order::Thread thread;
};

/// What fibers run on, one after the other.
struct Host {
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  order::Thread thread = order::make_thread();
};

struct Fiber {
  Block* block;
  uint3 thread;
  ucontext_t start;
  Point point;
  bool started = false, done = false;
  Barrier* waits_for = nullptr;
  unsigned generation = 0;
};

std::vector<Host> hosts;
Fiber* current = nullptr;
Point scheduler;
Barrier* grid_barrier = nullptr;
std::function<void()> body;
char launch_begins, launch_ends;  // what orders launches

// ------------------------------------------------------------------ fibers

[[gnu::noinline]] void go_on(Point& there) { __builtin_longjmp(there.registers, 1); }

/// Goes on there; returns when somebody goes on here.
[[gnu::noinline]] void leave(Point& here, Point& there) {
  order::become(there.thread);
  if (!__builtin_setjmp(here.registers)) go_on(there);
}

[[gnu::noinline]] void start(Point& here, Fiber& fiber) {
  order::become(fiber.point.thread);
  if (!__builtin_setjmp(here.registers)) setcontext(&fiber.start);
}

void run_fiber() {
  order::acquire(&launch_begins);
  body();
  order::release(&launch_ends);
  current->done = true;
  leave(current->point, scheduler);
}

/// Returns when the fiber waits at a barrier or has left the kernel.
void resume(Fiber& fiber) {
  current = &fiber;
  threadIdx = fiber.thread;
  blockIdx = fiber.block->index;
  if (fiber.started) return leave(scheduler, fiber.point);
  fiber.started = true;
  start(scheduler, fiber);
}

void arrive(Barrier& barrier) {
  if (++barrier.arrived == barrier.expected) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  current->waits_for = &barrier;
  current->generation = barrier.generation;
  leave(current->point, scheduler);
  current->waits_for = nullptr;
}

void meet(Barrier& barrier, const Place& place) {
  const char* file = std::strrchr(place.file, '/');
  if (place.line == omitted_line && (file ? file + 1 : place.file) == omitted_file) return;
  char* meeting = &barrier.meeting[barrier.generation % 2];
  order::release(meeting);
  arrive(barrier);
  order::acquire(meeting);
}

// ------------------------------------------------------------------ launches

Host& host(size_t i) {
  while (hosts.size() <= i) hosts.emplace_back();
  return hosts[i];
}

void add_fibers(std::vector<Fiber>& fibers, Block& block, size_t first_host) {
  for (unsigned t = 0; t < blockDim.x; ++t) {
    Host& own = host(first_host + t);
    Fiber& fiber = fibers.emplace_back();
    fiber.block = &block;
    fiber.thread = {t, 0, 0};
    fiber.point.thread = own.thread;
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = own.stack.get();
    fiber.start.uc_stack.ss_size = kStackBytes;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, run_fiber, 0);
  }
}

/// Whether any of them could move.
bool resume_all(Fiber* begin, Fiber* end) {
  bool moved = false;
  for (Fiber* fiber = begin; fiber != end; ++fiber) {
    const Barrier* barrier = fiber->waits_for;
    if (fiber->done || (barrier && barrier->generation == fiber->generation)) continue;
    resume(*fiber);
    moved = true;
  }
  return moved;
}

void run_fibers(std::vector<Fiber>& fibers) {
  if (reverse_order) std::reverse(fibers.begin(), fibers.end());
  // Each block goes as far as it can before the next one moves, so that blocks drift apart.
  for (bool progress = true; progress;) {
    progress = false;
    for (size_t first = 0; first < fibers.size(); first += blockDim.x) {
      while (resume_all(&fibers[first], &fibers[first] + blockDim.x)) progress = true;
    }
  }
  size_t waiting = 0, left = 0;
  std::string where;
  for (const Fiber& fiber : fibers) {
    ++(fiber.done ? left : waiting);
    if (!fiber.done) where = fiber.waits_for->name;
  }
  if (!waiting) return;
  for (Host& own : hosts) order::end_thread(own.thread);  // some are in the middle of a kernel
  hosts.clear();
  throw std::runtime_error("deadlock: " + std::to_string(waiting) + " threads wait at a " + where +
                           " barrier, " + std::to_string(left) + " have left the kernel");
}

Block make_block(unsigned index, size_t shared_bytes) {
  Block block;
  block.index = {index % gridDim.x, index / gridDim.x, 0};
  block.barrier.expected = blockDim.x;
  block.warps.resize((blockDim.x + 31) / 32);
  for (size_t w = 0; w < block.warps.size(); ++w)
    block.warps[w].barrier.expected = std::min<size_t>(32, blockDim.x - 32 * w);
  block.shared.assign(shared_bytes + kCanaryBytes, kFill);
  return block;
}

void check_shared(const Block& block) {
  for (size_t i = block.shared.size() - kCanaryBytes; i < block.shared.size(); ++i)
    if (block.shared[i] != kFill) throw std::runtime_error("write past the end of shared memory");
}

/// The first host of the block, of which no other fiber is under way.  A host's fibers are ordered,
/// so where races are looked for, blocks have hosts of their own, as far as there may be as many.
size_t first_host(size_t block, bool cooperative) {
  constexpr size_t kMostThreads = 7 << 10;  // that ThreadSanitizer tells apart, and a few
  const size_t blocks = kMostThreads / blockDim.x;
  if (cooperative && order::kObserved && block >= blocks)
    throw std::runtime_error("more threads at once than ThreadSanitizer knows");
  if (cooperative) return block * blockDim.x;
  return order::kObserved ? block % blocks * blockDim.x : 0;
}

}  // namespace

void launch(dim3 grid, dim3 threads, size_t shared_bytes, bool cooperative,
            std::function<void()> body_) {
  ++launches;
  gridDim = grid;
  blockDim = threads;
  body = std::move(body_);
  scheduler.thread = order::this_thread();
  std::vector<Block> blocks;
  for (unsigned b = 0; b < grid.x * grid.y; ++b) blocks.push_back(make_block(b, shared_bytes));
  if (reverse_order) std::reverse(blocks.begin(), blocks.end());
  Barrier whole_grid{"grid"};
  whole_grid.expected = grid.x * grid.y * threads.x;
  grid_barrier = cooperative ? &whole_grid : nullptr;
  std::vector<Fiber> fibers;
  fibers.reserve(cooperative ? whole_grid.expected : threads.x);
  order::release(&launch_begins);
  for (size_t b = 0; b < blocks.size(); ++b) {
    add_fibers(fibers, blocks[b], first_host(b, cooperative));
    if (cooperative) continue;
    run_fibers(fibers);
    fibers.clear();
  }
  if (cooperative) run_fibers(fibers);
  order::acquire(&launch_ends);
  for (Block& block : blocks) check_shared(block);
}

unsigned char* shared_memory() { return current->block->shared.data(); }

void wait_for_block(const Place& place) { meet(current->block->barrier, place); }

void wait_for_grid(const Place& place) { meet(*grid_barrier, place); }

uint64_t exchange(uint64_t bits, unsigned source) {
  Warp& warp = current->block->warps[threadIdx.x / 32];
  warp.lane[threadIdx.x % 32] = bits;
  arrive(warp.barrier);
  const uint64_t result = warp.lane[source % 32];
  arrive(warp.barrier);
  return result;
}

}  // namespace emulation
