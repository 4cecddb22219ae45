// y = f * (x - m) / sqrt(mean((x - m)^2) + eps) + b over runs of `run` columns, `runs` of them a token; and its VJP. Of an RMS norm m
// is 0, of a layer norm mean(x). f is 1, or offset + w where weights are given; b is 0 unless it is given. Runs share w and b, or,
// with `apart`, have their own. A run has `lanes` lanes: as many as it has pieces of eight columns, up to a warp, or up to a block of
// LANES where there are few runs.

#define LANES 256

struct Norm {
    const bf16 *w, *b;
    int tokens, runs, run, apart;
    float offset, eps;
};

// A lane's place: its run begins at `column` of the token's row, its weights at `own`.
struct Run {
    long long token;
    int column, own, lane, end;
};

__device__ __forceinline__ Run run_of(const Norm& n, int lanes) {
    int thread = threadIdx.y * 32 + threadIdx.x;
    long long at = (long long)blockIdx.x * (LANES / lanes) + thread / lanes;
    int column = (int)(at % n.runs) * n.run;
    // Lanes beyond the last run take part in sums.
    bool inside = at < (long long)n.tokens * n.runs;
    return {at / n.runs, column, n.apart ? column : 0, thread % lanes, inside ? n.run : 0};
}

__device__ __forceinline__ float run_sum(float x, int lanes) {
    for (int step = min(lanes, 32) / 2; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
    if (lanes <= 32) return x;
    __shared__ float warps[LANES / 32];
    __syncthreads();
    warps[threadIdx.y] = x;
    __syncthreads();
    int first = threadIdx.y / (lanes / 32) * (lanes / 32);
    x = 0.f;
    for (int i = 0; i < lanes / 32; i++) x += warps[first + i];
    return x;
}

__device__ __forceinline__ Eight factors(const Norm& n, int i) {
    Eight f;
    if (n.w) f = load8(n.w + i);
#pragma unroll
    for (int j = 0; j < 8; j++) f.v[j] = n.w ? f.v[j] + n.offset : 1.f;
    return f;
}

// The mean that a norm takes away. Squares are summed of distances to it: the difference of two sums would lose the variance
// where the mean is large.
template <bool CENTRED>
__device__ __forceinline__ float mean_of(const bf16* x, const Run& at, const Norm& n, int lanes) {
    if (!CENTRED) return 0.f;
    float sum = 0.f;
    for (int i = at.lane * 8; i < at.end; i += lanes * 8) {
        Eight v = load8(x + i);
#pragma unroll
        for (int j = 0; j < 8; j++) sum += v.v[j];
    }
    return run_sum(sum, lanes) / n.run;
}

template <bool CENTRED>
__device__ __forceinline__ void forward(const View& x, const View& y, const Norm& n, int lanes) {
    Run at = run_of(n, lanes);
    const bf16* xs = row(x, at.token) + at.column;
    bf16* ys = row(y, at.token) + at.column;
    float mean = mean_of<CENTRED>(xs, at, n, lanes), squares = 0.f;
    for (int i = at.lane * 8; i < at.end; i += lanes * 8) {
        Eight v = load8(xs + i);
#pragma unroll
        for (int j = 0; j < 8; j++) squares += (v.v[j] - mean) * (v.v[j] - mean);
    }
    float scale = rsqrtf(run_sum(squares, lanes) / n.run + n.eps);
    for (int i = at.lane * 8; i < at.end; i += lanes * 8) {
        Eight v = load8(xs + i), f = factors(n, at.own + i), shift = {};
        if (n.b) shift = load8(n.b + at.own + i);
#pragma unroll
        for (int j = 0; j < 8; j++) v.v[j] = (v.v[j] - mean) * scale * f.v[j] + shift.v[j];
        store8(ys + i, v);
    }
}

// With g = f dy, s = 1 / sqrt(mean((x - m)^2) + eps) and u = (x - m) s: dx = s (g - u mean(g u)), less s mean(g) where a mean was taken
// away, plus `before` where it is given; `before` and `dy` may be `dx` itself.
template <bool CENTRED>
__device__ __forceinline__ void backward(const View& x, const View& dy, const View& before, const View& dx, const Norm& n,
                                         int lanes) {
    Run at = run_of(n, lanes);
    const bf16 *xs = row(x, at.token) + at.column, *dys = row(dy, at.token) + at.column;
    float mean = mean_of<CENTRED>(xs, at, n, lanes), squares = 0.f, product = 0.f, sum = 0.f;
    for (int i = at.lane * 8; i < at.end; i += lanes * 8) {
        Eight v = load8(xs + i), d = load8(dys + i), f = factors(n, at.own + i);
#pragma unroll
        for (int j = 0; j < 8; j++) {
            float g = f.v[j] * d.v[j], from = v.v[j] - mean;
            squares += from * from;
            product += g * from;
            sum += g;
        }
    }
    float scale = rsqrtf(run_sum(squares, lanes) / n.run + n.eps);
    float along = run_sum(product, lanes) / n.run * scale * scale;
    float level = CENTRED ? run_sum(sum, lanes) / n.run : 0.f;
    for (int i = at.lane * 8; i < at.end; i += lanes * 8) {
        Eight v = load8(xs + i), d = load8(dys + i), f = factors(n, at.own + i), out = {};
        if (before.at) out = load8(row(before, at.token) + at.column + i);
#pragma unroll
        for (int j = 0; j < 8; j++) out.v[j] += scale * (f.v[j] * d.v[j] - level - (v.v[j] - mean) * along);
        store8(row(dx, at.token) + at.column + i, out);
    }
}

extern "C" __global__ void rms_norm(View x, View y, Norm n, int lanes) {
    after_previous();
    forward<false>(x, y, n, lanes);
}

extern "C" __global__ void layer_norm(View x, View y, Norm n, int lanes) {
    after_previous();
    forward<true>(x, y, n, lanes);
}

extern "C" __global__ void rms_norm_vjp(View x, View dy, View before, View dx, Norm n, int lanes) {
    after_previous();
    backward<false>(x, dy, before, dx, n, lanes);
}

extern "C" __global__ void layer_norm_vjp(View x, View dy, View before, View dx, Norm n, int lanes) {
    after_previous();
    backward<true>(x, dy, before, dx, n, lanes);
}
