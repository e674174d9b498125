// Argument checks that both compiled modules share. They raise ValueError, naming the argument, the value
// found and the value needed, before any work is done.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "nm_select.h"

namespace msp {

inline void require(bool condition, const std::string& message) {
    if (!condition) throw pybind11::value_error(message);
}

inline Dtype require_dtype(int dtype_code) {
    require(dtype_code >= 0 && dtype_code <= 2, "dtype_code " + std::to_string(dtype_code) +
                                                    " is not one of 0 (float32), 1 (float16), 2 (bfloat16)");
    return static_cast<Dtype>(dtype_code);
}

inline void require_format(int dtype_code, int64_t rows, int64_t columns, int group_size) {
    require_dtype(dtype_code);
    require(group_size == 4 || group_size == 8 || group_size == 16 || group_size == 32,
            "group_size " + std::to_string(group_size) + " is not one of 4, 8, 16, 32");
    require(rows >= 0 && columns >= 0,
            "shape [" + std::to_string(rows) + ", " + std::to_string(columns) + "] has a negative size");
    require(
        columns % group_size == 0,
        std::to_string(columns) + " columns are not a multiple of group_size " + std::to_string(group_size));
}

template <class T>
T* pointer(uintptr_t address, const char* name, bool needed) {
    require(address != 0 || !needed, std::string(name) + "_ptr is null, but this call reads or writes it");
    require(address % alignof(T) == 0,
            std::string(name) + "_ptr is not a multiple of " + std::to_string(alignof(T)));
    return reinterpret_cast<T*>(address);
}

// A tensor in one of the dtypes of weights.
inline void* elements(uintptr_t address, Dtype dtype, const char* name, bool needed) {
    if (dtype == Dtype::kFloat32) return pointer<uint32_t>(address, name, needed);
    return pointer<uint16_t>(address, name, needed);
}

inline Scored scored_arguments(uintptr_t weight_ptr, int dtype_code, int64_t rows, int64_t columns,
                               int group_size, int score_kind, uintptr_t column_scale_ptr,
                               uintptr_t row_term_ptr, uintptr_t column_term_ptr, uintptr_t matrix_ptr) {
    require_format(dtype_code, rows, columns, group_size);
    require(score_kind >= 0 && score_kind <= 4,
            "score_kind " + std::to_string(score_kind) + " is not one of 0 ... 4");
    const auto dtype = static_cast<Dtype>(dtype_code);
    const auto kind = static_cast<ScoreKind>(score_kind);
    const bool any = rows > 0 && columns > 0;
    const bool scaled = kind == ScoreKind::kScaled;
    const bool relative = kind == ScoreKind::kRelative;
    const bool matrix = kind == ScoreKind::kFisher || kind == ScoreKind::kGiven;
    return Scored{
        elements(weight_ptr, dtype, "weight", any),
        dtype,
        rows,
        columns,
        group_size,
        kind,
        scaled || relative ? pointer<const float>(column_scale_ptr, "column_scale", any && scaled) : nullptr,
        relative ? pointer<const float>(row_term_ptr, "row_term", any) : nullptr,
        relative ? pointer<const float>(column_term_ptr, "column_term", any) : nullptr,
        matrix ? pointer<const float>(matrix_ptr, "matrix", any) : nullptr,
    };
}

inline NmSelect nm_select_arguments(uintptr_t weight_ptr, int dtype_code, int64_t rows, int64_t columns,
                                    int group_size, int n, bool compliant, int score_kind,
                                    uintptr_t column_scale_ptr, uintptr_t row_term_ptr,
                                    uintptr_t column_term_ptr, uintptr_t matrix_ptr, uintptr_t values_ptr,
                                    uintptr_t bitmask_ptr) {
    const Scored scored = scored_arguments(weight_ptr, dtype_code, rows, columns, group_size, score_kind,
                                           column_scale_ptr, row_term_ptr, column_term_ptr, matrix_ptr);
    const int most = compliant ? group_size / 2 : group_size;
    require(n >= 0 && n <= most, "n " + std::to_string(n) + " is outside 0 ... " + std::to_string(most) +
                                     (compliant ? ", all that a compliant group can keep" : ""));
    const bool any = rows > 0 && columns > 0;
    return NmSelect{scored, n, compliant, elements(values_ptr, scored.dtype, "values", any && n > 0),
                    pointer<uint8_t>(bitmask_ptr, "bitmask", any)};
}

}  // namespace msp
