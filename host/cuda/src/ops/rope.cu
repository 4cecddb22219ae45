// Rotary embedding in the half-split layout: column j of a head turns with column j + dim/2 by position * inv_freq[j].

// cos and sin of every token and frequency, [tokens, half]; `scale` is YaRN's.
extern "C" __global__ void rope_table(const int* positions, const float* inv_freq, float2* table, int tokens, int half,
                                      float scale) {
    int at = blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= tokens * half) return;
    float sine, cosine;
    sincosf(positions[at / half] * inv_freq[at % half], &sine, &cosine);
    table[at] = make_float2(cosine * scale, sine * scale);
}

// In place; `direction` 1 turns, -1 turns back, which is the VJP.
extern "C" __global__ void rope(View x, const float2* table, int tokens, int heads, int half, float direction) {
    int chunks = half / 8;
    long long at = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= (long long)tokens * heads * chunks) return;
    int j = at % chunks * 8;
    long long rest = at / chunks, token = rest / heads;
    bf16* low = row(x, token) + rest % heads * 2 * half + j;
    Eight a = load8(low), b = load8(low + half), c, d;
    const float2* turn = table + token * half + j;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        float cosine = turn[i].x, sine = turn[i].y * direction;
        c.v[i] = a.v[i] * cosine - b.v[i] * sine;
        d.v[i] = b.v[i] * cosine + a.v[i] * sine;
    }
    store8(low, c);
    store8(low + half, d);
}
