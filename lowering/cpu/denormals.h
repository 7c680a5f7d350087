// Numbers below 2^-126 are zero while this lives, in the thread that made it. Arithmetic on them costs
// a hundred cycles each, and decayed states are full of them.
#pragma once

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace effpass {

struct FlushDenormals {
#if defined(__SSE__)
    unsigned before = _mm_getcsr();
    FlushDenormals() { _mm_setcsr(before | 0x8040); }  // flush results, read operands as zero
    ~FlushDenormals() { _mm_setcsr(before); }
#else
    FlushDenormals() {}  // other machines compute them at full speed
    ~FlushDenormals() {}
#endif
};

}  // namespace effpass
