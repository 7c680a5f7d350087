// Gives tests/lowering/test_vec.py the functions of vec.h over arrays of any length.
#include "vec.h"

using namespace effpass;

#define PROBE extern "C" __attribute__((visibility("default"))) void
#define OVER(name, from, to, f)                                      \
    PROBE name(const from* in, to* out, int64_t count) {             \
        for (int64_t i = 0; i < count; i += W)                       \
            store(out + i, f(load(in + i, count - i)), count - i);   \
    }

OVER(exp_all, float, float, exp)
OVER(exp2_all, float, float, exp2)
OVER(sigmoid_all, float, float, sigmoid)
OVER(silu_all, float, float, silu)
OVER(softplus_all, float, float, softplus)
OVER(narrow_bfloat16, float, bf16, )
OVER(narrow_float16, float, fp16, )
OVER(widen_bfloat16, bf16, float, )
OVER(widen_float16, fp16, float, )

PROBE sums(const float* in, float* out, int64_t count) {
    for (int64_t i = 0; i < count; i += W) out[i / W] = sum(load(in + i));
}
extern "C" __attribute__((visibility("default"))) int lanes() { return W; }
