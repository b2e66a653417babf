// Kernels for the cross entropy and the softmax of a compiled training step. The inputs and outputs of each
// kernel are bfloat16. The arithmetic is float32, and each result is rounded to bfloat16 once.
//
// Each row is computed by one thread in a fixed order, so the number of threads does not affect the results.
// cpu.py compiles this file and calls these kernels.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>

using bf16 = uint16_t;

static inline float wide(bf16 h) {
    uint32_t bits = uint32_t(h) << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

// Round a float to the nearest bfloat16. A tie is rounded to the even neighbor, and a NaN stays a NaN.
static inline bf16 narrow(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    bits = (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc00000 : bits + 0x7fff + ((bits >> 16) & 1);
    return bf16(bits >> 16);
}

// Return exp(x) for x <= 0, with a relative error of at most 2e-7. The result is 2^k times a Taylor
// polynomial around 0. If x is below -87, the result is 0.
static inline float power(float x) {
    float y = x < -87.0f ? -87.0f : x;
    // Adding 1.5 * 2^23 rounds a float to the nearest integer k, and stores k in the last bits of the sum.
    float shifted = y * 1.44269504f + 12582912.0f;
    float k = shifted - 12582912.0f, r = (y - k * 0.693145752f) - k * 1.42860677e-6f;
    float p = 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    uint32_t bits;
    memcpy(&bits, &shifted, 4);
    bits = (bits + 127) << 23;
    float two_k;
    memcpy(&two_k, &bits, 4);
    return x < -87.0f ? 0.0f : p * two_k;
}

extern "C" {

// Compute the cross entropy of each row of logits, and the gradient of the cross entropy multiplied by a
// factor.
void cross_entropy(const bf16* logits, const int64_t* target, double* loss, bf16* grad, int64_t rows,
                   int64_t vocab, double factor) {
#pragma omp parallel
    {
        std::unique_ptr<float[]> chance(new float[vocab]);
        float* p = chance.get();
#pragma omp for schedule(static)
        for (int64_t i = 0; i < rows; i++) {
            const bf16* x = logits + i * vocab;
            bf16* g = grad + i * vocab;
            float top = -INFINITY, sum = 0;
#pragma omp simd reduction(max : top)
            for (int64_t j = 0; j < vocab; j++) top = wide(x[j]) > top ? wide(x[j]) : top;
#pragma omp simd reduction(+ : sum)
            for (int64_t j = 0; j < vocab; j++) sum += p[j] = power(wide(x[j]) - top);
            loss[i] = std::log(double(sum)) + top - wide(x[target[i]]);
            float each = float(factor / sum);
#pragma omp simd
            for (int64_t j = 0; j < vocab; j++) g[j] = narrow(p[j] * each);
            g[target[i]] = narrow(float((p[target[i]] / double(sum) - 1) * factor));
        }
    }
}

// For each row of the bias, return the position where the trailing -inf values begin. The position is rounded
// up to a multiple of 32. From this position on, all attention weights of the row are 0.
static std::unique_ptr<int64_t[]> lengths(const bf16* bias, int64_t period, int64_t width) {
    std::unique_ptr<int64_t[]> ends(new int64_t[period]);
    for (int64_t i = 0; i < period; i++) {
        int64_t end = width;
        while (end > 0 && bias[i * width + end - 1] == 0xff80) end--;
        ends[i] = std::min(width, (end + 31) / 32 * 32);
    }
    return ends;
}

// Replace each row of x with the softmax of x + bias. Row i % period of the bias is added to row i of x. If
// there is a mask, write the softmax times the mask to `dropped`. Otherwise, `mask` and `dropped` are null.
void softmax(bf16* x, const bf16* bias, const uint8_t* mask, bf16* dropped, int64_t rows, int64_t width,
             int64_t period) {
    auto length = lengths(bias, period, width);
#pragma omp parallel
    {
        std::unique_ptr<float[]> chance(new float[width]);
        float* p = chance.get();
#pragma omp for schedule(static)
        for (int64_t i = 0; i < rows; i++) {
            bf16* y = x + i * width;
            const bf16* b = bias + i % period * width;
            int64_t end = length[i % period];
            float top = -INFINITY, sum = 0;
#pragma omp simd reduction(max : top)
            for (int64_t j = 0; j < end; j++) {
                p[j] = wide(y[j]) + wide(b[j]);
                top = p[j] > top ? p[j] : top;
            }
#pragma omp simd reduction(+ : sum)
            for (int64_t j = 0; j < end; j++) sum += p[j] = power(p[j] - top);
            float each = 1 / sum;
#pragma omp simd
            for (int64_t j = 0; j < end; j++) y[j] = narrow(p[j] * each);
            std::fill(y + end, y + width, bf16(0));
            if (mask) {
                const uint8_t* keep = mask + i * width;
                bf16* d = dropped + i * width;
#pragma omp simd
                for (int64_t j = 0; j < end; j++) d[j] = keep[j] ? y[j] : bf16(0);
                std::fill(d + end, d + width, bf16(0));
            }
        }
    }
}

// Replace the gradient of the masked attention weights with the gradient of the scores. If there is a mask,
// write the weights times the mask to `dropped`. Otherwise, `mask` and `dropped` are null.
void softmax_backward(bf16* grad, const bf16* weights, const bf16* bias, const uint8_t* mask, bf16* dropped,
                      int64_t rows, int64_t width, int64_t period) {
    auto length = lengths(bias, period, width);
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < rows; i++) {
        bf16* g = grad + i * width;
        const bf16* w = weights + i * width;
        int64_t end = length[i % period];
        float along = 0;
        if (mask) {
            const uint8_t* keep = mask + i * width;
            bf16* d = dropped + i * width;
#pragma omp simd
            for (int64_t j = 0; j < end; j++) {
                g[j] = keep[j] ? g[j] : bf16(0);
                d[j] = keep[j] ? w[j] : bf16(0);
            }
            std::fill(d + end, d + width, bf16(0));
        }
#pragma omp simd reduction(+ : along)
        for (int64_t j = 0; j < end; j++) along += wide(g[j]) * wide(w[j]);
#pragma omp simd
        for (int64_t j = 0; j < end; j++) g[j] = narrow(wide(w[j]) * (wide(g[j]) - along));
        std::fill(g + end, g + width, bf16(0));
    }
}
}
