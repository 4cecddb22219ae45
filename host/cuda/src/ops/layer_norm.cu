// y = w * (x - mean(x)) / sqrt(variance(x) + eps) + b over rows of `width` columns, `b` where it is given; and its VJP. A warp a
// row.

// Mean, and 1 / sqrt(variance + eps). The variance is summed from distances to the mean: the difference of two sums would
// lose it where the mean is large.
__device__ __forceinline__ float2 layer_norm_moments(const bf16* x, int width, int lane, float eps) {
    float sum = 0.f, squares = 0.f;
    for (int i = lane * 8; i < width; i += 256) {
        Eight v = load8(x + i);
#pragma unroll
        for (int j = 0; j < 8; j++) sum += v.v[j];
    }
    float mean = warp_sum(sum) / width;
    for (int i = lane * 8; i < width; i += 256) {
        Eight v = load8(x + i);
#pragma unroll
        for (int j = 0; j < 8; j++) squares += (v.v[j] - mean) * (v.v[j] - mean);
    }
    return make_float2(mean, rsqrtf(warp_sum(squares) / width + eps));
}

extern "C" __global__ void layer_norm(View x, const bf16* w, const bf16* b, View y, int tokens, int width, float eps) {
    long long token = (long long)blockIdx.x * blockDim.y + threadIdx.y;
    if (token >= tokens) return;
    int lane = threadIdx.x;
    const bf16* xs = row(x, token);
    float2 moments = layer_norm_moments(xs, width, lane, eps);
    for (int i = lane * 8; i < width; i += 256) {
        Eight v = load8(xs + i), g = load8(w + i), shift = {};
        if (b) shift = load8(b + i);
#pragma unroll
        for (int j = 0; j < 8; j++) v.v[j] = (v.v[j] - moments.x) * moments.y * g.v[j] + shift.v[j];
        store8(row(y, token) + i, v);
    }
}

// With g = w dy and n = (x - mean) s, s = 1 / sqrt(variance + eps): dx = s (g - mean(g) - n mean(g n)), plus `before` where it is
// given; `before` and `dy` may be `dx` itself.
extern "C" __global__ void layer_norm_vjp(View x, const bf16* w, View dy, View before, View dx, int tokens, int width,
                                          float eps) {
    long long token = (long long)blockIdx.x * blockDim.y + threadIdx.y;
    if (token >= tokens) return;
    int lane = threadIdx.x;
    const bf16 *xs = row(x, token), *dys = row(dy, token);
    float2 moments = layer_norm_moments(xs, width, lane, eps);
    float sum = 0.f, along = 0.f;
    for (int i = lane * 8; i < width; i += 256) {
        Eight v = load8(xs + i), d = load8(dys + i), g = load8(w + i);
#pragma unroll
        for (int j = 0; j < 8; j++) {
            sum += g.v[j] * d.v[j];
            along += g.v[j] * d.v[j] * (v.v[j] - moments.x) * moments.y;
        }
    }
    sum = warp_sum(sum) / width;
    along = warp_sum(along) / width;
    for (int i = lane * 8; i < width; i += 256) {
        Eight v = load8(xs + i), d = load8(dys + i), g = load8(w + i), out = {};
        if (before.at) out = load8(row(before, token) + i);
#pragma unroll
        for (int j = 0; j < 8; j++)
            out.v[j] += moments.y * (g.v[j] * d.v[j] - sum - (v.v[j] - moments.x) * moments.y * along);
        store8(row(dx, token) + i, out);
    }
}
