// Multiply-adds of a sparse product from a buffer: what benchmarks/multiply_adds.py times.
#include <immintrin.h>

#include <cstdint>

namespace {

constexpr int TILE = 8;  // vectors of sums in registers, as in the kernels

struct Single {
    using Number = float;
    static __m256 load(const float* p) { return _mm256_loadu_ps(p); }
};

struct Brain {  // bfloat16: the upper half of a float
    using Number = uint16_t;
    static __m256 load(const uint16_t* p) {
        const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
        return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
    }
};

struct Half {
    using Number = uint16_t;
    static __m256 load(const uint16_t* p) {
        return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    }
};

template <class Kind>
void product(const void* buffer, const int32_t* offset, const float* value, int64_t rows, int64_t nonzeros, float* sums) {
    const auto* input = static_cast<const typename Kind::Number*>(buffer);
    for (int64_t row = 0; row < rows; ++row) {
        __m256 sum[TILE];
#pragma GCC unroll 8
        for (int t = 0; t < TILE; ++t) sum[t] = _mm256_setzero_ps();
        for (int64_t k = row * nonzeros; k < (row + 1) * nonzeros; ++k) {
            const __m256 v = _mm256_broadcast_ss(value + k);
#pragma GCC unroll 8
            for (int t = 0; t < TILE; ++t) sum[t] = _mm256_fmadd_ps(Kind::load(input + offset[k] + 8 * t), v, sum[t]);
        }
#pragma GCC unroll 8
        for (int t = 0; t < TILE; ++t) _mm256_storeu_ps(sums + (row * TILE + t) * 8, sum[t]);
    }
}

}  // namespace

// sums (rows, 64) of `nonzeros` products in each row: value times the 64 numbers of the buffer from offset on.
extern "C" void product_of(int kind, const void* buffer, const int32_t* offset, const float* value, int64_t rows,
                           int64_t nonzeros, float* sums) {
    constexpr auto single = product<Single>, brain = product<Brain>, half = product<Half>;
    (kind == 0 ? single : kind == 1 ? brain : half)(buffer, offset, value, rows, nonzeros, sums);
}
