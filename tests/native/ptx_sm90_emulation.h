// The instructions of sm_90 and sm_90a; part of ptx_emulation.h.
#pragma once

#include "cuda_driver_emulation.h"

namespace emulation {

// 9.7.13.15.2: a phase is over when all have arrived and all bytes that were announced have come.
inline MemoryBarrier& memory_barrier(uint32_t address, const char* name) {
    auto& barriers = current->block->cluster->memory_barriers;
    const auto found = barriers.find(shared_memory(address, 8, 8, name));
    if (found == barriers.end()) fail(std::string(name) + ": no initialised mbarrier");
    return found->second;
}

inline void settle(MemoryBarrier& barrier) {
    require(barrier.pending >= 0, "more arrivals than an mbarrier's phase has");
    if (barrier.pending > 0 || barrier.bytes != 0) return;
    barrier.pending = barrier.arrivals;
    ++barrier.phase;
}

inline uint32_t in_block(uint32_t address, uint32_t rank) { return (address & 0xffffff) | rank << 24; }

inline uint32_t cluster_size() { return static_cast<uint32_t>(current->block->cluster->blocks.size()); }

// The 128-byte swizzle of bulk copies and matrix descriptors: address bits 4-6 are xored with bits 7-9.
inline uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

inline void load_box(uint32_t to, const CUtensorMap& map, uint32_t barrier, int column, int row) {
    constexpr const char* kName = "cp.async.bulk.tensor";
    require(to % (map.swizzled ? 1024 : 128) == 0, "cp.async.bulk.tensor: misaligned destination");
    const uint32_t bytes = map.box_columns * map.box_rows * 2;
    std::memset(shared_memory(to, bytes, 16, kName), 0xff, bytes);
    MemoryBarrier& waits = memory_barrier(barrier, kName);
    current->block->cluster->in_flight.emplace_back([=, &waits] {
        for (uint32_t r = 0; r < map.box_rows; ++r) {
            for (uint32_t c = 0; c < map.box_columns; ++c) {
                const int64_t from_row = int64_t{row} + r, from_column = int64_t{column} + c;
                uint16_t bits = 0;
                if (from_row >= 0 && from_column >= 0 && from_row < static_cast<int64_t>(map.rows) &&
                    from_column < static_cast<int64_t>(map.columns)) {
                    const unsigned char* from =
                        map.base + from_row * static_cast<int64_t>(map.row_bytes) + from_column * 2;
                    check_global(from, 2, false, kName);
                    std::memcpy(&bits, from, 2);
                }
                const uint32_t address = to + (r * map.box_columns + c) * 2;
                std::memcpy(shared_memory(map.swizzled ? swizzled(address) : address, 2, 2, kName), &bits, 2);
            }
        }
        waits.bytes -= bytes;
        settle(waits);
    });
}

}  // namespace emulation

namespace msp {
namespace ptx {

inline uint32_t cluster_rank() { return emulation::current->block->rank; }
inline void cluster_sync() {
    emulation::arrive(emulation::current->block->cluster->barrier,
                      emulation::cluster_size() * emulation::threads_per_block(), true, "barrier.cluster");
}

inline void mbarrier_init(uint32_t barrier, uint32_t arrivals) {
    const void* place = emulation::shared_memory(barrier, 8, 8, "mbarrier.init");
    emulation::current->block->cluster->memory_barriers[place] = {static_cast<int>(arrivals),
                                                                  static_cast<int>(arrivals), 0, 0};
}
inline void mbarrier_init_fence() {}
inline void mbarrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
    emulation::MemoryBarrier& at = emulation::memory_barrier(barrier, "mbarrier.arrive.expect_tx");
    at.bytes += bytes;
    --at.pending;
    emulation::settle(at);
}
inline void mbarrier_arrive_at(uint32_t barrier, uint32_t rank) {
    emulation::MemoryBarrier& at =
        emulation::memory_barrier(emulation::in_block(barrier, rank), "mbarrier.arrive");
    --at.pending;
    emulation::settle(at);
}
inline void mbarrier_wait(uint32_t barrier, uint32_t parity) {
    emulation::MemoryBarrier& at = emulation::memory_barrier(barrier, "mbarrier.try_wait");
    while ((at.phase & 1) == parity) emulation::wait_for_change(at.phase, "mbarrier.try_wait");
}

inline void prefetch_tensor_map(const void*) {}
inline void tma_load_2d(uint32_t to, const void* map, uint32_t barrier, int column, int row,
                        uint16_t blocks) {
    emulation::require(blocks >> emulation::cluster_size() == 0,
                       "a multicast to blocks outside of the cluster");
    for (uint32_t rank = 0; rank < 16; ++rank) {
        if ((blocks >> rank & 1) == 0) continue;
        emulation::load_box(emulation::in_block(to, rank), *static_cast<const CUtensorMap*>(map),
                            emulation::in_block(barrier, rank), column, row);
    }
}
inline void tma_load_2d(uint32_t to, const void* map, uint32_t barrier, int column, int row) {
    emulation::load_box(to, *static_cast<const CUtensorMap*>(map), barrier, column, row);
}

template <int Registers>
void take_registers() {
    static_assert(Registers % 8 == 0 && Registers >= 24 && Registers <= 256);
}
template <int Registers>
void give_registers() {
    static_assert(Registers % 8 == 0 && Registers >= 24 && Registers <= 256);
}

inline void wgmma_fence() { __syncwarp(); }
inline void wgmma_commit() {
    char nothing = 0;
    emulation::collective("wgmma.commit_group", ~0u, nothing, [](char* const(&)[32]) {
        emulation::Warp& warp = emulation::warp();
        warp.products.push_back(std::exchange(warp.open_products, {}));
    });
}
template <int Pending>
void wgmma_wait() {
    char nothing = 0;
    emulation::collective("wgmma.wait_group", ~0u, nothing, [](char* const(&)[32]) {
        auto& products = emulation::warp().products;
        for (; products.size() > Pending; products.pop_front()) {
            for (const auto& product : products.front()) product();
        }
    });
}

template <int Count>
void wgmma_done(float (&)[Count]) {}

// A warp's 16 of the 64 rows.
template <Dtype D, int N, int Selector>
void wgmma_sp(float (&d)[N / 2], uint4 a, uint64_t b, uint32_t metadata) {
    struct Args {
        float* d;
        uint32_t a[4];
        uint64_t b;
        uint32_t metadata;
    } args{d, {a.x, a.y, a.z, a.w}, b, metadata};
    emulation::collective("wgmma.sp", ~0u, args, [](Args* const(&lanes)[32]) {
        const auto rows = emulation::sparse_a(
            D, Selector, [&](int lane, int i) { return lanes[lane]->a[i]; },
            [&](int lane) { return lanes[lane]->metadata; });
        // 9.7.15.5.1: 14 bits each of start address, leading and stride offset, in units of 16 bytes; swizzle
        // in 62-63
        const uint64_t descriptor = lanes[0]->b;
        for (Args* lane : lanes)
            emulation::require(lane->b == descriptor, "lanes with different descriptors");
        emulation::require(descriptor >> 62 == 1 && (descriptor >> 49 & 7) == 0,
                           "a layout that is not emulated");
        const auto start = static_cast<uint32_t>(descriptor & 0x3fff) << 4;
        const auto stride = static_cast<uint32_t>(descriptor >> 32 & 0x3fff) << 4;
        const uint32_t base = emulation::in_block(start, emulation::current->block->rank);
        std::array<float*, 32> sums;
        for (size_t i = 0; i < 32; ++i) sums[i] = lanes[i]->d;
        emulation::hold_product([=] {
            auto tokens = std::make_unique<emulation::Matrix<N, 32>>();
            for (uint32_t n = 0; n < N; ++n) {
                for (uint32_t k = 0; k < 32; ++k) {
                    const uint32_t address = emulation::swizzled(base + n / 8 * stride + n % 8 * 128 + k * 2);
                    uint16_t bits;
                    std::memcpy(&bits, emulation::shared_memory(address, 2, 2, "wgmma.sp"), 2);
                    tokens->at[n][k] = emulation::float_of(D, bits);
                }
            }
            // figure "WGMMA .m64nNk32 ... D": registers as of m16n8 products, one after the other
            for (int lane = 0; lane < 32; ++lane) {
                for (int i = 0; i < N / 2; ++i) {
                    int row, column;
                    emulation::accumulator_place(lane, i % 4, row, column);
                    const float* token = tokens->at[i / 4 * 8 + column];
                    for (int k = 0; k < 32; ++k)
                        sums[static_cast<size_t>(lane)][i] += rows.at[row][k] * token[k];
                }
            }
        });
    });
}

}  // namespace ptx
}  // namespace msp
