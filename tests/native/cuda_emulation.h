// Runs CUDA kernels on the CPU, so that tests see what a whole kernel computes without a GPU.
//
// Compile the .cu file as C++ with -Itests/native/cuda_headers first, which takes the place of
// <cuda_runtime.h>; for inline PTX, include ptx_emulation.h before csrc/cuda/ptx.h, whose place it takes.
// Kernels are launched with cudaLaunchKernelEx, which is plain C++, or by a test with emulation::launch(grid,
// block, shared_bytes, body).
//
// Every CUDA thread is a fiber; fibers are switched only where a thread waits for others, in an order drawn
// from emulation::settings.seed. Shared memory is poisoned with NaN before a block starts. A kernel fails,
// with the thread and the reason, where it deadlocks, where the lanes of a warp reach different collectives,
// where an access that the emulated instructions make is misaligned or leaves the memory that the test has
// named with emulation::allow, and where a block leaves an asynchronous copy unfinished.
//
// Static __shared__ variables work but keep their values between blocks; prefer extern shared memory through
// emulation::dynamic_shared(), which ptx.h calls ptx::dynamic_shared().
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __maxnreg__(...)
#define __grid_constant__
#define __constant__ const
#define __shared__ static
#define __align__(n) alignas(n)
// What is compiled for the chip alone is compiled here.
#define __CUDA_ARCH_FEAT_SM90_ALL 1

struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
#define MSP_VECTORS(scalar, name)                                        \
    struct alignas(2 * sizeof(scalar)) name##2 { scalar x, y; };         \
    struct alignas(4 * sizeof(scalar)) name##4 { scalar x, y, z, w; };   \
    inline name##2 make_##name##2(scalar x, scalar y) { return {x, y}; } \
    inline name##4 make_##name##4(scalar x, scalar y, scalar z, scalar w) { return {x, y, z, w}; }
MSP_VECTORS(float, float)
MSP_VECTORS(int, int)
MSP_VECTORS(unsigned, uint)
#undef MSP_VECTORS

// Those of the thread that runs.
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace emulation {

struct Settings {
    uint64_t seed = 0;
    int major = 8, minor = 0;
    int multiprocessors = 4;
    size_t most_shared = 227 << 10;
};
inline Settings settings;

struct Failure : std::runtime_error {
    using std::runtime_error::runtime_error;
};

struct Block;

struct Thread {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    uint3 index{};
    int linear = 0;
    Block* block = nullptr;
    bool done = false;
    // It may run once the counter differs from what it saw.
    const uint64_t* counter = nullptr;
    uint64_t seen = 0;
    std::string waits_in;
    // Deferred work of asynchronous instructions, one list a committed group.
    std::vector<std::function<void()>> open_copies;
    std::deque<std::vector<std::function<void()>>> copies;
};

// Threads that must all arrive before any goes on.
struct Gathering {
    const char* name = nullptr;
    uint32_t arrived = 0;
    uint64_t generation = 0;
    void* lanes[32] = {};
};

struct Warp {
    std::map<uint32_t, Gathering> gatherings;  // by mask of lanes
    std::vector<std::function<void()>> open_products;
    std::deque<std::vector<std::function<void()>>> products;
};

struct Barrier {
    unsigned arrived = 0;
    uint64_t generation = 0;
};

struct Cluster;

struct Block {
    uint3 index{};
    unsigned rank = 0;
    Cluster* cluster = nullptr;
    std::vector<Thread> threads;
    std::vector<Warp> warps;
    Barrier barriers[16];
    unsigned char* shared = nullptr;
    size_t shared_bytes = 0;
};

// An mbarrier: what it still waits for in this phase.
struct MemoryBarrier {
    int arrivals, pending;
    int64_t bytes;
    uint64_t phase;
};

// The blocks that run at the same time; one where a launch names no cluster.
struct Cluster {
    std::vector<Block> blocks;
    std::vector<std::function<void()>> in_flight;  // bulk copies, done in any order
    Barrier barrier;
    std::map<const void*, MemoryBarrier> memory_barriers;
};

inline Thread* current = nullptr;
inline ucontext_t scheduler;
inline std::string failure;
inline std::function<void()> body;
inline std::mt19937_64 random;

struct Range {
    const unsigned char* begin;
    const unsigned char* end;
    bool writable;
};
inline std::vector<Range> ranges;

// Global memory that emulated instructions may touch; with none named, all of it.
inline void allow(const void* memory, size_t bytes, bool writable) {
    const auto* begin = static_cast<const unsigned char*>(memory);
    ranges.push_back({begin, begin + bytes, writable});
}

[[noreturn]] inline void fail(const std::string& why) {
    std::string where;
    if (current != nullptr) {
        where = "block " + std::to_string(current->block->index.x) + "," +
                std::to_string(current->block->index.y) + "," + std::to_string(current->block->index.z) +
                " thread " + std::to_string(current->linear) + ": ";
    }
    throw Failure(where + why);
}

inline void require(bool condition, const char* why) {
    if (!condition) fail(why);
}

inline void check_global(const void* memory, size_t bytes, bool writes, const char* name) {
    if (reinterpret_cast<uintptr_t>(memory) % bytes != 0) fail(std::string(name) + ": misaligned address");
    if (ranges.empty()) return;
    const auto* begin = static_cast<const unsigned char*>(memory);
    for (const Range& range : ranges) {
        if (begin >= range.begin && begin + bytes <= range.end && (range.writable || !writes)) return;
    }
    fail(std::string(name) + ": global access outside of all tensors");
}

// Give the other threads a turn until `counter` changes.
inline void wait_for_change(const uint64_t& counter, const std::string& name) {
    Thread* self = current;
    self->counter = &counter;
    self->seen = counter;
    self->waits_in = name;
    swapcontext(&self->context, &scheduler);
    self->counter = nullptr;
}

inline int lane() { return current->linear % 32; }
inline Warp& warp() { return current->block->warps[static_cast<size_t>(current->linear / 32)]; }

// All lanes of `mask` pass their arguments; the last to come runs `run(lanes)` with a pointer to each one's
// (null outside of the mask), then all go on.
template <class Args, class Run>
void collective(const char* name, uint32_t mask, Args& args, Run&& run) {
    require(mask >> lane() & 1, "a lane outside of its own mask");
    Gathering& gathering = warp().gatherings[mask];
    if (gathering.arrived != 0 && std::strcmp(gathering.name, name) != 0) {
        fail(std::string("lanes of a warp are in ") + gathering.name + " and in " + name);
    }
    gathering.name = name;
    gathering.arrived |= 1u << lane();
    gathering.lanes[lane()] = &args;
    if (gathering.arrived != mask) {
        wait_for_change(gathering.generation, name);
        return;
    }
    Args* lanes[32];
    for (int i = 0; i < 32; ++i) lanes[i] = mask >> i & 1 ? static_cast<Args*>(gathering.lanes[i]) : nullptr;
    gathering.arrived = 0;
    run(lanes);
    ++gathering.generation;
}

inline void arrive(Barrier& barrier, unsigned count, bool waits, const char* name) {
    if (++barrier.arrived == count) {
        barrier.arrived = 0;
        ++barrier.generation;
    } else if (waits) {
        wait_for_change(barrier.generation, name);
    }
}

inline unsigned threads_per_block() { return blockDim.x * blockDim.y * blockDim.z; }

inline void named_barrier(int id, unsigned count, bool waits = true) {
    require(id >= 0 && id < 16 && count % 32 == 0 && count <= threads_per_block(), "no such named barrier");
    arrive(current->block->barriers[id], count, waits, "a block barrier");
}

template <class T = unsigned char>
T* dynamic_shared() {
    return reinterpret_cast<T*>(current->block->shared);
}

// Shared addresses are 32 bits wide, as on the device: the block's rank in the cluster, then the offset. They
// start at 1 KiB, so that 0 is nobody's.
constexpr uint32_t kSharedBase = 1024;

inline uint32_t shared_address(const void* pointer) {
    const auto* byte = static_cast<const unsigned char*>(pointer);
    const Block& block = *current->block;
    require(byte >= block.shared && byte <= block.shared + block.shared_bytes, "no pointer to shared memory");
    return (block.rank << 24) + kSharedBase + static_cast<uint32_t>(byte - block.shared);
}

// The memory behind a shared address, checked.
inline unsigned char* shared_memory(uint32_t address, size_t bytes, size_t alignment, const char* name) {
    Cluster& cluster = *current->block->cluster;
    const uint32_t rank = address >> 24, offset = (address & 0xffffff) - kSharedBase;
    if (rank >= cluster.blocks.size()) fail(std::string(name) + ": no such block in the cluster");
    Block& block = cluster.blocks[rank];
    if (offset + bytes > block.shared_bytes) fail(std::string(name) + ": access outside of shared memory");
    if (address % alignment != 0) fail(std::string(name) + ": misaligned shared address");
    return block.shared + offset;
}

inline void enter() {
    try {
        body();
        require(current->open_copies.empty() && current->copies.empty(), "cp.async left unfinished");
        require(warp().open_products.empty() && warp().products.empty(), "wgmma left unfinished");
    } catch (const std::exception& error) {
        if (failure.empty()) failure = error.what();
    }
    current->done = true;
    swapcontext(&current->context, &scheduler);
}

inline void start(Thread& thread) {
    constexpr size_t kStack = 128 << 10;
    thread.stack.reset(new char[kStack]);
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = kStack;
    thread.context.uc_link = &scheduler;
    makecontext(&thread.context, enter, 0);
}

inline void complete_one(Cluster& cluster) {
    const size_t chosen = random() % cluster.in_flight.size();
    std::swap(cluster.in_flight[chosen], cluster.in_flight.back());
    const std::function<void()> copy = std::move(cluster.in_flight.back());
    cluster.in_flight.pop_back();
    copy();
}

inline void run_cluster(Cluster& cluster) {
    std::vector<Thread*> waiting;
    for (Block& block : cluster.blocks) {
        for (Thread& thread : block.threads) waiting.push_back(&thread);
    }
    for (bool moved = true; !waiting.empty();) {
        // whole warps in any order, lanes of one in any order
        std::shuffle(waiting.begin(), waiting.end(), random);
        moved = false;
        for (Thread* thread : waiting) {
            if (thread->counter != nullptr && *thread->counter == thread->seen) continue;
            moved = true;
            current = thread;
            threadIdx = thread->index;
            blockIdx = thread->block->index;
            swapcontext(&scheduler, &thread->context);
            if (!failure.empty()) throw Failure(failure);
        }
        current = nullptr;
        waiting.erase(std::remove_if(waiting.begin(), waiting.end(), [](Thread* t) { return t->done; }),
                      waiting.end());
        if (!cluster.in_flight.empty() && (!moved || random() % 4 == 0)) {
            current = &cluster.blocks[0].threads[0];  // for the messages of a failing copy
            complete_one(cluster);
            current = nullptr;
            moved = true;
        }
        if (!moved && !waiting.empty()) {
            current = waiting.front();
            fail("deadlock, with " + std::to_string(waiting.size()) + " threads waiting, this one in " +
                 current->waits_in);
        }
    }
    if (!cluster.in_flight.empty()) throw Failure("a block ended before a bulk copy to it");
}

inline uint3 unravel(unsigned index, dim3 shape) {
    return {index % shape.x, index / shape.x % shape.y, index / shape.x / shape.y};
}

// Runs `kernel` for every thread of the grid, cluster after cluster, in any order.
inline void launch(dim3 blocks, dim3 threads, size_t shared_bytes, std::function<void()> kernel,
                   unsigned cluster_size = 1) {
    if (shared_bytes > settings.most_shared) throw Failure("more shared memory than the device has");
    if (blocks.x % cluster_size != 0) throw Failure("a grid that is no multiple of its clusters");
    gridDim = blocks;
    blockDim = threads;
    body = std::move(kernel);
    failure.clear();
    random.seed(settings.seed);
    std::vector<unsigned> order(blocks.x * blocks.y * blocks.z / cluster_size);
    for (unsigned i = 0; i < order.size(); ++i) order[i] = i;
    std::shuffle(order.begin(), order.end(), random);
    const size_t stride = (shared_bytes + 1023) / 1024 * 1024;
    std::vector<unsigned char> memory(stride * cluster_size + 1024);
    auto* aligned = memory.data() + (1024 - reinterpret_cast<uintptr_t>(memory.data()) % 1024) % 1024;
    for (const unsigned first : order) {
        std::fill(memory.begin(), memory.end(), 0xff);
        Cluster cluster;
        cluster.blocks.resize(cluster_size);
        for (unsigned rank = 0; rank < cluster_size; ++rank) {
            Block& block = cluster.blocks[rank];
            block.index = unravel(first * cluster_size + rank, blocks);
            block.rank = rank;
            block.cluster = &cluster;
            block.shared = aligned + stride * rank;
            block.shared_bytes = shared_bytes;
            block.threads = std::vector<Thread>(threads_per_block());
            block.warps = std::vector<Warp>((threads_per_block() + 31) / 32);
            for (unsigned i = 0; i < block.threads.size(); ++i) {
                Thread& thread = block.threads[i];
                thread.index = unravel(i, threads);
                thread.linear = static_cast<int>(i);
                thread.block = &block;
                start(thread);
            }
        }
        try {
            run_cluster(cluster);
        } catch (...) {
            current = nullptr;
            throw;
        }
    }
}

// Runs `work`; returns what went wrong in a kernel or a check, or an empty string.
template <class Work>
const char* guarded(Work&& work) {
    static std::string message;
    message.clear();
    try {
        work();
    } catch (const std::exception& error) {
        message = error.what();
    }
    ranges.clear();
    return message.c_str();
}

}  // namespace emulation

#include "cuda_builtins_emulation.h"
