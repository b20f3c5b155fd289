// sweep.cpp: the plainest loops that move the bytes which an optimizer step, a norm or a cast moves, for the roofline.
// One parallel region, one contiguous share of every array per thread, no arithmetic to speak of.
// Built by roofline.py with the compiler of the machine that is measured; not part of the library.

#include <cstring>

extern "C" {

// a += g, b += g, c += g over n floats in lock-step: 16 bytes read and 12 written per element, as an fp32 Adam step.
void sweep_update(float* a, float* b, float* c, const float* g, long n, int threads) {
#pragma omp parallel for simd num_threads(threads) schedule(static)
    for (long i = 0; i < n; ++i) {
        const float x = g[i];
        a[i] += x;
        b[i] += x;
        c[i] += x;
    }
}

// a += 1 over n floats: 4 bytes read and 4 written per element.
void sweep_inplace(float* a, long n, int threads) {
#pragma omp parallel for simd num_threads(threads) schedule(static)
    for (long i = 0; i < n; ++i) a[i] += 1.0f;
}

// The sum of n floats: 4 bytes read per element.
float sweep_read(const float* a, long n, int threads) {
    float sum = 0.0f;
#pragma omp parallel for simd num_threads(threads) schedule(static) reduction(+ : sum)
    for (long i = 0; i < n; ++i) sum += a[i];
    return sum;
}

// b = a over n floats: 4 bytes read and 4 written per element; memcpy may write past the caches.
void sweep_copy(float* b, const float* a, long n, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int t = 0; t < threads; ++t) {
        const long begin = n * t / threads, end = n * (t + 1) / threads;
        std::memcpy(b + begin, a + begin, sizeof(float) * (end - begin));
    }
}

}
