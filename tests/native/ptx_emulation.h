// Takes the place of csrc/cuda/ptx.h in a test that runs kernels on the CPU: include it first.
//
// Written from the PTX ISA manual's text and figures alone. Asynchronous work is done as late as the
// instruction that waits for it allows, or at once, as the seed decides; until then its destination holds
// NaN.
#define MSP_CUDA_PTX_H
#pragma once

#include "../../csrc/nm_format.h"
#include "cuda_driver_emulation.h"

namespace emulation {

inline float float_of(msp::Dtype dtype, uint16_t bits) {
    if (dtype == msp::Dtype::kBFloat16) return emulated_cast<float>(static_cast<uint32_t>(bits) << 16);
    return static_cast<float>(emulated_cast<_Float16>(bits));
}

inline uint16_t bits_of(msp::Dtype dtype, float value) {
    if (dtype == msp::Dtype::kFloat16) return emulated_cast<uint16_t>(static_cast<_Float16>(value));
    const auto bits = emulated_cast<uint32_t>(value);
    if (std::isnan(value)) return 0x7fff;
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline uint16_t half_of(uint32_t word, int index) { return static_cast<uint16_t>(word >> (16 * index)); }

// Matrices are plain arrays of floats, [row][column].
template <int Rows, int Columns>
struct Matrix {
    float at[Rows][Columns] = {};
};

// Figures "MMA .m16n8k16 fragment layout for accumulator matrix C/D".
inline void accumulator_place(int lane, int i, int& row, int& column) {
    row = lane / 4 + (i < 2 ? 0 : 8);
    column = lane % 4 * 2 + (i & 1);
}

// 9.7.14.6.1 and the figures of m16n8k32: the sparse A as a dense matrix. Also what a warp of wgmma.sp
// m64nNk32 holds. `a` gives register i of a lane, `metadata` a lane's.
template <class A, class Metadata>
Matrix<16, 32> sparse_a(msp::Dtype dtype, int selector, A a, Metadata metadata) {
    Matrix<16, 32> result;
    for (int row = 0; row < 16; ++row) {
        for (int group = 0; group < 8; ++group) {
            // metadata: lane 2F of the four has columns 0-15, lane 2F + 1 columns 16-31; bits 0-15 are of row
            // groupID, bits 16-31 of row groupID + 8; four bits a group, lowest first
            const uint32_t word = metadata(row % 8 * 4 + 2 * selector + group / 4);
            const uint32_t code = word >> (row / 8 * 16 + group % 4 * 4) & 15;
            const int first = code & 3, second = code >> 2;
            require(first < second, "metadata that is not ordered");
            // values: lane t of the four has columns 4t ... 4t+3 in registers 0 (row groupID) and 1 (groupID
            // + 8), and columns 16 + 4t ... in registers 2 and 3
            const uint32_t values = a(row % 8 * 4 + group % 4, row / 8 + group / 4 * 2);
            result.at[row][group * 4 + first] = float_of(dtype, half_of(values, 0));
            result.at[row][group * 4 + second] = float_of(dtype, half_of(values, 1));
        }
    }
    return result;
}

// Products of a warp keep their order: one is done at once only where none before it waits.
inline void hold_product(std::function<void()> product) {
    Warp& self = warp();
    const bool first = self.open_products.empty() && self.products.empty();
    if (first && random() % 2 == 0) {
        product();
    } else {
        self.open_products.push_back(std::move(product));
    }
}

}  // namespace emulation

namespace msp {
namespace ptx {

template <class T = unsigned char>
T* dynamic_shared() {
    return emulation::dynamic_shared<T>();
}

inline uint32_t shared_address(const void* pointer) { return emulation::shared_address(pointer); }

inline uint4 load_shared16(uint32_t address) {
    uint4 v;
    std::memcpy(&v, emulation::shared_memory(address, 16, 16, "ld.shared.v4"), 16);
    return v;
}
inline uint32_t load_shared4(uint32_t address) {
    uint32_t v;
    std::memcpy(&v, emulation::shared_memory(address, 4, 4, "ld.shared"), 4);
    return v;
}
inline void store_shared4(uint32_t address, uint32_t v) {
    std::memcpy(emulation::shared_memory(address, 4, 4, "st.shared"), &v, 4);
}
inline uint4 load_once16(const void* from) {
    emulation::check_global(from, 16, false, "ld.global.nc.v4");
    uint4 v;
    std::memcpy(&v, from, 16);
    return v;
}
inline uint32_t load_once4(const void* from) {
    emulation::check_global(from, 4, false, "ld.global.nc");
    uint32_t v;
    std::memcpy(&v, from, 4);
    return v;
}
inline void store16(void* to, uint4 v) {
    emulation::check_global(to, 16, true, "st.global.v4");
    std::memcpy(to, &v, 16);
}

inline void cp_async16(uint32_t to, const void* from, int bytes) {
    emulation::require(bytes >= 0 && bytes <= 16, "cp.async: src-size outside of 0 ... 16");
    unsigned char* target = emulation::shared_memory(to, 16, 16, "cp.async");
    if (bytes == 16) emulation::check_global(from, 16, false, "cp.async");
    for (int i = 0; i < bytes && bytes < 16; ++i) {
        emulation::check_global(static_cast<const char*>(from) + i, 1, false, "cp.async");
    }
    std::memset(target, 0xff, 16);
    emulation::current->open_copies.emplace_back([=] {
        std::memset(target, 0, 16);
        std::memcpy(target, from, static_cast<size_t>(bytes));
    });
}
inline void cp_async_commit() {
    emulation::Thread& self = *emulation::current;
    self.copies.push_back(std::exchange(self.open_copies, {}));
}
template <int Pending>
void cp_async_wait() {
    auto& copies = emulation::current->copies;
    for (; copies.size() > Pending; copies.pop_front()) {
        for (const auto& copy : copies.front()) copy();
    }
}

inline void ldmatrix_x4(uint32_t (&r)[4], uint32_t address) {
    struct Args {
        uint32_t address;
        uint32_t* r;
    } args{address, r};
    emulation::collective("ldmatrix", ~0u, args, [](Args* const(&lanes)[32]) {
        for (int matrix = 0; matrix < 4; ++matrix) {
            for (int lane = 0; lane < 32; ++lane) {
                const unsigned char* row =
                    emulation::shared_memory(lanes[matrix * 8 + lane / 4]->address, 16, 16, "ldmatrix");
                std::memcpy(&lanes[lane]->r[matrix], row + lane % 4 * 4, 4);
            }
        }
    });
}

inline void stmatrix_x4_trans(uint32_t address, const uint32_t (&r)[4]) {
    struct Args {
        uint32_t address;
        const uint32_t* r;
    } args{address, r};
    emulation::collective("stmatrix", ~0u, args, [](Args* const(&lanes)[32]) {
        for (int matrix = 0; matrix < 4; ++matrix) {
            for (int row = 0; row < 8; ++row) {
                unsigned char* to =
                    emulation::shared_memory(lanes[matrix * 8 + row]->address, 16, 16, "stmatrix");
                for (int column = 0; column < 8; ++column) {
                    // the element that lies at [column][row] of the untransposed fragment
                    const uint16_t bits = emulation::half_of(lanes[column * 4 + row / 2]->r[matrix], row % 2);
                    std::memcpy(to + 2 * column, &bits, 2);
                }
            }
        }
    });
}

inline uint32_t movmatrix_trans(uint32_t r) {
    struct Args {
        uint32_t in, out;
    } args{r, 0};
    emulation::collective("movmatrix", ~0u, args, [](Args* const(&lanes)[32]) {
        for (int lane = 0; lane < 32; ++lane) {
            const int row = lane / 4, column = lane % 4 * 2;
            const uint16_t low = emulation::half_of(lanes[column * 4 + row / 2]->in, row % 2);
            const uint16_t high = emulation::half_of(lanes[(column + 1) * 4 + row / 2]->in, row % 2);
            lanes[lane]->out = static_cast<uint32_t>(high) << 16 | low;
        }
    });
    return args.out;
}

template <Dtype D>
uint32_t pack2(float low, float high) {
    return static_cast<uint32_t>(emulation::bits_of(D, high)) << 16 | emulation::bits_of(D, low);
}

template <Dtype D>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    struct Args {
        float* d;
        const uint32_t *a, *b;
    } args{d, a, b};
    emulation::collective("mma", ~0u, args, [](Args* const(&lanes)[32]) {
        emulation::Matrix<16, 16> a;
        emulation::Matrix<16, 8> b;
        for (int lane = 0; lane < 32; ++lane) {
            for (int i = 0; i < 8; ++i) {
                const int row = lane / 4 + (i / 2 % 2 == 0 ? 0 : 8);
                const int column = lane % 4 * 2 + (i & 1) + (i < 4 ? 0 : 8);
                a.at[row][column] = emulation::float_of(D, emulation::half_of(lanes[lane]->a[i / 2], i % 2));
            }
            for (int i = 0; i < 4; ++i) {
                const int row = lane % 4 * 2 + (i & 1) + (i < 2 ? 0 : 8);
                b.at[row][lane / 4] =
                    emulation::float_of(D, emulation::half_of(lanes[lane]->b[i / 2], i % 2));
            }
        }
        for (int lane = 0; lane < 32; ++lane) {
            for (int i = 0; i < 4; ++i) {
                int row, column;
                emulation::accumulator_place(lane, i, row, column);
                for (int k = 0; k < 16; ++k) lanes[lane]->d[i] += a.at[row][k] * b.at[k][column];
            }
        }
    });
}

template <Dtype D, int Selector>
void mma_sp_m16n8k32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t metadata) {
    struct Args {
        float* d;
        const uint32_t *a, *b;
        uint32_t metadata;
    } args{d, a, b, metadata};
    emulation::collective("mma.sp", ~0u, args, [](Args* const(&lanes)[32]) {
        const auto a = emulation::sparse_a(
            D, Selector, [&](int lane, int i) { return lanes[lane]->a[i]; },
            [&](int lane) { return lanes[lane]->metadata; });
        emulation::Matrix<32, 8> b;
        for (int lane = 0; lane < 32; ++lane) {
            for (int i = 0; i < 8; ++i) {
                const int row = lane % 4 * 2 + (i & 1) + i / 2 * 8;
                b.at[row][lane / 4] =
                    emulation::float_of(D, emulation::half_of(lanes[lane]->b[i / 2], i % 2));
            }
        }
        for (int lane = 0; lane < 32; ++lane) {
            for (int i = 0; i < 4; ++i) {
                int row, column;
                emulation::accumulator_place(lane, i, row, column);
                for (int k = 0; k < 32; ++k) lanes[lane]->d[i] += a.at[row][k] * b.at[k][column];
            }
        }
    });
}

inline void named_barrier(int id, int threads) {
    emulation::named_barrier(id, static_cast<unsigned>(threads));
}

}  // namespace ptx
}  // namespace msp

#include "ptx_sm90_emulation.h"
