// y = x / sqrt(mean(x^2) + eps) * w over rows of `dim` columns, `heads` rows a token; and its VJP. A row has `lanes` lanes of a
// warp, 32 or as many as it has pieces of eight columns.

struct NormRow {
    long long token, column;
    int lane;
    bool inside;
};

__device__ __forceinline__ NormRow norm_row(int tokens, int heads, int dim, int lanes) {
    long long at = ((long long)blockIdx.x * blockDim.y + threadIdx.y) * (32 / lanes) + threadIdx.x / lanes;
    return {at / heads, at % heads * dim, (int)threadIdx.x % lanes, at < (long long)tokens * heads};
}

__device__ __forceinline__ float row_sum(float x, int lanes) {
    for (int step = lanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
    return x;
}

extern "C" __global__ void rms_norm(View x, const bf16* w, View y, int tokens, int heads, int dim, float eps, int lanes) {
    NormRow at = norm_row(tokens, heads, dim, lanes);
    const bf16* xs = row(x, at.token) + at.column;
    bf16* ys = row(y, at.token) + at.column;
    // Lanes beyond the last row take part in sums.
    int end = at.inside ? dim : 0;
    float squares = 0.f;
    for (int i = at.lane * 8; i < end; i += lanes * 8) {
        Eight v = load8(xs + i);
#pragma unroll
        for (int j = 0; j < 8; j++) squares += v.v[j] * v.v[j];
    }
    float scale = rsqrtf(row_sum(squares, lanes) / dim + eps);
    for (int i = at.lane * 8; i < end; i += lanes * 8) {
        Eight v = load8(xs + i), g = load8(w + i);
#pragma unroll
        for (int j = 0; j < 8; j++) v.v[j] *= scale * g.v[j];
        store8(ys + i, v);
    }
}

// dx = s (w dy - x s^2 mean(w dy x)) with s = 1 / sqrt(mean(x^2) + eps), plus `before` where it is given; `before` may be
// `dx` itself.
extern "C" __global__ void rms_norm_vjp(View x, const bf16* w, View dy, View before, View dx, int tokens, int heads,
                                        int dim, float eps, int lanes) {
    NormRow at = norm_row(tokens, heads, dim, lanes);
    const bf16 *xs = row(x, at.token) + at.column, *dys = row(dy, at.token) + at.column;
    int end = at.inside ? dim : 0;
    float squares = 0.f, product = 0.f;
    for (int i = at.lane * 8; i < end; i += lanes * 8) {
        Eight v = load8(xs + i), d = load8(dys + i), g = load8(w + i);
#pragma unroll
        for (int j = 0; j < 8; j++) {
            squares += v.v[j] * v.v[j];
            product += v.v[j] * d.v[j] * g.v[j];
        }
    }
    float scale = rsqrtf(row_sum(squares, lanes) / dim + eps);
    float pull = row_sum(product, lanes) / dim * scale * scale;
    for (int i = at.lane * 8; i < end; i += lanes * 8) {
        Eight v = load8(xs + i), d = load8(dys + i), g = load8(w + i);
        Eight out;
        if (before.at) out = load8(row(before, at.token) + at.column + i);
#pragma unroll
        for (int j = 0; j < 8; j++) {
            float own = scale * (g.v[j] * d.v[j] - v.v[j] * pull);
            out.v[j] = before.at ? out.v[j] + own : own;
        }
        store8(row(dx, at.token) + at.column + i, out);
    }
}
