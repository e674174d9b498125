// The CUDA nm_spmm on the CPU, for the tests.
#include "cuda/nm_spmm.h"
#include "cuda/nm_spmm_plan.h"
#include "cuda_emulation.h"

using namespace msp;

namespace {

void set_device(int major, int multiprocessors, uint64_t seed) {
    emulation::settings.major = major;
    emulation::settings.multiprocessors = multiprocessors;
    emulation::settings.seed = seed;
}

void check(const std::string& error) {
    if (!error.empty()) throw emulation::Failure(error);
}

}  // namespace

extern "C" int64_t nm_spmm_fragments(int64_t rows, int64_t columns) {
    return nm_spmm_fragment_bytes(rows, columns);
}

extern "C" int64_t nm_spmm_workspace(int64_t tokens, int64_t rows, int64_t columns, int major,
                                     int multiprocessors) {
    set_device(major, multiprocessors, 0);
    int64_t bytes = -1;
    nm_spmm_workspace_bytes(tokens, rows, columns, &bytes);
    return bytes;
}

// Tokens of a tile, splits of K, blocks of a cluster.
extern "C" void nm_spmm_cut(int64_t tokens, int64_t rows, int64_t columns, int major, int multiprocessors,
                            int* cut) {
    const SpmmPlan plan = spmm_plan(tokens, rows, columns, major == 9, multiprocessors);
    cut[0] = plan.tokens;
    cut[1] = plan.splits;
    cut[2] = plan.cluster;
}

extern "C" const char* nm_spmm_pack(const uint16_t* values, const uint8_t* bitmask, void* fragments,
                                    int64_t rows, int64_t columns, int group_size, int n, uint64_t seed) {
    return emulation::guarded([&] {
        set_device(8, 4, seed);
        const auto kept = static_cast<size_t>(values_per_row(columns, group_size, n));
        emulation::allow(values, static_cast<size_t>(rows) * kept * 2, false);
        emulation::allow(bitmask, static_cast<size_t>(rows * bitmask_row_bytes(columns)), false);
        check(nm_spmm_pack_cuda({values, bitmask, fragments, rows, columns, group_size, n}, nullptr));
    });
}

extern "C" const char* nm_spmm(const void* x, const void* fragments, const void* bias, void* y,
                               void* workspace, int dtype, int64_t tokens, int64_t rows, int64_t columns,
                               int major, int multiprocessors, uint64_t seed) {
    return emulation::guarded([&] {
        const auto work =
            static_cast<size_t>(nm_spmm_workspace(tokens, rows, columns, major, multiprocessors));
        set_device(major, multiprocessors, seed);
        emulation::allow(x, static_cast<size_t>(tokens * columns * 2), false);
        emulation::allow(fragments, static_cast<size_t>(nm_spmm_fragment_bytes(rows, columns)), false);
        if (bias != nullptr) emulation::allow(bias, static_cast<size_t>(rows * 2), false);
        emulation::allow(y, static_cast<size_t>(tokens * rows * 2), true);
        if (work > 0) emulation::allow(workspace, work, true);
        check(nm_spmm_cuda(
            {x, fragments, bias, y, workspace, static_cast<Dtype>(dtype), tokens, rows, columns}, nullptr));
    });
}
