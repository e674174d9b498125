// The CUDA nm_linear on the CPU, whole kernels from launch to result, and the index arithmetic that they
// share with the tests.
// clang-format off
#include <cuda_runtime.h>
#include "ptx_emulation.h"
// clang-format on
#include "cuda/nm_linear.cu"
#include "cuda/nm_linear_bf16.cu"
#include "cuda/nm_linear_fp16.cu"

extern "C" {

// sizes: tokens, rows, columns, group_size, n, form, tokens_at_once, stripes, splits, dtype
static msp::NmLinear allowed(const void* x, const void* values, const void* bitmask, const void* bias,
                             void* y, float* partials, const int* sizes) {
    const msp::TiledWeight weight{values,   bitmask, static_cast<msp::Dtype>(sizes[9]), sizes[1], sizes[2],
                                  sizes[3], sizes[4]};
    const msp::LinearCut cut{static_cast<msp::LinearForm>(sizes[5]), sizes[6], sizes[7], sizes[8]};
    const msp::NmLinear op{weight, cut, x, bias, y, partials, sizes[0]};
    const auto weights = static_cast<size_t>(op.rows) * static_cast<size_t>(op.columns);
    emulation::allow(x, static_cast<size_t>(op.tokens) * static_cast<size_t>(op.columns) * 2, false);
    emulation::allow(values, weights / static_cast<size_t>(op.group_size) * static_cast<size_t>(op.n) * 2,
                     false);
    emulation::allow(bitmask, weights / 8, false);
    return op;
}

const char* emulated_nm_linear(const void* x, const void* values, const void* bitmask, const void* bias,
                               void* y, float* partials, const int* sizes, uint64_t seed) {
    return emulation::guarded([=] {
        emulation::settings.seed = seed;
        const msp::NmLinear op = allowed(x, values, bitmask, bias, y, partials, sizes);
        const std::string error = msp::nm_linear_cuda(op, nullptr);
        if (!error.empty()) throw emulation::Failure(error);
    });
}

// pointers: values, bitmask, bias, y, partials of each weight; sizes: as above of each
const char* emulated_nm_linear_group(const void* x, void* const* pointers, const int* sizes, int count,
                                     uint64_t seed) {
    return emulation::guarded([=] {
        emulation::settings.seed = seed;
        msp::NmLinearGroup group{};
        for (; group.count < count; ++group.count) {
            void* const* own = pointers + 5 * group.count;
            group.linears[group.count] = allowed(x, own[0], own[1], own[2], own[3],
                                                 static_cast<float*>(own[4]), sizes + 10 * group.count);
        }
        const std::string error = msp::nm_linear_group_cuda(group, nullptr);
        if (!error.empty()) throw emulation::Failure(error);
    });
}

int has(int form, int group_size, int n, int tokens_at_once) {
    const bool stated = msp::nm_linear_has(static_cast<msp::LinearForm>(form), group_size, n, tokens_at_once);
    msp::NmLinear op{};
    op.group_size = group_size;
    op.n = n;
    op.form = static_cast<msp::LinearForm>(form);
    op.tokens_at_once = tokens_at_once;
    const bool compiled = msp::linear_kernel<msp::Dtype::kBFloat16>(op) != nullptr;
    return stated * 2 + compiled;
}

int gather_offset(int block, int token, int lane_word, int column, int tokens) {
    return msp::gather_offset(block, token, lane_word, column, tokens);
}

int fragment_offset(int block, int byte, int token, int lane_word, int tokens) {
    return msp::fragment_offset(block, byte, token, lane_word, tokens);
}

int expand_offset(int byte, int lane, int with_keep) {
    return msp::expand_offset(static_cast<uint32_t>(byte), lane, with_keep != 0);
}

void expand_entry(int byte, uint32_t* words) {
    const msp::ExpandEntry entry = msp::expand_entry(static_cast<uint32_t>(byte));
    words[0] = entry.selectors[0], words[1] = entry.selectors[1], words[2] = entry.keep[0],
    words[3] = entry.keep[1];
}

void word_place(int lane, int word, int* row, int* column) {
    *row = msp::word_row(lane, word);
    *column = msp::word_column(lane, word);
}

}  // extern "C"
