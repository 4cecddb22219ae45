// y = x / sqrt(mean(x^2) + eps) * w over rows of `dim` columns, `heads` rows a token; and its VJP. A warp a row.

extern "C" __global__ void rms_norm(View x, const bf16* w, View y, int tokens, int heads, int dim, float eps) {
    long long at = (long long)blockIdx.x * blockDim.y + threadIdx.y;
    if (at >= (long long)tokens * heads) return;
    long long token = at / heads, column = at % heads * dim;
    const bf16* xs = row(x, token) + column;
    bf16* ys = row(y, token) + column;
    float squares = 0.f;
    for (int i = threadIdx.x * 8; i < dim; i += 256) {
        Eight v = load8(xs + i);
#pragma unroll
        for (int j = 0; j < 8; j++) squares += v.v[j] * v.v[j];
    }
    float scale = rsqrtf(warp_sum(squares) / dim + eps);
    for (int i = threadIdx.x * 8; i < dim; i += 256) {
        Eight v = load8(xs + i), g = load8(w + i);
#pragma unroll
        for (int j = 0; j < 8; j++) v.v[j] *= scale * g.v[j];
        store8(ys + i, v);
    }
}

// dx = s (w dy - x s^2 mean(w dy x)) with s = 1 / sqrt(mean(x^2) + eps), plus `before` where it is given; `before` may be
// `dx` itself.
extern "C" __global__ void rms_norm_vjp(View x, const bf16* w, View dy, View before, View dx, int tokens, int heads,
                                        int dim, float eps) {
    long long at = (long long)blockIdx.x * blockDim.y + threadIdx.y;
    if (at >= (long long)tokens * heads) return;
    long long token = at / heads, column = at % heads * dim;
    const bf16 *xs = row(x, token) + column, *dys = row(dy, token) + column;
    float squares = 0.f, product = 0.f;
    for (int i = threadIdx.x * 8; i < dim; i += 256) {
        Eight v = load8(xs + i), d = load8(dys + i), g = load8(w + i);
#pragma unroll
        for (int j = 0; j < 8; j++) {
            squares += v.v[j] * v.v[j];
            product += v.v[j] * d.v[j] * g.v[j];
        }
    }
    float scale = rsqrtf(warp_sum(squares) / dim + eps);
    float pull = warp_sum(product) / dim * scale * scale;
    for (int i = threadIdx.x * 8; i < dim; i += 256) {
        Eight v = load8(xs + i), d = load8(dys + i), g = load8(w + i);
        Eight out;
        if (before.at) out = load8(row(before, token) + column + i);
#pragma unroll
        for (int j = 0; j < 8; j++) {
            float own = scale * (g.v[j] * d.v[j] - v.v[j] * pull);
            out.v[j] = before.at ? out.v[j] + own : own;
        }
        store8(row(dx, token) + column + i, out);
    }
}
