// Vectors of W floats (16 with AVX-512, 8 with AVX2, 4 otherwise), their storage types and maths.
//
// GCC and clang vector extensions, so + - * / and comparisons are the language's own; intrinsics only
// where the compilers find no good code. Arithmetic is always float; bf16 and fp16 are storage.
// Everything here lets NaN through: compile without -ffast-math.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace effpass {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

using F = float __attribute__((vector_size(W * 4)));
using I = int32_t __attribute__((vector_size(W * 4)));
using U = uint32_t __attribute__((vector_size(W * 4)));
using Half = uint16_t __attribute__((vector_size(W * 2)));

struct bf16 { uint16_t bits; };
struct fp16 { uint16_t bits; };
// How a tensor's elements are stored; the numbers are those of rows.py's DTYPES.
enum Storage : int64_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

inline F splat(float v) { return v - F{}; }  // v + {} would turn -0 into +0
inline I bits(F v) { I out; std::memcpy(&out, &v, sizeof v); return out; }
inline F floats(I v) { F out; std::memcpy(&out, &v, sizeof v); return out; }
inline F floats(U v) { F out; std::memcpy(&out, &v, sizeof v); return out; }
inline U words(F v) { U out; std::memcpy(&out, &v, sizeof v); return out; }
inline F select(I mask, F yes, F no) { return floats((mask & bits(yes)) | (~mask & bits(no))); }

// a * b + c, in one instruction where the machine has it (-ffp-contract=fast).
inline F fma(F a, F b, F c) { return a * b + c; }

// The larger or smaller of a bound and v; v where v is NaN.
inline F at_least(F bound, F v) {
#if defined(__AVX512F__)
    return (F)_mm512_max_ps((__m512)bound, (__m512)v);
#elif defined(__AVX2__)
    return (F)_mm256_max_ps((__m256)bound, (__m256)v);
#else
    return select(bound > v, bound, v);
#endif
}
inline F at_most(F bound, F v) {
#if defined(__AVX512F__)
    return (F)_mm512_min_ps((__m512)bound, (__m512)v);
#elif defined(__AVX2__)
    return (F)_mm256_min_ps((__m256)bound, (__m256)v);
#else
    return select(bound < v, bound, v);
#endif
}

// ---- storage -------------------------------------------------------------------------------------

inline F widen(Half h, bf16) { return floats(__builtin_convertvector(h, U) << 16); }

inline F widen(Half h, fp16) {
#if defined(__AVX512F__)
    return (F)_mm512_cvtph_ps((__m256i)h);
#elif defined(__AVX2__)
    return (F)_mm256_cvtph_ps((__m128i)h);
#else
    U v = __builtin_convertvector(h, U), magnitude = (v & 0x7fff) << 13, sign = (v & 0x8000) << 16;
    U exponent = magnitude & 0x0f800000u;
    U normal = magnitude + (112u << 23);
    U infinite = normal + (112u << 23);
    U tiny = words(floats(normal + (1u << 23)) - splat(6.103515625e-05f));  // 2^-14
    U is_infinite = (U)(exponent == 0x0f800000u), is_tiny = (U)(exponent == 0u);
    U out = (is_infinite & infinite) | (is_tiny & tiny) | (~is_infinite & ~is_tiny & normal);
    return floats(out | sign);
#endif
}

inline Half narrow(F v, bf16) {  // to nearest, ties to even; NaN stays NaN
    U u = words(v), rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    U nan = (U)(v != v);
    return __builtin_convertvector((nan & 0x7fc0u) | (~nan & rounded), Half);
}

inline Half narrow(F v, fp16) {
#if defined(__AVX512F__)
    return (Half)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
    return (Half)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#else
    U u = words(v), sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu;
    U normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    U tiny = words(floats(magnitude) + splat(0.5f)) - 0x3f000000u;  // rounds at 2^-24
    U is_nan = (U)(v != v), is_large = (U)(magnitude >= 0x47800000u) & ~is_nan;
    U is_tiny = (U)(magnitude < 0x38800000u);
    U out = (is_nan & 0x7e00u) | (is_large & 0x7c00u) | (is_tiny & tiny) |
            (~is_nan & ~is_large & ~is_tiny & normal);
    return __builtin_convertvector(out | sign, Half);
#endif
}

inline F load(const float* p) { F v; std::memcpy(&v, p, sizeof v); return v; }
inline void store(float* p, F v) { std::memcpy(p, &v, sizeof v); }
template <class T> inline F load(const T* p) { Half h; std::memcpy(&h, p, sizeof h); return widen(h, T{}); }
template <class T> inline void store(T* p, F v) { Half h = narrow(v, T{}); std::memcpy(p, &h, sizeof h); }

// The first `count` lanes (0 <= count <= W) from memory, zeros after; nothing beyond is touched.
template <class T> inline F load(const T* p, int64_t count) {
    if (count >= W) return load(p);
    T lanes[W] = {};
    std::memcpy(lanes, p, count * sizeof(T));
    return load(lanes);
}
template <class T> inline void store(T* p, F v, int64_t count) {
    if (count >= W) return store(p, v);
    T lanes[W];
    store(lanes, v);
    std::memcpy(p, lanes, count * sizeof(T));
}

// Some rows of a (batch, token, channel) tensor whose channels lie side by side; strides in elements.
// rows.py fills this in.
struct Rows {
    char* data;  // null: the tensor was not given
    int64_t storage, batch_stride, token_stride;

    explicit operator bool() const { return data; }
    char* at(int64_t batch, int64_t token, int64_t channel) const {
        int64_t element = batch * batch_stride + token * token_stride + channel;
        return data + element * (storage == FLOAT32 ? 4 : 2);
    }
    F load(int64_t batch, int64_t token, int64_t channel, int64_t count) const {
        char* p = at(batch, token, channel);
        if (storage == FLOAT32) return effpass::load((const float*)p, count);
        if (storage == BFLOAT16) return effpass::load((const bf16*)p, count);
        return effpass::load((const fp16*)p, count);
    }
    void store(int64_t batch, int64_t token, int64_t channel, F v, int64_t count) const {
        char* p = at(batch, token, channel);
        if (storage == FLOAT32) return effpass::store((float*)p, v, count);
        if (storage == BFLOAT16) return effpass::store((bf16*)p, v, count);
        return effpass::store((fp16*)p, v, count);
    }
};

// Where each independent sequence lies: a row of the batch, or a piece of row 0 with offsets.
struct Sequences {
    const int32_t* offsets;  // null, or count + 1 of them
    int64_t count, tokens;

    int64_t batch(int64_t i) const { return offsets ? 0 : i; }
    int64_t begin(int64_t i) const { return offsets ? offsets[i] : 0; }
    int64_t length(int64_t i) const { return offsets ? offsets[i + 1] - offsets[i] : tokens; }
    int64_t total() const { return offsets ? tokens : count * tokens; }
};

// The sum of all lanes, in one fixed order.
inline float sum(F v) {
    float lanes[W];
    store(lanes, v);
    for (int half = W / 2; half; half /= 2)
        for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
    return lanes[0];
}

// ---- maths ---------------------------------------------------------------------------------------

// p * 2^n for integral n in [-126, 128].
inline F scale(F p, F n) {
#if defined(__AVX512F__)
    return (F)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    I exponent = (__builtin_convertvector(n, I) + 126) << 23;  // n = 128 needs the factor 2 apart
    return (p + p) * floats(exponent);
#endif
}
inline F nearest(F v) {  // |v| < 2^22 unless AVX-512
#if defined(__AVX512F__)
    return (F)_mm512_roundscale_ps((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    constexpr float magic = 12582912.0f;  // 1.5 * 2^23: the sum has no room for a fraction
    return (v + magic) - magic;
#endif
}

// 2^x to 2 ulp, exactly 1 at 0; underflows to 0 at the latest below 2^-125, overflows to inf.
inline F exp2(F x) {
#if !defined(__AVX512F__)  // vscalef takes any exponent, infinite ones too
    x = at_most(splat(129.0f), at_least(splat(-126.0f), x));
#endif
    F n = nearest(x), r = x - n, p = splat(1.3264727065e-03f);
    p = fma(p, r, splat(9.6715126489e-03f));
    p = fma(p, r, splat(5.5507337437e-02f));
    p = fma(p, r, splat(2.4022242085e-01f));
    p = fma(p, r, splat(6.9314697760e-01f));
    return scale(fma(p, r, splat(1.0f)), n);
}

// e^x to 2 ulp, exactly 1 at 0; underflows to 0 at the latest below 2^-125, overflows to inf.
inline F exp(F x) {
    constexpr float zero_below = W == 16 ? -104.0f : -87.336544f;
    x = at_most(splat(89.4f), at_least(splat(zero_below), x));
    F n = nearest(x * splat(1.44269504f));
    F r = fma(n, splat(-0.693359375f), x);
    r = fma(n, splat(2.12194440e-4f), r);
    F p = splat(1.3843651756e-03f);
    p = fma(p, r, splat(8.3741568080e-03f));
    p = fma(p, r, splat(4.1668002136e-02f));
    p = fma(p, r, splat(1.6666431245e-01f));
    p = fma(p, r, splat(4.9999994208e-01f));
    p = fma(p, r, splat(1.0f));
    return scale(fma(p, r, splat(1.0f)), n);
}

// log(1 + u) for u in [0, 1], accurate relative to the result: 2 atanh(u / (2 + u)).
inline F log1p_unit(F u) {
    F f = u / (u + 2.0f), s = f * f, p = splat(2.4289557507e-01f);
    p = fma(p, s, splat(2.1430740902e-01f));
    p = fma(p, s, splat(2.8616596726e-01f));
    p = fma(p, s, splat(3.9998888355e-01f));
    p = fma(p, s, splat(6.6666675500e-01f));
    return f * fma(p, s, splat(2.0f));
}

inline F sigmoid(F x) { return 1.0f / (1.0f + exp(-x)); }
inline F silu(F x) { return x * sigmoid(x); }
// d silu(x) / dx, given s = sigmoid(x).
inline F silu_slope(F x, F s) { return s * (1.0f + x * (1.0f - s)); }
// log(1 + e^x); equals x above 20 in float32, which is torch's threshold.
inline F softplus(F x) {
    F magnitude = floats(bits(x) & 0x7fffffff);
    return at_least(splat(0.0f), x) + log1p_unit(exp(-magnitude));
}

// ---- scratch -------------------------------------------------------------------------------------

// Uninitialised floats, 64-byte aligned, freed at the end of the scope.
struct Scratch {
    float* data;
    explicit Scratch(int64_t count)
        : data((float*)std::aligned_alloc(64, (count * 4 + 127) / 64 * 64)) {
        if (!data) std::abort();
    }
    ~Scratch() { std::free(data); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
};

}  // namespace effpass
