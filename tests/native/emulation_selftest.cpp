// Small kernels that are right, and ones with a mistake of each kind that the emulation must find.
#include <cuda_runtime.h>

#include "ptx_emulation.h"

namespace {

using namespace msp;

__global__ void block_sum(const float* x, float* sum, int count) {
    float* partial = emulation::dynamic_shared<float>();
    float value = 0.0f;
    for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(blockDim.x))
        value += __ldg(x + i);
    for (int offset = 16; offset > 0; offset /= 2) value += __shfl_down_sync(~0u, value, offset);
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (unsigned warp = 1; warp < blockDim.x / 32; ++warp) value += partial[warp];
        *sum = value;
    }
}

enum class Mistake { kNone, kNoWait, kPastTheEnd, kMisaligned, kDeadlock, kDiverged, kUnordered };

// One warp: d [16, 8] = a [16, 32] b [8, 32]^T, b through cp.async and ldmatrix, a 2:4 sparse or dense.
template <Dtype D>
__global__ void multiply(const uint16_t* a, const uint16_t* b, const uint32_t* metadata, float* d,
                         Mistake mistake) {
    unsigned char* shared = ptx::dynamic_shared();
    const int lane = static_cast<int>(threadIdx.x);
    const int shift = mistake == Mistake::kPastTheEnd ? 8 : 0;
    const uint32_t tile = ptx::shared_address(shared) + (mistake == Mistake::kMisaligned ? 8 : 0);
    ptx::cp_async16(tile + static_cast<uint32_t>(lane) * 16, b + lane * 8 + shift, 16);
    ptx::cp_async_commit();
    if (mistake != Mistake::kNoWait) ptx::cp_async_wait<0>();
    if (mistake == Mistake::kDeadlock && lane == 3) return;
    if (mistake == Mistake::kDiverged && lane == 3) __ballot_sync(~0u, 1);
    __syncwarp();
    uint32_t fragment[4];
    ptx::ldmatrix_x4(fragment, tile + static_cast<uint32_t>(lane % 8 * 64 + lane / 8 * 16));
    float sums[4] = {};
    const auto words = reinterpret_cast<const uint32_t*>(a);
    const int g = lane / 4, t = lane % 4;
    if (metadata != nullptr) {
        uint32_t values[4];
        for (int i = 0; i < 4; ++i) values[i] = words[(g + i % 2 * 8) * 8 + i / 2 * 4 + t];
        const uint32_t word = metadata[g * 2 + t % 2];
        ptx::mma_sp_m16n8k32<D, 0>(sums, values, fragment,
                                   mistake == Mistake::kUnordered && g == 0 ? 0x44444404u : word);
    } else {
        for (int half = 0; half < 2; ++half) {
            uint32_t values[4];
            for (int i = 0; i < 4; ++i) values[i] = words[(g + i % 2 * 8) * 16 + half * 8 + i / 2 * 4 + t];
            ptx::mma_m16n8k16<D>(sums, values, {fragment[2 * half], fragment[2 * half + 1]});
        }
    }
    for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + t * 2 + i % 2] = sums[i];
    if (mistake == Mistake::kNoWait) ptx::cp_async_wait<0>();
}

}  // namespace

extern "C" const char* emulated_block_sum(const float* x, float* sum, int count, int threads) {
    return emulation::guarded([&] {
        emulation::allow(x, sizeof(float) * static_cast<size_t>(count), false);
        emulation::launch(1, static_cast<unsigned>(threads), 128, [=] { block_sum(x, sum, count); });
    });
}

extern "C" const char* emulated_multiply(int bf16, const uint16_t* a, const uint16_t* b,
                                         const uint32_t* metadata, float* d, int mistake, uint64_t seed) {
    return emulation::guarded([&] {
        emulation::settings.seed = seed;
        emulation::allow(b, 8 * 32 * 2, false);
        emulation::launch(1, 32, 512 + 16, [=] {
            const auto kernel = bf16 ? multiply<Dtype::kBFloat16> : multiply<Dtype::kFloat16>;
            kernel(a, b, metadata, d, static_cast<Mistake>(mistake));
        });
    });
}
