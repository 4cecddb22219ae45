// Rotary embedding: pairs of a head's 2n columns from `start` on turn by position * inv_freq[j]. Column j turns with column j + n or, where
// pairs are interleaved, column 2j with column 2j + 1.

// cos and sin of every token and frequency, [tokens, n], times `scale` and, with a `period`, 1 + beta ln(1 + floor(position / period)).
extern "C" __global__ void rope_table(const int* positions, const float* inv_freq, float2* table, int tokens, int n, float scale,
                                      float beta, int period) {
    after_previous();
    int at = blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= tokens * n) return;
    int position = positions[at / n];
    if (period > 0) scale *= 1.f + beta * logf(1.f + position / period);
    float sine, cosine;
    sincosf(position * inv_freq[at % n], &sine, &cosine);
    table[at] = make_float2(cosine * scale, sine * scale);
}

__device__ __forceinline__ void turn(float& a, float& b, float2 by, float direction) {
    float sine = by.y * direction, low = a * by.x - b * sine;
    b = b * by.x + a * sine;
    a = low;
}

// In place, a thread up to eight pairs; `direction` 1 turns, -1 turns back, which is the VJP.
extern "C" __global__ void rope(View x, const float2* table, int tokens, int heads, int dim, int start, int n,
                                int interleaved, float direction) {
    after_previous();
    int chunks = (n + 7) / 8;
    long long at = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= (long long)tokens * heads * chunks) return;
    int j = at % chunks * 8;
    long long rest = at / chunks, token = rest / heads;
    bf16* head = row(x, token) + rest % heads * dim + start;
    const float2* by = table + token * n + j;
    if (n % 8 != 0) {
        for (int i = 0; i < 8 && j + i < n; i++) {
            bf16 *low = head + (interleaved ? 2 * (j + i) : j + i), *high = low + (interleaved ? 1 : n);
            float a = to_float(*low), b = to_float(*high);
            turn(a, b, by[i], direction);
            *low = to_bf16(a);
            *high = to_bf16(b);
        }
        return;
    }
    bf16 *low = head + (interleaved ? 2 * j : j), *high = low + (interleaved ? 8 : n);
    Eight a = load8(low), b = load8(high);
    if (interleaved) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            turn(a.v[2 * i], a.v[2 * i + 1], by[i], direction);
            turn(b.v[2 * i], b.v[2 * i + 1], by[i + 4], direction);
        }
    } else {
#pragma unroll
        for (int i = 0; i < 8; i++) turn(a.v[i], b.v[i], by[i], direction);
    }
    store8(low, a);
    store8(high, b);
}
